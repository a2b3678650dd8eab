"""Images into webdataset tars: shuffled, checked, atomic, and restartable at the last complete shard.

OUT_DIR/
    train-000000.tar ... val-000000.tar ...    KEY.jpg|png|webp, and KEY.cls where images are labelled
    dataset.json                               classes, counts, shards; written last: without it the set is incomplete
    left_out.jsonl                             images that could not be read, and why
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm
from webdataset.writer import TarWriter

from .config import ShardsConfig
from .encode import Encoded, ImageEncoder
from .errors import InputError
from .files import remove_leftovers, replace_file, write_json, write_text
from .index import DATASET_FILE
from .randoms import hashes
from .sources import Source, SourceImage, read_source

LEFT_OUT_FILE, JOURNAL_FILE = "left_out.jsonl", ".shards-in-progress.json"


def write_shards(source: str, out_dir: str, config: ShardsConfig) -> dict[str, Any]:
    """Writes the shards of `source` and returns what dataset.json holds. The same call continues an interrupted one.

    Raises InputError when the source has no images, or when `out_dir` holds other things.
    """
    if config.shard_size_mb <= 0:
        raise InputError(f"shard_size_mb {config.shard_size_mb} is not positive")
    if config.resize is not None and config.resize < 1:
        raise InputError(f"resize {config.resize} is not a number of pixels")
    if not 1 <= config.quality <= 100:
        raise InputError(f"quality {config.quality} is not in 1-100")
    found = read_source(source, labels=config.labels, val_share=config.val_share, seed=config.seed)
    out = Path(out_dir)
    plan = _plan(found, config)
    if (dataset := _finished(out, plan)) is not None:
        print(f"{out} is complete already: {_summary(dataset)}")
        return dataset
    journal = _open_journal(out, plan)
    for split, images in found.splits.items():
        rank = hashes(config.seed, f"shards of {split}", np.arange(len(images)), 1)[:, 0]
        shuffled = [images[i] for i in np.argsort(rank, kind="stable")]
        for shard in _write_split(out, split, shuffled, config, journal["shards"]):
            journal["shards"].append(shard)
            write_json(out / JOURNAL_FILE, journal)
    return _finish(out, found, journal)


def _plan(found: Source, config: ShardsConfig) -> str:
    """Returns a hash of everything that decides what the shards hold."""
    digest = hashlib.sha256()
    options = {key: value for key, value in dataclasses.asdict(config).items() if key != "num_workers"}
    options["shard_size_mb"] = float(config.shard_size_mb)  # 256 and 256.0 are the same size
    digest.update(json.dumps([options, found.classes]).encode())
    for split, images in found.splits.items():
        for image in images:
            size = image.content.stat().st_size if isinstance(image.content, Path) and image.content.exists() else 0
            digest.update(f"{split}\0{image.name}\0{image.label}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _finished(out: Path, plan: str) -> dict[str, Any] | None:
    """Returns what dataset.json holds when all shards of this plan are there; None when there is work to do."""
    if not (out / DATASET_FILE).exists():
        return None
    dataset = _same_plan(out / DATASET_FILE, plan)
    shards = [shard for split in dataset["splits"].values() for shard in split["shards"]]
    for shard in shards:
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            raise InputError(f"{path} is missing or not as it was written: delete it all and run this again")
    remove_leftovers(out)
    (out / JOURNAL_FILE).unlink(missing_ok=True)
    return dataset


def _open_journal(out: Path, plan: str) -> dict[str, Any]:
    """Returns the journal of an interrupted run of the same plan, or a new one, on disk before the first shard is."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out_dir {out} cannot be written ({error.strerror}): choose another one") from error
    if (out / JOURNAL_FILE).exists():
        journal = _same_plan(out / JOURNAL_FILE, plan)
    elif any(out.glob("*.tar")):
        raise InputError(f"{out} already holds tars that this command did not write: choose another folder")
    else:
        journal = {"plan": plan, "shards": []}
        write_json(out / JOURNAL_FILE, journal)
    remove_leftovers(out)
    return journal


def _same_plan(path: Path, plan: str) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if found.get("plan") != plan:
        raise InputError(
            f"{path.parent} holds shards of other images or options: choose another folder, or delete this one"
        )
    return found


