"""Whether shards are what they should be: every byte readable, every image whole, every count as dataset.json says."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from .addresses import folder_of, is_remote, shown
from .check import ShardCheck, check_shards
from .dataset_file import DATASET_FILE, read_dataset
from .entries import UNLABELLED
from .errors import InputError, printable
from .files import write_text
from .shard_config import VerifyConfig
from .shard_names import shard_paths, sources

SHOWN = 20  # findings on the screen


class Finding(NamedTuple):
    """Something wrong with the shards; a "note" is odd, but loses nothing."""

    kind: Literal["damaged", "unreadable", "missing", "miscounted", "changed", "note"]
    shard: str
    key: str | None
    byte: int | None  # from the start of the tar
    bytes_lost: int | None
    reason: str


@dataclass(frozen=True)
class _Checked:
    """What is kept of a shard until all are read: about 60 bytes a sample."""

    size: int  # bytes
    sha256: str  # empty where something else is wrong with it, which says more
    is_read: bool
    keys: str  # a line each
    key_hash: Int[np.ndarray, " n"]
    digest: UInt64[np.ndarray, " m"]  # of the readable images only
    label: Int[np.ndarray, " n"]

    @property
    def labelled(self) -> int:
        return int((self.label != UNLABELLED).sum())


@dataclass
class _Verification:
    shards: dict[str, _Checked] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, check: ShardCheck) -> None:
        readable = np.ones(len(check.keys), bool)
        readable[[bad.row for bad in check.unreadable]] = False
        hashes = np.array([hash(key) for key in check.keys], np.int64)
        self.shards[check.path] = _Checked(
            check.size,
            check.sha256 * check.is_whole,
            check.failure is None,
            "\n".join(check.keys),
            hashes,
            check.digest[readable],
            check.label,
        )
        if check.failure:
            self.findings.append(Finding("damaged", check.path, None, 0, check.size, check.failure))
        for defect in check.defects:
            kind = "damaged" if defect in check.damage else "note"
            self.findings.append(Finding(kind, check.path, None, defect.offset, defect.size, defect.reason))
        for bad in check.unreadable:
            key = check.keys[bad.row]
            self.findings.append(Finding("unreadable", check.path, key, bad.offset, None, bad.reason))

    def count(self, *kinds: str) -> int:
        return sum(finding.kind in kinds for finding in self.findings)


def verify_shards(patterns: Sequence[str], config: VerifyConfig) -> bool:
    """Prints what the shards hold and what is wrong with them; returns whether all is whole, there, and as counted.

    Raises InputError when a pattern matches nothing, or the report cannot be written.
    """
    paths = list(dict.fromkeys(path for source in sources(patterns) for path in shard_paths(source)))
    report = _report_file(config.report)
    found = _Verification()
    width = max(len(displayed(path)) for path in paths)
    for check in check_shards(paths, config.num_workers):
        found.add(check)
        shard = found.shards[check.path]
        print(
            f"{displayed(check.path):<{width}}  {len(check.keys):>9,} samples  {check.size / 1e6:>9,.1f} MB  "
            f"{shard.labelled:>9,} labelled  {len(check.unreadable):>5,} unreadable  {len(check.damage):>5,} damaged"
            f"{'  (cannot be read at all)' if check.failure else ''}",
            flush=True,
        )
    for folder in dict.fromkeys(folder_of(path) for path in paths):
        found.findings += _compare(folder, {p: s for p, s in found.shards.items() if folder_of(p) == folder})
    found.findings += _notes(found.shards)
    found.findings.sort(key=lambda finding: finding.kind == "note")
    if report:
        lines = [x._replace(shard=shown(x.shard)) for x in found.findings]  # without passwords and signatures
        write_text(report, "".join(json.dumps(line._asdict()) + "\n" for line in lines))
    _print_findings(found.findings, report)
    print(_totals(found))
    return not found.count("damaged", "unreadable", "missing", "miscounted", "changed")


def displayed(path: str) -> str:
    """Returns a shard's path from here, or its address without a password."""
    return shown(path) if is_remote(path) else path.removeprefix(os.path.join(os.getcwd(), ""))


