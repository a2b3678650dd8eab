"""Where every sample of a set of tar shards lies: one pass over the tar headers, kept in a sidecar file.

A folder of shards holds one `index.npz` (offsets, sizes, labels, keys, and each shard's size and modification time). It
is built on first use, and the entry of a shard that changed is built anew. Without it, finding the sample at a position
would mean reading everything before it.
"""

import glob
import hashlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np
from jaxtyping import Int

from .errors import InputError
from .files import replace_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
INDEX_NAME = "index.npz"
DATASET_FILE = "dataset.json"
UNLABELLED = -1


def shard_paths(patterns: str | Sequence[str]) -> list[Path]:
    """Returns the shards that globs, braces and plain paths name, each once, sorted within a pattern.

    Raises InputError when a pattern matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            parts = list(braceexpand.braceexpand(os.path.expanduser(pattern)))
        except braceexpand.UnbalancedBracesError as error:  # type: ignore[attr-defined]
            raise InputError(f"shards: the braces in {pattern} do not match") from error
        for part in parts:
            if "://" in part:
                raise InputError(f"{part}: only shards on local disks are read")
            matches = [part] if os.path.exists(part) else sorted(glob.glob(part))
            if not matches:
                reason = "matches no file" if glob.has_magic(part) else "does not exist"
                raise InputError(f"shards: {part} {reason} (seen from {Path.cwd()})")
            if folders := [match for match in matches if os.path.isdir(match)]:
                raise InputError(
                    f"shards: {folders[0]} is a folder; name its tars, as in '{folders[0]}/train-*.tar' "
                    "(launch/shards.py makes them of images)"
                )
            found |= dict.fromkeys(Path(match).absolute() for match in matches)
    if not found:
        raise InputError("shards: no pattern given")
    return list(found)


@dataclass(frozen=True)
class ShardEntries:
    """The samples of one shard, in file order."""

    offset: Int[np.ndarray, " n"]  # of the image's bytes, from the start of the tar
    size: Int[np.ndarray, " n"]  # bytes
    label: Int[np.ndarray, " n"]  # class number, or UNLABELLED
    keys: list[str]


def scan_shard(path: Path) -> ShardEntries:
    """Returns the samples of a tar: files are one sample while their name up to the first dot stays the same.

    Raises InputError when the file is no tar, ends early, is damaged, or holds a label that is no number.
    """
    entries: list[tuple[int, int, int, str]] = []
    members: dict[str, tarfile.TarInfo] = {}
    key: str | None = None

    def close_sample(tar: tarfile.TarFile) -> None:
        image = next((members[x] for x in IMAGE_EXTENSIONS if x in members), None)
        if image is not None:
            entries.append((image.offset_data, image.size, _label(tar, members, path, key), key or ""))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem or not extension:  # dot files and bare names are no part of a sample, as in webdataset
                    continue
                name = (f"{folder}/{stem}" if folder else stem).replace("\n", " ")  # the sidecar holds a key a line
                if name != key:
                    close_sample(tar)
                    members, key = {}, name
                members[extension.lower()] = member
            close_sample(tar)
            _check_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a readable tar ({error}); write it again or leave it out") from error
    columns = list(zip(*entries, strict=True)) or [(), (), (), ()]
    return ShardEntries(*(np.array(x, np.int64) for x in columns[:3]), keys=list(columns[3]))


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], path: Path, key: str | None) -> int:
    extension = next((x for x in ("cls", "json") if x in members), None)
    file = tar.extractfile(members[extension]) if extension else None
    if file is None:
        return UNLABELLED
    text = file.read()
    try:
        label = int(text) if extension == "cls" else json.loads(text).get("label", UNLABELLED)
        if isinstance(label, float) and not label.is_integer():
            raise ValueError("a fraction")
        return int(np.int64(int(label)))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: label of {key}.{extension} is {text[:40]!r}, not a whole number") from error


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header for the end; only zeros from there on (or a bare end of file) are the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(end)
        zeros_only = not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))
    if end > size or not zeros_only:
        at = f"ends at byte {size}, in the middle of a file" if end > size else f"is damaged at byte {end} of {size}"
        raise InputError(f"{path}: the tar {at}; write it again or leave it out")


def class_names(paths: Sequence[Path]) -> list[str] | None:
    """Returns the class names in label order that `launch/shards.py` left beside the first of these shards, if any."""
    file = paths[0].parent / DATASET_FILE
    return json.loads(file.read_text()).get("classes") if file.is_file() else None


class ShardIndex:
    """All samples of some shards under one numbering: shard after shard, in file order.

    Offsets, sizes and labels are arrays over samples; `read` gives a sample's bytes in any process.
    """

    def __init__(self, paths: Sequence[Path], entries: Sequence[ShardEntries]) -> None:
        self.paths = list(paths)
        counts = [len(e.keys) for e in entries]
        self.offset = np.concatenate([e.offset for e in entries])
        self.size = np.concatenate([e.size for e in entries])
        self.label = np.concatenate([e.label for e in entries])
        self.shard = np.repeat(np.arange(len(counts)), counts)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._keys = [e.keys for e in entries]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.label)

    def key(self, sample: int) -> str:
        """Returns the sample's name inside its shard, without extension."""
        shard = int(self.shard[sample])
        return self._keys[shard][sample - int(self._first[shard])]

    def read(self, sample: int) -> bytes:
        """Returns the bytes of the image file."""
        shard = int(self.shard[sample])
        if shard not in self._files:
            if len(self._files) >= 64:  # a shuffled run touches every shard; stay far below the limit of open files
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return os.pread(self._files[shard], int(self.size[sample]), int(self.offset[sample]))

    def fingerprint(self) -> str:
        """Returns a hash of what the samples are and in which order; the same wherever the shards lie."""
        digest = hashlib.sha256()
        for keys, path in zip(self._keys, self.paths, strict=True):
            digest.update("\n".join([path.name, *keys]).encode("utf-8", "surrogateescape"))
        digest.update(self.size.tobytes() + self.label.tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to workers


def open_index(patterns: str | Sequence[str]) -> ShardIndex:
    """Returns the index of the shards that `patterns` name, scanning only shards that no sidecar describes.

    Raises InputError when nothing matches, a shard is damaged, or the shards hold no image.
    """
    paths = shard_paths(patterns)
    entries: dict[Path, ShardEntries] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        entries |= _folder_entries(folder, [path for path in paths if path.parent == folder])
    index = ShardIndex(paths, [entries[path] for path in paths])
    if not len(index):
        raise InputError(f"{paths[0]}{' and others' * (len(paths) > 1)}: no {', '.join(IMAGE_EXTENSIONS)} inside")
    return index


def _folder_entries(folder: Path, paths: Iterable[Path]) -> dict[Path, ShardEntries]:
    sidecar = folder / INDEX_NAME
    known = _read_sidecar(sidecar)
    stamps = {path: (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
    missing = [path for path, stamp in stamps.items() if stamp not in known]
    for path in missing:
        known = {stamp: entries for stamp, entries in known.items() if stamp[0] != path.name}
        known[stamps[path]] = scan_shard(path)
    if missing and os.access(folder, os.W_OK):  # from a read-only folder the index is built at every start
        replace_file(sidecar, lambda partial: _write_sidecar(partial, known))
    return {path: known[stamp] for path, stamp in stamps.items()}


_Stamp = tuple[str, int, int]  # file name, bytes, modification time in ns


def _write_sidecar(path: Path, known: dict[_Stamp, ShardEntries]) -> None:
    names, sizes, times = zip(*known, strict=True)
    with path.open("wb") as file:
        np.savez(
            file,
            shard_name=np.array(names),
            shard_size=np.array(sizes),
            shard_mtime_ns=np.array(times),
            count=np.array([len(e.keys) for e in known.values()]),
            offset=np.concatenate([e.offset for e in known.values()]),
            size=np.concatenate([e.size for e in known.values()]),
            label=np.concatenate([e.label for e in known.values()]),
            keys=np.frombuffer(
                "\n".join(k for e in known.values() for k in e.keys).encode("utf-8", "surrogateescape"), np.uint8
            ),
        )


def _read_sidecar(path: Path) -> dict[_Stamp, ShardEntries]:
    """Returns what the sidecar knows; nothing when there is none, or when it is damaged (it is then written anew)."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        stamps = list(zip(*(columns[f"shard_{x}"].tolist() for x in ("name", "size", "mtime_ns")), strict=True))
        cuts = np.cumsum(columns["count"])[:-1]
        keys = columns["keys"].tobytes().decode("utf-8", "surrogateescape").split("\n")
        split = {name: np.split(columns[name], cuts) for name in ("offset", "size", "label")}
        bounds = np.concatenate([[0], np.cumsum(columns["count"])])
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):  # all by zipfile
        return {}
    return {
        stamp: ShardEntries(split["offset"][i], split["size"][i], split["label"][i], keys[bounds[i] : bounds[i + 1]])
        for i, stamp in enumerate(stamps)
    }
