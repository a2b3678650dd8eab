"""A set of small images decoded once, into one array beside the shards: reading and decoding cost more than a crop."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .decode import UnreadableImage, decode_image
from .errors import InputError
from .files import replace_file, write_json
from .index import ShardIndex

LARGEST_SIDE = 64  # pixels: up to here decoding a JPEG costs more than copying its pixels from a file
LEFTOVER_S = 3600  # a file that is being written changes more often
SIZE_SAMPLES = 16  # images looked at to see whether a set may be one of small images


@dataclass
class SmallImages:
    """The pixels of all samples of an index, which are of one small size."""

    file: Path
    unreadable: dict[int, str]  # why, by sample
    _pixels: np.ndarray | None = field(default=None, repr=False)

    def read(self, samples: Int[np.ndarray, " B"]) -> UInt8[Tensor, "B H W C"]:
        """Returns the pixels of these samples; zeros where one is unreadable."""
        pixels = np.load(self.file, mmap_mode="r", allow_pickle=False) if self._pixels is None else self._pixels
        self._pixels = pixels
        return torch.from_numpy(pixels[samples])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file by itself


def find_small_images(index: ShardIndex, in_chans: Literal[1, 3], cache_dir: Path) -> SmallImages | None:
    """Returns the array of a set whose images are all of one size of at most LARGEST_SIDE pixels; None for others.

    It is made when it is not there: beside the first shard, or below `cache_dir` where that folder cannot be written.
    Raises InputError when neither can.
    """
    if index.cache is not None or (size := _common_size(index, in_chans)) is None:
        return None
    beside = Path(index.paths[0]).parent
    name, shape = f"pixels-{_stamp(index)}-{in_chans}", (len(index), *size, in_chans)
    for folder in (beside, cache_dir):
        if (before := _read(folder / f"{name}.npy", shape)) is not None:
            return SmallImages(folder / f"{name}.npy", before["unreadable"]) if before["one_size"] else None
    file = (beside if os.access(beside, os.W_OK) else cache_dir) / f"{name}.npy"
    facts: dict[str, Any] = {"one_size": True, "unreadable": {}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(file.parent)
        print(f"decoding {len(index):,} images of {size[1]} x {size[0]} px once, into {file}", flush=True)
        try:
            replace_file(file, _decoding(index, shape, facts["unreadable"]))
        except _OtherSize:
            facts = {"one_size": False, "unreadable": {}}
        write_json(file.with_suffix(".json"), facts)
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror or error}): the decoded images take "
            f"{np.prod(shape) / 1e6:.0f} MB; make room there, or make the folder of the shards read-only and give "
            "data.cache_dir"
        ) from error
    return SmallImages(file, facts["unreadable"]) if facts["one_size"] else None


class _OtherSize(Exception):
    """An image is not as large as the first one."""


def _stamp(index: ShardIndex) -> str:
    """Returns a hash of what the shards are, and of when they were written.

    It is the file's name, so what a run has begun to read is never replaced; mended shards are decoded anew.
    """
    return hashlib.sha256(json.dumps([index.fingerprint(), index.stamps]).encode()).hexdigest()[:16]


def _read(file: Path, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Returns what an earlier run has found out of these shards; None where it is missing or damaged."""
    try:
        facts = json.loads(file.with_suffix(".json").read_text())
        facts["unreadable"] = {int(sample): str(reason) for sample, reason in facts["unreadable"].items()}
        if facts["one_size"]:
            pixels = np.load(file, mmap_mode="r", allow_pickle=False)
            if pixels.shape != shape or pixels.dtype != np.uint8:
                return None
        return facts
    except Exception:  # of damaged files json and numpy raise errors of many kinds
        return None


def _remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes have left half written; one that another machine writes now has changed lately."""
    for partial in folder.glob(".pixels-*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > LEFTOVER_S:
                partial.unlink()


def _common_size(index: ShardIndex, in_chans: Literal[1, 3]) -> tuple[int, int] | None:
    """Returns the size of some of the images where it is small and one, as a sign that the others have it as well."""
    sizes = set()
    for sample in np.linspace(0, len(index) - 1, SIZE_SAMPLES).astype(int).tolist():
        try:
            sizes.add(decode_image(index.read(sample), in_chans).shape[:2])
        except (UnreadableImage, OSError):
            continue
        if len(sizes) > 1 or max(max(size) for size in sizes) > LARGEST_SIDE:
            return None
    return next(iter(sizes), None)


def _decoding(index: ShardIndex, shape: tuple[int, ...], unreadable: dict[int, str]) -> Callable[[Path], None]:
    """Returns what writes the array to a path, filling `unreadable`. It raises _OtherSize."""
    channels: Literal[1, 3] = 3 if shape[3] == 3 else 1

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # written, not mapped: a full disk is then an error and not a signal
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for sample in range(len(index)):
                try:
                    pixels = decode_image(index.read(sample), channels)
                except (UnreadableImage, OSError) as error:
                    unreadable[sample] = str(error)
                    pixels = np.zeros(shape[1:], np.uint8)
                if pixels.shape != shape[1:]:
                    raise _OtherSize
                file.write(pixels.tobytes())

    return write
