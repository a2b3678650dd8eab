"""What has been written of a set of shards: a journal while it grows, dataset.json once it is complete."""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .dataset_file import DATASET_FILE, LEFT_OUT_FILE
from .errors import InputError, printable
from .files import remove_leftovers, sha256_of, write_json, write_text
from .shard_config import ShardsConfig
from .sources import InShard, Source

JOURNAL_FILE = ".shards-in-progress.json"
LONGEST_COUNT = 1_000_000  # labels that are no class numbers, but names of something, are not counted up to the largest


def plan_of(found: Source, config: ShardsConfig) -> str:
    """Returns a hash of everything that decides what the shards hold."""
    digest = hashlib.sha256()
    digest.update(json.dumps([deciding_options(config), found.classes]).encode())
    for split, images in found.splits.items():
        for image in images:
            line = f"{split}\0{image.name}\0{image.label}\0{_extent(image.content)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def deciding_options(config: ShardsConfig) -> dict[str, Any]:
    """Returns the options that decide what the shards hold."""
    options = {key: value for key, value in dataclasses.asdict(config).items() if key != "num_workers"}
    return options | {"shard_size_mb": float(config.shard_size_mb)}  # 256 and 256.0 are the same size


def _extent(content: Path | np.ndarray | InShard) -> str:
    """Returns what tells an image from another of its name: its size in bytes, and its place if it is in a tar."""
    if isinstance(content, InShard):
        return f"{content.size}@{content.offset}"
    return str(content.stat().st_size if isinstance(content, Path) and content.exists() else 0)


def finished_dataset(out: Path, plan: str, *, by: str = "plan") -> dict[str, Any] | None:
    """Returns what dataset.json holds when all shards of this plan are there; None when there is work to do.

    `by` is the entry in which dataset.json has the plan. Raises InputError when it has another plan, or lacks a shard.
    """
    if not (out / DATASET_FILE).exists():
        return None
    dataset = _same_plan(out / DATASET_FILE, plan, by=by)
    shards = [shard for split in dataset["splits"].values() for shard in split["shards"]]
    for shard in shards:
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise InputError(f"{path} is missing or not as it was written: delete it all and run this again")
    remove_leftovers(out)
    (out / JOURNAL_FILE).unlink(missing_ok=True)
    return dataset


def open_journal(out: Path, plan: str) -> dict[str, Any]:
    """Returns the journal of an interrupted run of the same plan, or a new one, on disk before the first shard is.

    Raises InputError when the folder holds other things, or cannot be written.
    """
    make_folder(out)
    if (out / JOURNAL_FILE).exists():
        journal = _same_plan(out / JOURNAL_FILE, plan)
    else:
        refuse_other_tars(out)
        journal = {"plan": plan, "shards": []}
        write_json(out / JOURNAL_FILE, journal)
    remove_leftovers(out)
    return journal


def make_folder(folder: Path) -> None:
    """Makes a folder unless it is there. Raises InputError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out_dir {folder} cannot be written ({error.strerror}): choose another one") from error


def refuse_other_tars(out: Path) -> None:
    """Raises InputError when a folder holds tars, but no journal of how they came there."""
    if any(out.glob("*.tar")) and not (out / JOURNAL_FILE).exists():
        raise InputError(f"{out} already holds tars that this command did not write: choose another folder")


def _same_plan(path: Path, plan: str, *, by: str = "plan") -> dict[str, Any]:
    found = json.loads(path.read_text())
    if found.get(by) != plan:
        raise InputError(
            f"{path.parent} holds shards of other images or options: choose another folder, or delete this one"
        )
    return found


def finish(out: Path, found: Source, journal: dict[str, Any], more: dict[str, str]) -> dict[str, Any]:
    """Writes left_out.jsonl and dataset.json (with the entries in `more`, too), and says what came out.

    Raises InputError when no image could be read.
    """
    unreadable = [line for shard in journal["shards"] for line in shard["left_out"]]
    left_out = found.damaged + unreadable
    shards = [shard for shard in journal["shards"] if shard["name"]]
    if not shards:
        raise InputError(f"none of the {len(unreadable)} images could be read; the first: {unreadable[0]}")
    splits = {}
    for split in found.splits:
        own = [shard for shard in shards if shard["split"] == split]
        splits[split] = {
            "samples": sum(shard["samples"] for shard in own),
            "per_class": _per_class(own, found.classes),
            "shards": [
                {
                    "name": s["name"],
                    "samples": s["samples"],
                    "bytes": (out / s["name"]).stat().st_size,
                    "sha256": s.get("sha256") or sha256_of(out / s["name"]),  # an older version was interrupted
                }
                for s in own
            ],
        }
    dataset = {"plan": journal["plan"], **more, "classes": found.classes, "splits": splits, "left_out": len(left_out)}
    if left_out:
        write_text(out / LEFT_OUT_FILE, "".join(json.dumps(line) + "\n" for line in left_out))
        parts = f" and {len(found.damaged)} damaged parts of shards" if found.damaged else ""
        print(
            f"left out {len(unreadable)} unreadable images{parts} (listed in {out / LEFT_OUT_FILE}), among them:",
            file=sys.stderr,
        )
        for line in left_out[:3]:
            print(printable(f"  {line['file']}: {line['reason']}"), file=sys.stderr)
    write_json(out / DATASET_FILE, dataset)
    (out / JOURNAL_FILE).unlink(missing_ok=True)
    print(f"{out}: {summary(dataset)}")
    return dataset


def _per_class(shards: list[dict[str, Any]], classes: list[str] | None) -> list[int] | None:
    """Returns the number of samples of each class, up to the last with a name or a sample; None without any label."""
    counts = Counter[str]()
    for shard in shards:
        counts.update(shard["per_class"])
    length = len(classes) if classes else max((int(label) + 1 for label in counts), default=0)
    if not length or length > LONGEST_COUNT:
        return None
    return [counts[str(i)] for i in range(length)]


def summary(dataset: dict[str, Any]) -> str:
    """Returns in half a line what dataset.json says."""
    parts = [
        f"{split} {info['samples']} images in {len(info['shards'])} shards" for split, info in dataset["splits"].items()
    ]
    labels = max(len(info["per_class"] or ()) for info in dataset["splits"].values())
    classes = f"{len(dataset['classes'])} classes" if dataset["classes"] else f"labels 0-{labels - 1} without names"
    return f"{', '.join(parts)}; {classes if labels else 'unlabelled'}"
