"""Damaged shards written anew, without what cannot be read; the original stays beside, under another name.

Killed at any moment, it leaves each shard as it was or repaired, and the same call finishes the rest.
"""

import filecmp
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .addresses import is_remote, shown
from .check import ShardCheck, check_shards
from .dataset_file import DATASET_FILE, LEFT_OUT_FILE, read_dataset
from .entries import IMAGE_EXTENSIONS, Sample, ShardEntries, group, image_of, scan_shard
from .errors import InputError, printable
from .files import remove_leftovers, replace_file, sha256_of, write_json, write_text
from .shard_config import RepairConfig
from .shard_names import shard_paths, sources
from .sidecar import Known, read_sidecar
from .tar_scan import BLOCK, Member, scan_tar
from .verify import SHOWN, counted, displayed

DAMAGED_SUFFIX = ".damaged"

LeftOut = dict[str, Any]  # shard, key, byte and reason; samples, where several are lost without their keys


def repair_shards(patterns: Sequence[str], config: RepairConfig) -> bool:
    """Rewrites the shards that hold damage or unreadable images; returns whether all are whole now.

    Raises InputError when a pattern matches nothing, a shard is at an address, or its folder cannot be written.
    """
    paths = list(dict.fromkeys(path for source in sources(patterns) for path in shard_paths(source)))
    for path in paths:
        if is_remote(path):
            raise InputError(
                f"{shown(path)}: shards at an address are not rewritten; launch/shards.py reshard makes whole ones of "
                "them in a local folder"
            )
    repaired, hopeless, printed = 0, 0, 0
    left_out: list[LeftOut] = []
    for check in check_shards(paths, config.num_workers):
        if check.is_whole:
            continue
        if check.failure or len(check.unreadable) == len(check.samples):
            reason = check.failure or "none of its images can be read"
            print(f"{displayed(check.path)}: left as it is ({reason}); fetch it again, or delete it", flush=True)
            hopeless += 1
            continue
        found, kept = _repair(check)
        print(f"{displayed(check.path)}: rewritten without {_amount(found)}; the damaged one is now {kept}", flush=True)
        for line in found[: SHOWN - printed]:
            where = "" if line["byte"] is None else f" (byte {line['byte']})"
            print(printable(f"  {line['key'] or 'damage'}{where}: {line['reason']}"))
        printed, repaired, left_out = min(SHOWN, printed + len(found)), repaired + 1, left_out + found
    for folder in dict.fromkeys(Path(path).parent for path in paths):
        _update_dataset(folder, [Path(path) for path in paths if Path(path).parent == folder])
    if repaired:
        print(
            f"{repaired} of {counted(len(paths), 'shard')} rewritten without {_amount(left_out)}, all listed in "
            f"{LEFT_OUT_FILE} beside them"
        )
    elif not hopeless:
        print(f"{counted(len(paths), 'shard')}, all whole: nothing to repair")
    return not hopeless


def _amount(left_out: Sequence[LeftOut]) -> str:
    samples = sum(line.get("samples", line["key"] is not None) for line in left_out)
    parts = sum(line["key"] is None and "samples" not in line for line in left_out)
    return f"{counted(samples, 'sample')} and {counted(parts, 'damaged part')}"


def _repair(check: ShardCheck) -> tuple[list[LeftOut], str]:
    """Writes a shard anew; returns what was left out, and the name that the damaged one has from now on."""
    path = Path(check.path)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent} cannot be written: copy {path.name} to a folder where it can be repaired")
    remove_leftovers(path.parent, path.name)
    remove_leftovers(path.parent, LEFT_OUT_FILE)
    members, _ = scan_tar(path)
    bad = _bad_samples(check, members)
    lines = [{"key": None, "byte": d.offset, "bytes": d.size, "reason": d.reason} for d in check.damage]
    lines += [{"key": key, "byte": offset, "reason": reason} for key, offset, _, reason in bad]
    lines += _vanished(path, len(group(members)[0]))
    lines = [{"shard": path.name} | line for line in lines]
    dropped = {member.offset for _, _, files, _ in bad for member in files.values()}
    _append_missing(path.parent / LEFT_OUT_FILE, lines)  # first: written twice it is found out, forgotten it is not
    kept = ""

    def write(partial: Path) -> None:
        nonlocal kept
        _copy_members(path, [member for member in members if member.offset not in dropped], partial)
        kept = _keep_original(path)

    replace_file(path, write)
    return lines, kept


def _vanished(path: Path, found: int) -> list[LeftOut]:
    """Returns a line on the samples of which not even the key is left, where dataset.json says how many there were."""
    try:
        splits = read_dataset(str(path.parent)).get("splits", {}).values()
        listed = {shard["name"]: shard["samples"] for split in splits for shard in split["shards"]}
        lost = listed.get(path.name, 0) - found
    except (InputError, KeyError, TypeError, AttributeError):  # somebody else's
        return []
    if lost <= 0:
        return []
    reason = f"{found} samples are there, and {DATASET_FILE} lists {listed[path.name]}: the others lay in the damage"
    return [{"key": None, "byte": None, "samples": lost, "reason": reason}]


