"""Where the entries of shards come from: the index.npz beside them, one kept in the cache, or a scan."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .addresses import is_remote, shard_name, shown
from .dataset_file import read_dataset
from .entries import ShardEntries, scan_shard
from .errors import InputError
from .files import replace_file
from .patience import unwritable
from .remote import fetch, read_remote
from .sidecar import INDEX_NAME, Known, Stamp, pack, read_sidecar, unpack
from .tar_scan import Defect

Found = list[tuple[Stamp, ShardEntries]]


def entries_of(folder: str, paths: Sequence[str], cache_dir: Path | None) -> Found:
    """Returns stamp and entries of these shards of a folder or an address; with a defect where samples are missing.

    Raises InputError for what is no tar, or cannot be fetched.
    """
    found = (_remote_entries if is_remote(folder) else _local_entries)(folder, paths, cache_dir)
    listed = _listed(folder)
    return [(stamp, _compared(entries, stamp, listed.get(stamp[0]))) for stamp, entries in found]


def _listed(folder: str) -> dict[str, tuple[int, int]]:
    """Returns samples and bytes of the shards that the dataset.json of a folder lists; nothing where it is damaged."""
    if is_remote(folder):
        return {}  # their sizes are checked when they are fetched
    try:
        splits = read_dataset(folder)["splits"].values()
        return {x["name"]: (int(x["samples"]), int(x["bytes"])) for split in splits for x in split["shards"]}
    except (InputError, KeyError, TypeError, AttributeError, ValueError):
        return {}  # another tool's, or none


def _compared(entries: ShardEntries, stamp: Stamp, listed: tuple[int, int] | None) -> ShardEntries:
    """Returns the entries with a defect when the shard once had more samples: a tar's lost end does not show in it."""
    if listed is None or len(entries.keys) >= listed[0]:
        return entries
    if stamp[1] >= listed[1] and any(defect.size for defect in entries.defects):
        return entries  # these are what is missing
    reason = f"{len(entries.keys)} samples are there, and dataset.json lists {listed[0]}"
    return replace(entries, defects=[*entries.defects, Defect(stamp[1], max(1, listed[1] - stamp[1]), reason)])


def _local_entries(folder: str, paths: Sequence[str], cache_dir: Path | None) -> Found:
    """Returns the entries from the index beside the shards, or else in the cache; what neither holds is scanned."""
    kept = Path(folder)
    known = read_sidecar(kept)
    stamps = [_stamp(Path(path)) for path in paths]
    if any(stamp not in known for stamp in stamps) and not os.access(kept, os.W_OK) and cache_dir is not None:
        kept = _kept_index(folder, cache_dir)
        known = read_sidecar(kept) | known
    missing = [stamp for stamp in stamps if stamp not in known]
    refused = []
    for stamp in missing:
        try:
            known = _replaced(known, stamp, scan_shard(Path(folder) / stamp[0]))
        except InputError as error:
            refused.append(str(error))
    if missing and known:
        _keep(kept, known)
    if refused:
        more = f" (and {len(refused) - 1} more: launch/shards.py verify lists them)" if len(refused) > 1 else ""
        raise InputError(refused[0] + more)
    return [(stamp, known[stamp]) for stamp in stamps]


def _remote_entries(folder: str, paths: Sequence[str], cache_dir: Path | None) -> Found:
    """Returns the entries from the index beside the shards, else from one made earlier, else from the shards."""
    if cache_dir is None:
        raise InputError(f"{shown(paths[0])}: only shards on local disks are read here")
    data = read_remote(f"{folder}/{INDEX_NAME}")
    known = {stamp[0]: (stamp, entries) for stamp, entries in (unpack(data) if data else {}).items()}
    names = [shard_name(path) for path in paths]
    if any(name not in known for name in names):
        kept = _kept_index(folder, cache_dir)
        before = read_sidecar(kept)
        known = {stamp[0]: (stamp, entries) for stamp, entries in before.items()} | known
        missing = [path for path, name in zip(paths, names, strict=True) if name not in known]
        if missing:
            print(
                f"{shown(folder)}: no {INDEX_NAME} lists {shard_name(missing[0])}; fetching {len(missing)} shards once "
                f"to make one (launch/shards.py index makes one to put beside them)",
                flush=True,
            )
        for stamp, entries in scan_remote(missing, cache_dir):
            known[stamp[0]] = (stamp, entries)
            before = _replaced(before, stamp, entries)
            _keep(kept, before)
    return [known[name] for name in names]


def scan_remote(paths: Sequence[str], cache_dir: Path) -> Iterator[tuple[Stamp, ShardEntries]]:
    """Yields what each remote shard holds; it is fetched to `cache_dir` for that, one at a time, and deleted."""
    for path in paths:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(cache_dir, error) from error
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            local = Path(folder) / "shard.tar"
            fetch(path, local)
            try:
                entries = scan_shard(local)
            except InputError as error:
                raise InputError(str(error).replace(str(local), shown(path))) from error
            yield (shard_name(path), local.stat().st_size, 0), entries


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def _replaced(known: Known, stamp: Stamp, entries: ShardEntries) -> Known:
    """Returns `known` with a shard's entries, and none for older states of that shard."""
    return {s: e for s, e in known.items() if s[0] != stamp[0]} | {stamp: entries}


def _kept_index(folder: str, cache_dir: Path) -> Path:
    """Returns where the index is kept of shards in a folder that cannot be written, or at an address."""
    return cache_dir / "indexes" / hashlib.sha256(shown(folder).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _keep(folder: Path, known: Known) -> None:
    """Writes index.npz; where that fails, says so: the next start scans the shards again."""
    data = pack(known)
    try:
        replace_file(folder / INDEX_NAME, lambda partial: partial.write_bytes(data))
    except OSError as error:
        print(f"{folder / INDEX_NAME} cannot be written ({error.strerror or error})", file=sys.stderr, flush=True)
