"""Images that are in two sets of shards, byte for byte: evaluating on what was trained on says little."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int

from quarterlight.ssl.addresses import is_remote, shown
from quarterlight.ssl.errors import printable
from quarterlight.ssl.index import ShardIndex

KEYS_SHOWN = 3
READERS = 16  # shards that are read at once: the reads are small, and a disk's answer takes longest
MIDDLE_BYTES = 32

_Key = tuple[int, bytes]  # size and digest
_Read = Callable[[int, int, int], bytes]  # of a descriptor, and the offset and size of an image


def shared_images(train: ShardIndex, train_ids: Int[np.ndarray, " n"], val: ShardIndex) -> dict[int, int]:
    """Returns the samples of `val` that are among these of `train` as well, each with the one that it equals.

    Found by SHA-256 of the files' bytes. Read are only images as large, to the byte, as one of the other set (the index
    knows), of these 32 bytes in the middle, and whole only those that agree there: for ImageNet some hundred thousand
    small reads instead of 150 GB. What lies in the same place of the same shard is not read at all. Images in remote
    shards are left out, and so are unreadable ones.
    """
    theirs, ours = _local(train, np.sort(train_ids)), _local(val, np.arange(len(val)))
    at = {place: i for i, place in _places(train, theirs)} if set(train.paths) & set(val.paths) else {}
    found = {i: at[place] for i, place in _places(val, ours) if place in at}
    ours = ours[~np.isin(ours, list(found))]
    of_ours, of_theirs = dict[_Key, list[int]](), dict[_Key, list[int]]()
    for read in (_middle, _whole):
        sizes = np.intersect1d(train.size[theirs], val.size[ours])
        of_ours = _by_digest(val, ours[np.isin(val.size[ours], sizes)], read)
        of_theirs = _by_digest(train, theirs[np.isin(train.size[theirs], sizes)], read)
        ours, theirs = (
            np.array(sorted(i for key in of_ours.keys() & of_theirs.keys() for i in side[key]), np.int64)
            for side in (of_ours, of_theirs)
        )
    found |= {i: of_theirs[key][0] for key, samples in of_ours.items() if key in of_theirs for i in samples}
    return dict(sorted(found.items()))


def describe_shared(train: ShardIndex, val: ShardIndex, found: dict[int, int]) -> str:
    """Returns a warning with the number of images and the first keys; nothing where there is none."""
    if not found:
        return ""
    first = "; ".join(f"{_name(val, i)} is {_name(train, j)}" for i, j in list(found.items())[:KEYS_SHOWN])
    return (
        f"warning: {len(found)} of the {len(val)} images of data.val are in data.train too, byte for byte ({first}"
        f"{'; ...' if len(found) > KEYS_SHOWN else ''}): the accuracies below are too good for it"
    )


def warn_of_shared(train: ShardIndex, train_ids: Int[np.ndarray, " n"], val: ShardIndex, *, wanted: bool) -> None:
    """Prints a warning when images of `val` are among these of `train` as well; looks only where that is `wanted`."""
    if wanted and (found := shared_images(train, train_ids, val)):
        print(describe_shared(train, val, found), flush=True)


def _name(index: ShardIndex, sample: int) -> str:
    return printable(f"{index.key(sample)} in {os.path.basename(shown(index.paths[int(index.shard[sample])]))}")


def _local(index: ShardIndex, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    remote = np.array([is_remote(path) for path in index.paths])
    return ids[~remote[index.shard[ids]]]


def _places(index: ShardIndex, ids: Int[np.ndarray, " n"]) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yields each sample with its shard and its offset."""
    for i, shard, offset in zip(ids.tolist(), index.shard[ids].tolist(), index.offset[ids].tolist(), strict=True):
        yield i, (index.paths[shard], offset)


def _by_digest(index: ShardIndex, ids: Int[np.ndarray, " n"], read: _Read) -> dict[_Key, list[int]]:
    """Returns the samples with each size and digest of what `read` reads of them; shards are read beside each other."""
    shards = np.split(ids, np.flatnonzero(np.diff(index.shard[ids])) + 1) if len(ids) else []
    found: dict[_Key, list[int]] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for samples, digests in zip(shards, readers.map(lambda x: _of_shard(index, x, read), shards), strict=True):
            for i, digest in zip(samples.tolist(), digests, strict=False):
                found.setdefault((int(index.size[i]), digest), []).append(i)
    return found


def _of_shard(index: ShardIndex, samples: Int[np.ndarray, " n"], read: _Read) -> list[bytes]:
    """Returns the digests of images of one shard, in order, up to the first that cannot be read."""
    digests: list[bytes] = []
    try:
        with open(index.paths[int(index.shard[samples[0]])], "rb") as file:
            for offset, size in zip(index.offset[samples].tolist(), index.size[samples].tolist(), strict=True):
                digests.append(read(file.fileno(), offset, size))
    except OSError:
        pass
    return digests


def _middle(file: int, offset: int, size: int) -> bytes:
    return os.pread(file, min(MIDDLE_BYTES, size), offset + max(0, size - MIDDLE_BYTES) // 2)


def _whole(file: int, offset: int, size: int) -> bytes:
    return hashlib.sha256(os.pread(file, size, offset)).digest()