def _bad_samples(check: ShardCheck, members: Sequence[Member]) -> list[tuple[str, int, Sample, str]]:
    """Returns (key, byte, files, reason) of the samples that cannot be read, or of which damage has left a part."""
    unreadable = {bad.offset: bad.reason for bad in check.unreadable}
    samples, _ = group(members)
    usual = Counter(frozenset(_kinds(files)) for _, files in samples).most_common(1)[0][0]
    touching = _next_to_damage(check, members)
    found = []
    for key, files in samples:
        image = image_of(files)
        offset = image.offset if image else min(member.offset for member in files.values())
        if image and offset in unreadable:
            found.append((key, offset, files, unreadable[offset]))
        elif (lacking := usual - _kinds(files)) and any(member.offset in touching for member in files.values()):
            found.append((key, offset, files, f"its {', '.join(sorted(lacking))} lay in the damaged part"))
    return found


def _kinds(files: Sample) -> set[str]:
    return {"image" if extension in IMAGE_EXTENSIONS else extension for extension in files}


def _next_to_damage(check: ShardCheck, members: Sequence[Member]) -> set[int]:
    """Returns the offsets of the files that lie directly before or after a damaged part."""
    offsets = np.array([member.offset for member in members])
    after = np.searchsorted(offsets, [defect.offset for defect in check.damage])  # in a tar, files are in order
    return {int(offsets[i]) for at in after.tolist() for i in (at - 1, at) if 0 <= i < len(offsets)}


def _copy_members(path: Path, members: Sequence[Member], out: Path) -> None:
    """Writes a tar of these files of the tar at `path`, with their names, modes, owners and times."""
    with path.open("rb") as source, tarfile.open(out, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for member in members:
            source.seek(member.offset - BLOCK)
            header = tarfile.TarInfo.frombuf(source.read(BLOCK), "utf-8", "surrogateescape")
            header.name, header.size, header.type = member.name, member.size, tarfile.REGTYPE
            tar.addfile(header, source)


def _keep_original(path: Path) -> str:
    """Gives the damaged shard a second name, which is all it has once the repaired one takes its place; returns it."""
    for name in _damaged_names(path.name):
        kept = path.with_name(name)
        try:
            os.link(path, kept)
        except FileExistsError:
            if os.path.samefile(path, kept) or filecmp.cmp(path, kept, shallow=False):
                return name  # a killed run came to here
            continue
        except OSError:  # a file system without hard links
            replace_file(kept, lambda partial: shutil.copy2(path, partial))
        return name
    raise AssertionError("the names do not end")


def _damaged_names(name: str) -> Iterator[str]:
    yield name + DAMAGED_SUFFIX
    number = 2
    while True:
        yield f"{name}{DAMAGED_SUFFIX}-{number}"
        number += 1


def _append_missing(path: Path, lines: Sequence[LeftOut]) -> None:
    """Adds lines to left_out.jsonl, but none that a killed run has added already."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    new = [text for text in map(json.dumps, lines) if text not in set(before)]
    if new:
        write_text(path, "".join(f"{line}\n" for line in before + new))


def _update_dataset(folder: Path, paths: Sequence[Path]) -> None:
    """Brings the counts in dataset.json up to date for the shards that have been repaired, now or before a kill."""
    file = folder / DATASET_FILE
    names = {path.name for path in paths if path.with_name(path.name + DAMAGED_SUFFIX).exists()}
    if not names or not file.exists():
        return
    remove_leftovers(folder, DATASET_FILE)
    remove_leftovers(folder, LEFT_OUT_FILE)
    try:
        dataset = read_dataset(str(folder))
        before = json.dumps(dataset)
        for info in dataset["splits"].values():
            if names & {shard["name"] for shard in info["shards"]}:
                _update_split(folder, info, names)
        if (left_out := folder / LEFT_OUT_FILE).exists():
            dataset["left_out"] = len(left_out.read_text(encoding="utf-8").splitlines())
    except (InputError, KeyError, TypeError, AttributeError) as error:
        print(f"{displayed(str(file))} is left as it is: not as launch/shards.py writes it ({error!r})")
        return
    if json.dumps(dataset) != before:
        write_json(file, dataset)


def _update_split(folder: Path, info: dict[str, Any], names: set[str]) -> None:
    """Counts the samples of a split of dataset.json anew, in shards called `names` and, by class, in all of them."""
    known = read_sidecar(folder)
    entries = {shard["name"]: _entries(folder / shard["name"], known) for shard in info["shards"]}
    for shard in info["shards"]:
        found = entries[shard["name"]]
        if shard["name"] in names and found is not None:
            file = folder / shard["name"]
            shard |= {"samples": len(found.keys), "bytes": file.stat().st_size}
            if "sha256" in shard:
                shard["sha256"] = sha256_of(file)
    info["samples"] = sum(shard["samples"] for shard in info["shards"])
    if info["per_class"] is not None:
        labels = np.concatenate([found.label for found in entries.values() if found is not None])
        classes = len(info["per_class"])
        known_labels = labels[(labels >= 0) & (labels < classes)]  # one wrong label would count up to itself
        info["per_class"] = np.bincount(known_labels, minlength=classes).tolist()


def _entries(path: Path, known: Known) -> ShardEntries | None:
    """Returns what a shard holds, from its index where that is up to date; None when it cannot be read."""
    try:
        stat = path.stat()
        return known.get((path.name, stat.st_size, stat.st_mtime_ns)) or scan_shard(path)
    except (InputError, OSError):
        return None
