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
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm
from webdataset.writer import TarWriter

from .addresses import folder_of, is_remote, shard_name, shown
from .encode import Encoded, ImageEncoder
from .errors import InputError
from .files import replace_file, sha256_of, write_json
from .randoms import hashes
from .remote import fetch
from .shard_config import ReshardConfig, ShardsConfig
from .shard_names import shard_paths, sources
from .shard_records import (
    JOURNAL_FILE,
    deciding_options,
    finish,
    finished_dataset,
    make_folder,
    open_journal,
    plan_of,
    refuse_other_tars,
    summary,
)
from .sources import InShard, Source, SourceImage, read_shards, read_source

FETCHED_FOLDER = ".fetched"


def write_shards(source: str, out_dir: str, config: ShardsConfig) -> dict[str, Any]:
    """Writes the shards of `source` and returns what dataset.json holds. The same call continues an interrupted one.

    Raises InputError when the source has no images, or when `out_dir` holds other things.
    """
    _check_options(config)
    found = read_source(source, labels=config.labels, val_share=config.val_share, seed=config.seed)
    return _write(found, Path(out_dir), config)


def reshard(patterns: Sequence[str], out_dir: str, config: ReshardConfig) -> dict[str, Any]:
    """Writes new shards of the images in shards, and returns as `write_shards`; those at addresses are fetched first.

    Raises InputError when the shards hold no image, or when `out_dir` holds other things.
    """
    options, out = ShardsConfig(**dataclasses.asdict(config)), Path(out_dir)
    _check_options(options)
    paths = list(dict.fromkeys(path for source in sources(patterns) for path in shard_paths(source)))
    if inside := [path for path in paths if Path(path).parent == out.absolute()]:
        raise InputError(f"out_dir {out} holds {Path(inside[0]).name}, which is to be read: choose another folder")
    request = hashlib.sha256(
        json.dumps([[_place(path) for path in paths], deciding_options(options)]).encode()
    ).hexdigest()[:16]
    addresses = [path for path in paths if is_remote(path)]
    dataset = finished_dataset(out, request, by="request") if addresses else None  # not to fetch them all again
    if dataset is None:
        if addresses:
            refuse_other_tars(out)
        local = {path: _local(path, out / FETCHED_FOLDER) for path in paths}
        found = read_shards(local, val_share=config.val_share, seed=config.seed)
        dataset = _write(found, out, options, {"request": request} if addresses else {})
    else:
        print(f"{out} is complete already: {summary(dataset)}")
    shutil.rmtree(out / FETCHED_FOLDER, ignore_errors=True)
    return dataset


def _local(path: str, folder: Path) -> str:
    """Returns a local path as it is, and for an address that of the shard fetched to `folder`, unless it is there."""
    if not is_remote(path):
        return path
    file = folder / f"{hashlib.sha256(_place(path).encode()).hexdigest()[:16]}.tar"
    if not file.exists():
        make_folder(folder)
        print(f"fetching {shown(path)}", flush=True)
        fetch(path, file)
    return str(file.absolute())


def _place(path: str) -> str:
    """Returns what is the same for a shard however its address is signed."""
    return f"{shown(folder_of(path))}/{shard_name(path)}"


def _check_options(config: ShardsConfig) -> None:
    if config.shard_size_mb <= 0:
        raise InputError(f"shard_size_mb {config.shard_size_mb} is not positive")
    if config.resize is not None and config.resize < 1:
        raise InputError(f"resize {config.resize} is not a number of pixels")
    if not 1 <= config.quality <= 100:
        raise InputError(f"quality {config.quality} is not in 1-100")


def _write(found: Source, out: Path, config: ShardsConfig, more: dict[str, str] | None = None) -> dict[str, Any]:
    """Writes the shards that are not written yet; dataset.json gets the entries in `more`, too."""
    plan = plan_of(found, config)
    if (dataset := finished_dataset(out, plan)) is not None:
        print(f"{out} is complete already: {summary(dataset)}")
        return dataset
    journal = open_journal(out, plan)
    for split, images in found.splits.items():
        rank = hashes(config.seed, f"shards of {split}", np.arange(len(images)), 1)[:, 0]
        shuffled = [images[i] for i in np.argsort(rank, kind="stable")]
        for shard in _write_split(out, split, shuffled, config, journal["shards"]):
            journal["shards"].append(shard)
            write_json(out / JOURNAL_FILE, journal)
    return finish(out, found, journal, more or {})


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
                    sample: dict[str, Any] = {"__key__": _key(item.image, position), item.extension: item.data}
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
    found = {"samples": sum(per_class.values()), "per_class": counts, "left_out": left_out, "next": position}
    return found | {"sha256": sha256_of(path)}


def _key(image: SourceImage, position: int) -> str:
    """Returns a key of plain characters that no other image of the split has."""
    stem = Path(image.name).stem
    if isinstance(image.content, InShard):
        stem = re.sub(r"^\d{8}-", "", stem)  # the position in the earlier shards
    return f"{position:08d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:60]}"


def _as_it_is(item: Encoded) -> Encoded:
    return item