def counted(count: int, noun: str, plural: str = "s") -> str:
    """Returns "1 shard", "1,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def _report_file(report: str | None) -> Path | None:
    if report is None:
        return None
    path = Path(report).expanduser()
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"report {report} cannot be written: give a file in a folder that exists and is writable")
    return path


def _compare(folder: str, shards: dict[str, _Checked]) -> Iterator[Finding]:
    """Yields what differs from the dataset.json beside the shards, if there is one."""
    file = f"{folder}/{DATASET_FILE}"
    try:
        dataset = read_dataset(folder)
    except InputError as error:
        yield Finding("damaged", file, None, None, None, str(error).removeprefix(f"{shown(file)} "))
        return
    try:
        for split, info in dataset.get("splits", {}).items():
            yield from _compare_split(folder, split, info, shards)
    except (KeyError, TypeError, AttributeError):
        yield Finding("note", file, None, None, None, "is not as launch/shards.py writes it, so no count is compared")
        return
    classes = dataset.get("classes") or []
    for path, shard in shards.items():
        if count := int((shard.label >= len(classes)).sum()) * bool(classes):
            reason = f"labels that are none of the {len(classes)} classes in {DATASET_FILE}: {count}"
            yield Finding("note", path, None, None, None, reason)


def _compare_split(folder: str, split: str, info: dict[str, Any], shards: dict[str, _Checked]) -> Iterator[Finding]:
    listed = {f"{folder}/{shard['name']}": shard for shard in info["shards"]}
    for path, shard in listed.items():
        if path not in shards and not is_remote(path) and not os.path.exists(path):
            yield Finding("missing", path, None, None, None, f"{DATASET_FILE} lists it, and it is not there")
        found = shards.get(path)
        if found is None or not found.is_read:
            continue
        for what, count in (("samples", len(found.label)), ("bytes", found.size)):
            if shard[what] != count:
                reason = f"{count} {what}, and {DATASET_FILE} says {shard[what]}"
                yield Finding("miscounted", path, None, None, None, reason)
        is_as_counted = shard["samples"] == len(found.label) and shard["bytes"] == found.size
        if is_as_counted and found.sha256 and shard.get("sha256", found.sha256) != found.sha256:
            reason = f"its bytes are not those that were written, by the sha256 in {DATASET_FILE}: copy it again"
            yield Finding("changed", path, None, None, None, reason)
    if not (listed.keys() <= shards.keys() and all(shards[path].is_read for path in listed)):
        return
    label = np.concatenate([np.zeros(0, np.int64), *(shards[path].label for path in listed)])
    file = f"{folder}/{DATASET_FILE}"
    if info["samples"] != len(label):
        reason = f"split {split} has {info['samples']} samples here, and {len(label)} in its shards"
        yield Finding("miscounted", file, None, None, None, reason)
    classes = info["per_class"] or []
    known = label[(label >= 0) & (label < len(classes))]  # one wrong label would count up to itself
    counts = np.bincount(known, minlength=len(classes)).tolist()
    if different := [i for i, (here, there) in enumerate(zip(classes, counts, strict=True)) if here != there]:
        first = different[0]
        reason = (
            f"split {split} has other counts per_class than its shards for {counted(len(different), 'class', 'es')}, "
            f"such as {classes[first]} and {counts[first]} for class {first}"
        )
        yield Finding("miscounted", file, None, None, None, reason)


def _notes(shards: dict[str, _Checked]) -> Iterator[Finding]:
    """Yields what is odd about the shards taken together."""
    paths, checked = list(shards), list(shards.values())
    key_hash = np.concatenate([shard.key_hash for shard in checked])
    owner = np.repeat(np.arange(len(checked)), [len(shard.key_hash) for shard in checked])
    order = np.lexsort((owner, key_hash))
    same = key_hash[order][1:] == key_hash[order][:-1]
    apart = order[1:][same & (owner[order][1:] != owner[order][:-1])]
    if len(apart):
        path, key = _sample(paths, checked, int(apart.min()))
        count = len(np.unique(key_hash[apart]))
        yield Finding("note", path, key, None, None, f"keys that occur in more than one shard: {count}, such as this")
    label = np.concatenate([shard.label for shard in checked])
    without = np.flatnonzero(label == UNLABELLED)
    if 0 < len(without) < len(label):
        path, key = _sample(paths, checked, int(without[0]))
        reason = f"samples without a label: {len(without)} of {len(label)}, first this"
        yield Finding("note", path, key, None, None, reason)
    digest = np.concatenate([shard.digest for shard in checked])
    if again := len(digest) - len(np.unique(digest)):
        reason = f"images that are the same as another, byte for byte: {again}"
        yield Finding("note", paths[0] if len(paths) == 1 else "", None, None, None, reason)


def _sample(paths: list[str], checked: list[_Checked], number: int) -> tuple[str, str]:
    """Returns shard and key of a sample, by its number among all."""
    for path, shard in zip(paths, checked, strict=True):
        if number < len(shard.label):
            return path, shard.keys.split("\n")[number]
        number -= len(shard.label)
    raise IndexError(number)


def _print_findings(findings: list[Finding], report: Path | None) -> None:
    for finding in findings[:SHOWN]:
        where = [displayed(finding.shard)] if finding.shard else []
        where += [finding.key] if finding.key else []
        where += [f"byte {finding.byte}"] if finding.byte is not None else []
        lost = f" ({finding.bytes_lost} bytes lost)" if finding.bytes_lost else ""
        print(printable(f"{finding.kind}: {', '.join(where)}{': ' if where else ''}{finding.reason}{lost}"))
    if len(findings) > SHOWN:
        all_of_them = f"{report} lists all" if report else "--report FILE.jsonl lists all"
        print(f"and {len(findings) - SHOWN} more; {all_of_them}")


def _totals(found: _Verification) -> str:
    shards = found.shards.values()
    parts = [
        f"{sum(len(shard.label) for shard in shards):,} samples",
        f"{sum(shard.size for shard in shards) / 1e6:,.1f} MB",
        f"{sum(shard.labelled for shard in shards):,} labelled",
    ]
    wrong = [
        counted(count, what)
        for kind, what in (
            ("unreadable", "unreadable image"),
            ("damaged", "damaged part"),
            ("missing", "missing shard"),
            ("miscounted", "wrong count"),
            ("changed", "changed shard"),
        )
        if (count := found.count(kind))
    ]
    way_out = "; launch/shards.py repair leaves out what cannot be read" if found.count("unreadable", "damaged") else ""
    return f"{counted(len(shards), 'shard')}, {', '.join(parts)}: {', '.join(wrong) or 'all whole'}{way_out}"
