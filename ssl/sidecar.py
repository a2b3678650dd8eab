"""`index.npz` beside the shards: what a scan of their headers found, so that it is made once."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from .entries import ShardEntries
from .tar_scan import Defect

INDEX_NAME = "index.npz"
LARGEST = 1 << 62  # so that sums of two do not overflow
VERSION = 2  # of the columns; another version is read as no index at all, and written anew

Stamp = tuple[str, int, int]  # file name, bytes, modification time in ns
Known = dict[Stamp, ShardEntries]


def pack(known: Known) -> bytes:
    """Returns the contents of an index.npz that describes these shards."""
    names, sizes, times = zip(*known, strict=True)
    entries = list(known.values())
    keys = "\n".join(key for e in entries for key in e.keys)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        version=np.array(VERSION),
        shard_name=_as_bytes(json.dumps(names)),
        shard_size=np.array(sizes, np.int64),
        shard_mtime_ns=np.array(times, np.int64),
        count=np.array([len(e.keys) for e in entries], np.int64),
        offset=np.concatenate([e.offset for e in entries]),
        size=np.concatenate([e.size for e in entries]),
        label=np.concatenate([e.label for e in entries]),
        keys=_as_bytes(keys),
        defects=_as_bytes(json.dumps([e.defects for e in entries])),
    )
    return buffer.getvalue()


def unpack(data: bytes) -> Known:
    """Returns what an index.npz describes; nothing when it is damaged, or of another version."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if sum(column.file_size for column in file.infolist()) > len(data):
                return {}  # `pack` compresses nothing; what unpacks to more than it is would fill the memory
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        return _from_columns(columns)
    except Exception:  # zip, its compressions and numpy's headers each raise errors of their own
        return {}


def read_sidecar(folder: Path) -> Known:
    """Returns what the index.npz of a folder describes; nothing when there is none, or a damaged one."""
    try:
        return unpack((folder / INDEX_NAME).read_bytes())
    except OSError:
        return {}


def _from_columns(columns: dict[str, np.ndarray]) -> Known:
    """Raises ValueError or one of its like when the columns do not fit each other."""
    if int(columns["version"]) != VERSION:
        return {}
    names = json.loads(_as_text(columns["shard_name"]))
    stamps = list(zip(names, columns["shard_size"].tolist(), columns["shard_mtime_ns"].tolist(), strict=True))
    bounds = np.concatenate([[0], np.cumsum(columns["count"])]).tolist()
    keys = _as_text(columns["keys"]).split("\n") if bounds[-1] else []
    defects = json.loads(_as_text(columns["defects"]))
    rows = [columns[name] for name in ("offset", "size", "label")]
    whole = all(x.dtype == np.int64 and x.shape == (bounds[-1],) for x in rows) and min(columns["count"]) >= 0
    if not whole or len(keys) != bounds[-1] or len(columns["count"]) != len(stamps) or len(defects) != len(stamps):
        raise ValueError("the columns have different lengths")
    if bounds[-1] and (min(rows[0].min(), rows[1].min()) < 0 or max(rows[0].max(), rows[1].max()) >= LARGEST):
        raise ValueError("an offset or a size is no number of bytes")
    found: Known = {}
    for i, stamp in enumerate(stamps):
        part = slice(bounds[i], bounds[i + 1])
        if part.stop > part.start and int((rows[0] + rows[1])[part].max()) > stamp[1]:
            raise ValueError("a sample lies outside its shard")
        listed = [Defect(int(offset), int(size), str(reason)) for offset, size, reason in defects[i]]
        found[stamp] = ShardEntries(rows[0][part], rows[1][part], rows[2][part], keys[part], listed)
    return found


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def _as_text(data: np.ndarray) -> str:
    return data.tobytes().decode("utf-8", "surrogateescape")