def _write_split(
    out: Path, split: str, images: list[SourceImage], config: ShardsConfig, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Writes the shards of a split that are not `done` yet, and yields a record of each."""
    earlier = [shard for shard in done if shard["split"] == split]
    start = earlier[-1]["next"] if earlier else 0
    number = len(earlier)
    encoder = ImageEncoder(images[start:], config)
    loader = DataLoader(
        encoder,
        batch_size=None,
        num_workers=config.num_workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
    )
    encoded = iter(loader)
    with tqdm(total=len(images), initial=start, desc=split, unit="image", disable=not sys.stderr.isatty()) as bar:
        while start < len(images):
            name = f"{split}-{number:06d}.tar"
            record: dict[str, Any] = {"name": name, "split": split}
            replace_file(
                out / name, lambda partial, r=record, s=start: r.update(_write_tar(partial, encoded, s, config, bar))
            )
            start, number = record["next"], number + 1
            if record["samples"]:
                yield record
            else:  # nothing readable was left for it
                (out / name).unlink()
                yield record | {"name": None}


def _write_tar(path: Path, encoded: Iterator[Encoded], start: int, config: ShardsConfig, bar: tqdm) -> dict[str, Any]:
    """Writes images until the shard has its size; returns counts and the position after the last one."""
    per_class: Counter[int | None] = Counter()
    left_out: list[dict[str, str]] = []
    position = start
    with path.open("wb") as file:
        tar = TarWriter(file, mtime=0, encoder=False)
        try:
            for item in encoded:
                if item.reason is None:
                    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(item.image.name).stem)[:60]
                    sample: dict[str, Any] = {"__key__": f"{position:08d}-{stem}", item.extension: item.data}
                    if item.image.label is not None:
                        sample["cls"] = str(item.image.label).encode()
                    tar.write(sample)
                    per_class[item.image.label] += 1
                else:
                    left_out.append({"file": item.image.name, "reason": item.reason})
                position += 1
                bar.update()
                if file.tell() >= config.shard_size_mb * 1e6:
                    break
            tar.close()
        except BaseException:  # left open, the tar would complain on its own, later and at length
            with contextlib.suppress(Exception):
                tar.close()
            raise
    counts = {str(label): count for label, count in per_class.items() if label is not None}
    return {"samples": sum(per_class.values()), "per_class": counts, "left_out": left_out, "next": position}


def _as_it_is(item: Encoded) -> Encoded:
    return item


def _finish(out: Path, found: Source, journal: dict[str, Any]) -> dict[str, Any]:
    """Writes left_out.jsonl and dataset.json from the journal, and says what came out."""
    left_out = [line for shard in journal["shards"] for line in shard["left_out"]]
    shards = [shard for shard in journal["shards"] if shard["name"]]
    if not shards:
        raise InputError(f"none of the {len(left_out)} images could be read; the first: {left_out[0]}")
    splits: dict[str, Any] = {}
    for split in found.splits:
        own = [shard for shard in shards if shard["split"] == split]
        counts = Counter[str]()
        for shard in own:
            counts.update(shard["per_class"])
        splits[split] = {
            "samples": sum(shard["samples"] for shard in own),
            "per_class": [counts[str(i)] for i in range(len(found.classes))] if found.classes else None,
            "shards": [
                {"name": s["name"], "samples": s["samples"], "bytes": (out / s["name"]).stat().st_size} for s in own
            ],
        }
    dataset = {"plan": journal["plan"], "classes": found.classes, "splits": splits, "left_out": len(left_out)}
    if left_out:
        write_text(out / LEFT_OUT_FILE, "".join(json.dumps(line) + "\n" for line in left_out))
        print(
            f"left out {len(left_out)} unreadable images (listed in {out / LEFT_OUT_FILE}), among them:",
            file=sys.stderr,
        )
        for line in left_out[:3]:
            print(f"  {line['file']}: {line['reason']}", file=sys.stderr)
    write_json(out / DATASET_FILE, dataset)
    (out / JOURNAL_FILE).unlink(missing_ok=True)
    print(f"{out}: {_summary(dataset)}")
    return dataset


def _summary(dataset: dict[str, Any]) -> str:
    parts = [
        f"{split} {info['samples']} images in {len(info['shards'])} shards" for split, info in dataset["splits"].items()
    ]
    classes = f"{len(dataset['classes'])} classes" if dataset["classes"] else "unlabelled"
    return f"{', '.join(parts)}; {classes}"
