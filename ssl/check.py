"""Shards read whole: every header scanned anew, every image decoded, strictly, in several processes."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from .addresses import is_remote
from .decode import UnreadableImage, decode_image
from .entries import Sample, group, image_of, scan_shard
from .errors import InputError
from .files import sha256_of
from .remote import fetch
from .tar_scan import Defect, scan_tar

CHUNK_BYTES = 4 << 20  # what a process is given at once
CHUNK_SAMPLES = 256


class Unreadable(NamedTuple):
    """A sample whose files cannot all be read, or whose image cannot be decoded."""

    row: int  # of the sample among those of its shard
    offset: int  # of the image's bytes, from the start of the tar
    reason: str


@dataclass(frozen=True)
class ShardCheck:
    """What one shard holds, and what is wrong with it. A sample's row is the same in all lists and arrays."""

    path: str  # or address
    size: int  # bytes
    sha256: str  # of the whole file; empty where it cannot be read
    keys: list[str]
    samples: list[Sample]
    label: Int[np.ndarray, " n"]
    digest: UInt64[np.ndarray, " n"]  # of the image's bytes
    unreadable: list[Unreadable]
    defects: list[Defect]
    failure: str | None = None  # why nothing of it could be read

    @property
    def is_whole(self) -> bool:
        """True when every byte could be read and every image decoded; what is merely odd does not count."""
        return not (self.failure or self.unreadable or self.damage)

    @property
    def damage(self) -> list[Defect]:
        """The defects that cost bytes, or may have."""
        return [defect for defect in self.defects if defect.size]


Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]  # the built-in map, or a pool's


@contextlib.contextmanager
def _processes(num_workers: int) -> Iterator[Run]:
    """Gives a `map` that works in `num_workers` processes, or in this one for 0.

    They start here, before any connection is opened, which would not survive the fork.
    """
    if num_workers == 0:
        yield map
        return
    with ProcessPoolExecutor(num_workers) as pool:
        pool.submit(int).result()
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise InputError(
                "a process that decodes images was killed, perhaps for lack of memory: give fewer num_workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def check_shards(paths: Sequence[str], num_workers: int) -> Iterator[ShardCheck]:
    """Yields what each shard holds; one at an address is fetched to a temporary folder for that, and deleted."""
    with _processes(num_workers) as run:
        for path in paths:
            if not is_remote(path):
                yield _check(Path(path), path, run)
                continue
            with tempfile.TemporaryDirectory(prefix="quarterlight-") as folder:
                local = Path(folder) / "shard.tar"
                try:
                    fetch(path, local)
                except InputError as error:
                    if "pip install" in str(error):  # of this machine, and not of a shard
                        raise
                    yield _nothing(path, 0, str(error))
                else:
                    yield _check(local, path, run)


def _check(path: Path, name: str, run: Run) -> ShardCheck:
    size = path.stat().st_size if path.exists() else 0
    try:
        entries = scan_shard(path)
        members, _ = scan_tar(path)
        grouped, _ = group(members)
        defects, sha256 = entries.defects, sha256_of(path)
    except InputError as error:
        return _nothing(name, size, str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return _nothing(name, size, f"cannot be read ({error.strerror})")
    samples = [files for _, files in grouped if image_of(files) is not None]
    tasks = [(str(path), samples[first:stop]) for first, stop in _chunks(samples)]
    found = [one for part in run(_read_and_decode, tasks) for one in part]
    unreadable = [Unreadable(i, int(entries.offset[i]), reason) for i, (_, reason) in enumerate(found) if reason]
    digest = np.array([digest for digest, _ in found], np.uint64)
    return ShardCheck(name, size, sha256, entries.keys, samples, entries.label, digest, unreadable, defects)


def _nothing(name: str, size: int, reason: str) -> ShardCheck:
    none = np.zeros(0, np.int64)
    return ShardCheck(name, size, "", [], [], none, none.astype(np.uint64), [], [], reason)


def _chunks(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """Yields (first, stop): runs of samples of some megabytes each."""
    first = size = 0
    for i, files in enumerate(samples):
        size += sum(member.size for member in files.values())
        if size >= CHUNK_BYTES or i + 1 - first >= CHUNK_SAMPLES or i + 1 == len(samples):
            yield first, i + 1
            first, size = i + 1, 0


def _read_and_decode(task: tuple[str, list[Sample]]) -> list[tuple[int, str | None]]:
    """Returns, for each sample, a hash of its image's bytes, and why it cannot be read; None: it can."""
    path, samples = task
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return [(0, str(error))] * len(samples)
    try:
        return [_examine(descriptor, files) for files in samples]
    finally:
        os.close(descriptor)


def _examine(descriptor: int, files: Sample) -> tuple[int, str | None]:
    image, digest = image_of(files), 0
    try:
        for member in files.values():
            data = os.pread(descriptor, member.size, member.offset)
            if len(data) < member.size:
                return 0, f"the shard became shorter while it was read, and ends in {member.name}"
            if member is image:
                digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
                decode_image(data)
    except UnreadableImage as error:
        return digest, str(error)
    except OSError as error:
        return 0, f"cannot be read from the disk ({error.strerror})"
    return digest, None
