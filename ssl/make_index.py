"""index.npz made by a command: beside local shards, or for shards at an address, which are fetched once for it."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .addresses import folder_of, is_remote, shown
from .entries import ShardEntries, scan_shard
from .errors import InputError
from .files import replace_file
from .index_files import scan_remote
from .remote import read_remote, write_remote
from .shard_config import IndexConfig
from .shard_names import shard_paths, sources
from .sidecar import INDEX_NAME, Known, Stamp, pack, read_sidecar, unpack


def write_index(patterns: Sequence[str], config: IndexConfig) -> None:
    """Scans all shards that `patterns` name and writes an index.npz for each folder that they lie in.

    Raises InputError when a pattern matches nothing, a shard is no tar, or the index cannot be written.
    """
    paths = list(dict.fromkeys(path for source in sources(patterns) for path in shard_paths(source)))
    folders = list(dict.fromkeys(folder_of(path) for path in paths))
    if config.out is not None and len(folders) > 1:
        raise InputError(
            f"out {config.out} takes one index, and the shards lie in {len(folders)} folders: index each by itself"
        )
    out = _target(config.out) if config.out is not None else None
    for folder in folders:
        below = [path for path in paths if folder_of(path) == folder]
        if is_remote(folder):
            _index_address(folder, below, out)
        else:
            _index_folder(Path(folder), below, out)


def _target(out: str) -> Path:
    """Returns the file that `out`, a file or a folder, means. Raises InputError when it cannot be written."""
    path = Path(out).expanduser()
    file = path if path.suffix == ".npz" and not path.is_dir() else path / INDEX_NAME
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out {out} cannot be written ({error.strerror}): give another file or folder") from error
    return file


def _index_folder(folder: Path, paths: Sequence[str], out: Path | None) -> None:
    scanned: Known = {}
    for path in map(Path, paths):
        stat = path.stat()  # before the scan: a shard that changes meanwhile is scanned again on first use
        scanned[path.name, stat.st_size, stat.st_mtime_ns] = scan_shard(path)
    names = {stamp[0] for stamp in scanned}
    others = {s: e for s, e in read_sidecar(folder).items() if s[0] not in names and (folder / s[0]).exists()}
    _write(out or folder / INDEX_NAME, others | scanned)
    print(f"{out or folder / INDEX_NAME}: {_summary(scanned)}")


def _index_address(folder: str, paths: Sequence[str], out: Path | None) -> None:
    """Writes the index to the address; where that cannot be done, or `out` is given, to a local file."""
    beside = f"{folder}/{INDEX_NAME}"
    before: bytes | None = None
    with contextlib.suppress(InputError):  # some stores refuse access to what is not there
        before = read_remote(beside)
    scanned: Known = {}
    with tempfile.TemporaryDirectory(prefix="quarterlight-") as cache:
        for stamp, entries in _announced(scan_remote(paths, Path(cache)), paths):
            scanned[stamp] = entries
    names = {stamp[0] for stamp in scanned}
    known = {s: e for s, e in unpack(before or b"").items() if s[0] not in names} | scanned
    refusal = f"put it beside the shards, as {shown(beside)}"
    if out is None:
        try:
            write_remote(beside, pack(known))
            print(f"{shown(beside)}: {_summary(scanned)}")
            return
        except InputError as error:
            refusal = f"{refusal} ({error})"
    target = out or next(path for path in _free_names() if not path.exists())
    _write(target, known)
    print(f"{target}: {_summary(scanned)}; {refusal}")


def _announced(
    found: Iterable[tuple[Stamp, ShardEntries]], paths: Sequence[str]
) -> Iterator[tuple[Stamp, ShardEntries]]:
    for number, (stamp, entries) in enumerate(found, 1):
        name = shown(paths[number - 1]).rpartition("/")[2]
        print(f"{number}/{len(paths)} {name}: {len(entries.keys):,} samples, {stamp[1] / 1e6:,.1f} MB", flush=True)
        yield stamp, entries


def _free_names() -> Iterator[Path]:
    """Yields names in the current folder; an index of its own shards may lie there already."""
    yield Path(INDEX_NAME)
    yield from (Path(f"index-{number}.npz") for number in itertools.count(2))


def _write(file: Path, known: Known) -> None:
    data = pack(known)
    try:
        replace_file(file, lambda partial: partial.write_bytes(data))
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): give another place with --out") from error


def _summary(scanned: Known) -> str:
    samples = sum(len(entries.keys) for entries in scanned.values())
    lost = sum(bool(defect.size) for entries in scanned.values() for defect in entries.defects)
    damage = f", {lost} damaged parts (launch/shards.py verify lists them)" if lost else ""
    return f"{samples:,} samples in {len(scanned):,} shard{'s' * (len(scanned) != 1)}{damage}"
