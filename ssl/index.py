"""Where every sample of a set of tar shards lies: one pass over the tar headers, kept in a sidecar file.

A folder of shards holds one `index.npz` (offsets, sizes, labels, keys, defects, and each shard's size and modification
time). It is built on first use, and the entry of a shard that changed is built anew. Without it, finding the sample at
a position would mean reading everything before it. Shards behind an address have theirs beside them too
(`launch/shards.py index` makes it), or it is made by fetching each of them once.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from .addresses import folder_of, is_remote, shard_name, shown
from .dataset_file import read_dataset
from .entries import IMAGE_EXTENSIONS, ShardEntries
from .errors import InputError, printable
from .index_files import entries_of
from .shard_cache import ShardCache
from .shard_names import shard_paths, sources

DEFECTS_SHOWN = 3
OPEN_FILES = 256  # a shuffled run touches every shard; two sets have half of what a process may have open by default


class ShardDefect(NamedTuple):
    """Something wrong with a shard: bytes that cannot be read, or (size 0) what is odd about it."""

    shard: str  # path, or address without password and signature
    offset: int
    size: int
    reason: str


class ShardIndex:
    """All samples of some shards under one numbering: shard after shard, in file order.

    Offsets, sizes and labels are arrays over samples; `read` gives a sample's bytes in any process.
    """

    def __init__(
        self,
        paths: Sequence[str],
        entries: Sequence[ShardEntries],
        *,
        stamps: Sequence[tuple[int, int]] | None = None,
        sources: Int[np.ndarray, " shards"] | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.paths = list(paths)  # or addresses
        self.stamps = stamps and list(stamps)  # bytes and modification time of each shard; None: not compared
        self.cache = cache  # None: all shards are on local disks
        counts = [len(e.keys) for e in entries]
        self.offset = np.concatenate([e.offset for e in entries])
        self.size = np.concatenate([e.size for e in entries])
        self.label = np.concatenate([e.label for e in entries])
        self.shard = np.repeat(np.arange(len(counts)), counts)
        self.source = np.zeros_like(self.shard) if sources is None else np.repeat(sources, counts)  # of each sample
        self.defects = [ShardDefect(shown(p), *d) for p, e in zip(self.paths, entries, strict=True) for d in e.defects]
        # One array, not a million strings: forked workers would copy these page by page as they count references.
        joined = "\n".join(key for e in entries for key in e.keys).encode("utf-8", "surrogateescape")
        self._keys = np.frombuffer(joined, np.uint8)
        self._key_ends = np.append(np.flatnonzero(self._keys == ord("\n")), len(joined))
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.label)

    def key(self, sample: int) -> str:
        """Returns the sample's name inside its shard, without extension."""
        return self._key_bytes(sample, sample + 1).decode("utf-8", "surrogateescape")

    def _key_bytes(self, first: int, stop: int) -> bytes:
        """Returns the keys of samples first, ..., stop - 1, a line each."""
        start = int(self._key_ends[first - 1]) + 1 if first else 0
        return self._keys[start : int(self._key_ends[stop - 1])].tobytes()

    def read(self, sample: int) -> bytes:
        """Returns the bytes of the image file. Raises OSError, or InputError when a remote shard cannot be had."""
        size = int(self.size[sample])
        data = os.pread(self._file(int(self.shard[sample])), size, int(self.offset[sample]))
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes before the image does: was it replaced meanwhile?")
        return data

    def _file(self, shard: int) -> int:
        """Returns an open descriptor of a shard."""
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # the last one used stands last
        else:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.paths[shard]
            if self.cache is not None and is_remote(path):
                self._files[shard] = self.cache.open(shard)
            else:
                self._files[shard] = self._open_local(shard)
        return self._files[shard]

    def _open_local(self, shard: int) -> int:
        descriptor = os.open(self.paths[shard], os.O_RDONLY)
        found = os.fstat(descriptor)
        if self.stamps is not None and (found.st_size, found.st_mtime_ns) != self.stamps[shard]:
            os.close(descriptor)  # other images may lie in the same places
            raise OSError("the shard was replaced after the run began: start it again")
        return descriptor

    def close_evicted(self) -> None:
        """Closes the files that left the cache, whose disk space is free only then."""
        if self.cache is not None:
            for shard in [shard for shard, file in self._files.items() if self.cache.evicted(file)]:
                os.close(self._files.pop(shard))

    def fingerprint(self) -> str:
        """Returns a hash of what the samples are and in which order; the same wherever the shards lie."""
        digest = hashlib.sha256()
        for i, path in enumerate(self.paths):
            first, stop = int(self._first[i]), int(self._first[i + 1])
            name = shard_name(path).encode("utf-8", "surrogateescape")
            digest.update(name + b"\n" + self._key_bytes(first, stop) if stop > first else name)
        digest.update(self.size.tobytes() + self.label.tobytes())
        return digest.hexdigest()[:16]

    def samples_lost(self) -> int:
        """Returns about how many samples are missing because the tars are damaged: lost bytes by those of a sample."""
        lost = [defect for defect in self.defects if defect.size]
        if not lost or not len(self):
            return len(lost)
        last = np.searchsorted(self.shard, np.arange(len(self.paths)), side="right") - 1  # sample of each shard
        ends = np.where(np.diff(self._first) > 0, (self.offset + self.size)[last], 0).tolist()
        read = dict(zip(map(shown, self.paths), ends, strict=True))
        whole = sum(read.values()) - sum(d.size for d in lost if d.offset < read.get(d.shard, 0))
        return max(len(lost), round(sum(d.size for d in lost) * len(self) / max(1, whole)))

    def label_defects(self) -> list[str]:
        """Returns a sentence for each of the first labels that are no class number."""
        found = [d for d in self.defects if d.reason.startswith("label of")]
        return [f"{shown(d.shard)}: {shortened(d.reason)}" for d in found[:DEFECTS_SHOWN]]

    def describe_defects(self) -> list[str]:
        """Returns a sentence for each of the first defects, and one for the rest."""
        lines = [
            f"{shown(d.shard)}: {shortened(d.reason)} (byte {d.offset}{f', {d.size} bytes lost' if d.size else ''})"
            for d in self.defects[:DEFECTS_SHOWN]
        ]
        rest = len(self.defects) - DEFECTS_SHOWN
        return lines + ([f"and {rest} more; launch/shards.py verify lists all"] if rest > 0 else [])

    def __getstate__(self) -> dict[str, object]:
        return {
            **self.__dict__,
            "_files": {},
            "source": self.source[:0],
        }  # workers need no sources; files do not travel


def open_index(patterns: str | Sequence[str], *, cache_dir: Path | None = None) -> ShardIndex:
    """Returns the index of the shards that `patterns` name, scanning only shards that no sidecar describes.

    What is damaged in a shard is left out of it and listed in `defects`. Remote shards are kept below `cache_dir`.
    Raises InputError when nothing matches, a file is no tar at all, or the shards hold no image.
    """
    source_of: dict[str, int] = {}
    for number, pattern in enumerate(sources(patterns)):
        for path in shard_paths(pattern):
            source_of.setdefault(path, number)
    entries: dict[str, ShardEntries] = {}
    stamps: dict[str, tuple[int, int]] = {}
    for folder in dict.fromkeys(folder_of(path) for path in source_of):
        below = [path for path in source_of if folder_of(path) == folder]
        for path, (stamp, shard_entries) in zip(below, entries_of(folder, below, cache_dir), strict=True):
            entries[path], stamps[path] = shard_entries, stamp[1:]
    paths = list(source_of)
    if not any(len(entries[path].keys) for path in paths):
        raise InputError(
            f"{shown(paths[0])}{' and others' * (len(paths) > 1)}: no {', '.join(IMAGE_EXTENSIONS)} inside"
        )
    cache = None
    if cache_dir is not None and any(map(is_remote, paths)):
        contents = [entries[path].digest() if is_remote(path) else "" for path in paths]
        cache = ShardCache(cache_dir, paths, [stamps[path][0] for path in paths], contents)
    source_numbers = np.array(list(source_of.values()), np.int64)
    known = [entries[path] for path in paths]
    return ShardIndex(paths, known, stamps=[stamps[path] for path in paths], sources=source_numbers, cache=cache)


def shortened(text: str, most: int = 300) -> str:
    """Returns a text of at most so many characters, all printable: names in a damaged tar may have a million."""
    return printable(text if len(text) <= most else f"{text[:most]}...")


def refuse_damage(index: ShardIndex) -> None:
    """Raises InputError when a part of a tar cannot be read: a figure must count every image."""
    if lost := [defect for defect in index.defects if defect.size]:
        raise InputError(
            f"{shown(lost[0].shard)}: {shortened(lost[0].reason)} (byte {lost[0].offset}, {lost[0].size} bytes lost), "
            "and an evaluation must count every image: fetch it again, or `launch/shards.py repair` leaves out what is "
            "lost"
        )


def class_names(index: ShardIndex) -> list[str] | None:
    """Returns the class names in label order that `launch/shards.py` left beside the first of these shards, if any."""
    return read_dataset(folder_of(index.paths[0])).get("classes")
