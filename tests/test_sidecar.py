"""index.npz: what is packed comes back, and whatever else is in the file is no index at all."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterlight.ssl.entries import ShardEntries
from quarterlight.ssl.sidecar import INDEX_NAME, VERSION, Known, pack, read_sidecar, unpack
from quarterlight.ssl.tar_scan import Defect

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def entries(keys: list[str], defects: list[Defect] | None = None) -> ShardEntries:
    numbers = np.arange(len(keys), dtype=np.int64)
    return ShardEntries(512 + 1024 * numbers, 100 + numbers, numbers % 3 - 1, keys, defects or [])


DEFECTS = [Defect(1024, 512, "a damaged header"), Defect(2048, 0, "label of 'größe' is b'\\xff', not a class number")]
KNOWN: Known = {
    ("train-000000.tar", 20480, 1_700_000_000_123_456_789): entries(["a", "größe/b", "c d"], DEFECTS),
    ("empty.tar", 10240, 5): entries([]),
    ("caf\udce9.tar", 10240, 5): entries(["raw \udcff key"]),
}


def plain(known: Known) -> dict[tuple[str, int, int], tuple[Any, ...]]:
    return {
        stamp: (e.offset.tolist(), e.size.tolist(), e.label.tolist(), e.keys, e.defects) for stamp, e in known.items()
    }


def columns_of(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as file:
        return {name: file[name] for name in file.files}


def packed(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


def with_entry(name: str, content: bytes, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """A good index in which one column's file holds something else, under a right checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pack(KNOWN))) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for each in old.namelist():
            new.writestr(each, content if each == name else old.read(each))
    return buffer.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


# What is packed.


def test_what_is_packed_comes_back():
    back = unpack(pack(KNOWN))
    assert plain(back) == plain(KNOWN)
    assert list(back) == list(KNOWN)
    for e in back.values():
        assert e.offset.dtype == e.size.dtype == e.label.dtype == np.int64
        assert all(isinstance(x, Defect) for x in e.defects)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1, max_size=20)
RAW = st.binary(min_size=1, max_size=9).map(lambda x: x.replace(b"\n", b"").decode("utf-8", "surrogateescape") + "k")
NUMBER = st.integers(0, 2**63 - 1)
SHARD = st.tuples(st.lists(TEXT | RAW, max_size=5), st.lists(st.builds(Defect, NUMBER, NUMBER, TEXT), max_size=3))


@EXAMPLES
@given(st.dictionaries(st.tuples(TEXT | RAW, st.integers(10_000, 2**63 - 1), NUMBER), SHARD, min_size=1, max_size=4))
def test_any_shards_come_back(shards):
    known = {stamp: entries(keys, defects) for stamp, (keys, defects) in shards.items()}
    assert plain(unpack(pack(known))) == plain(known)


def test_the_index_holds_no_pickle():
    assert all(not column.dtype.hasobject for column in columns_of(pack(KNOWN)).values())


def test_an_index_is_read_from_its_folder(tmp_path):
    assert read_sidecar(tmp_path) == {}
    (tmp_path / INDEX_NAME).write_bytes(pack(KNOWN))
    assert plain(read_sidecar(tmp_path)) == plain(KNOWN)
    assert read_sidecar(tmp_path / "none") == {}
    (tmp_path / "folder" / INDEX_NAME).mkdir(parents=True)
    assert read_sidecar(tmp_path / "folder") == {}


# Damage.


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"not a zip" * 100, b"\0" * 3000])
def test_garbage_is_no_index(content):
    assert unpack(content) == {}


def test_a_cut_index_is_none():
    good = pack(KNOWN)
    for size in range(0, len(good), 7):
        assert unpack(good[:size]) == {}


@pytest.mark.parametrize(
    "patch", [b"\0", b"\xff", b"\x0e\0", b"\xa5" * 64, b"\0" * 512], ids=lambda x: f"{len(x)} {x[:1]}"
)
def test_an_index_overwritten_anywhere_is_the_same_or_none(patch):
    good = pack(KNOWN)
    for at in range(0, len(good), 3):
        damaged = good[:at] + patch + good[at + len(patch) :]
        back = unpack(damaged)
        assert not back or plain(back) == plain(KNOWN), at


def test_a_flipped_bit_anywhere_gives_the_same_or_none():
    good = pack(KNOWN)
    for at in range(0, len(good), 2):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        back = unpack(bytes(damaged))
        assert not back or plain(back) == plain(KNOWN), at


def test_a_large_index_said_to_be_compressed_in_any_way_is_none():
    count = 20_000
    good = pack({("x.tar", 10**9, 6): entries([f"{i}" for i in range(count)])})
    for method in range(100):
        at = good.index(b"PK\x01\x02")
        while at >= 0:
            damaged = bytearray(good)
            damaged[at + 10] = method
            assert len(unpack(bytes(damaged))) == (method == 0)
            at = good.find(b"PK\x01\x02", at + 1) if method in (0, 8, 12, 14) else -1


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=30)), min_size=1, max_size=4))
def test_any_patches_give_the_same_or_none(patches):
    data = bytearray(pack(KNOWN))
    for at, patch in patches:
        data[at % len(data) : at % len(data) + len(patch)] = patch
    back = unpack(bytes(data))
    assert not back or plain(back) == plain(KNOWN)


# Columns that do not fit.

Columns = dict[str, np.ndarray]


def changed(*names: str, to: Callable[[np.ndarray], np.ndarray]) -> dict[str, Callable[[Columns], object]]:
    return {name: lambda columns, name=name: columns.update({name: to(columns[name])}) for name in names}


DEFECTS_JSON = [
    "null",
    "3",
    "{}",
    '"abc"',
    "[[], [], null]",
    "[[], [], [1]]",
    "[[], [], [[1, 2]]]",
    "[[], [], [[1, 2, 3, 4]]]",
    '[[], [], [["x", 1, "y"]]]',
    "[[], [], [[1, null, 1]]]",
    "[[], [], [[1, Infinity, 1]]]",
    "[[], [], [[1, 1e999, 2]]]",
    '{"0": [], "1": [], "2": []}',
    '[[], [], [[1, 9%s, "x"]]]' % ("9" * 5000),
    "[" * 100_000,
    "",
    "\xff",
]
CHANGES = {
    "an older version": lambda c: c.update(version=np.array(VERSION - 1)),
    "a newer version": lambda c: c.update(version=np.array(VERSION + 1)),
    "no version, as the first indexes had": lambda c: c.pop("version"),
    "a version of words": lambda c: c.update(version=np.array("two")),
    "many versions": lambda c: c.update(version=np.full(3, VERSION)),
    "a complex version": lambda c: c.update(version=np.array(2 + 0j)),
    "a record as version": lambda c: c.update(version=np.zeros((), "i8,i8")),
    "an infinite version": lambda c: c.update(version=np.array(np.inf)),
    "stamps in a table": lambda c: c.update(shard_size=c["shard_size"][:, None]),
    "counts that overflow": lambda c: c.update(count=np.array([2**62] * 3)),
    "a name too few": lambda c: c.update(shard_name=np.frombuffer(b"a.tar\nb.tar", np.uint8)),
    "a key too few": lambda c: c.update(keys=c["keys"][:1]),
    "a key too many": lambda c: c.update(keys=np.append(c["keys"], np.frombuffer(b"\nx", np.uint8))),
    **{f"no {name}": lambda c, name=name: c.pop(name) for name in columns_of(pack(KNOWN))},
    **{f"defects {x[:30]}": lambda c, x=x: c.update(defects=np.frombuffer(x.encode(), np.uint8)) for x in DEFECTS_JSON},
}
NUMBERS = ("shard_size", "shard_mtime_ns", "count", "offset", "size", "label")
for what, (names, to) in {
    "short": ((*NUMBERS, "defects"), lambda x: x[:-1]),
    "long": (NUMBERS, lambda x: np.append(x, 7)),
    "int32": (("offset", "size", "label"), lambda x: x.astype(np.int32)),
    "float": (("offset", "size", "label", "count"), lambda x: x / 2),
    "text": (("offset", "size", "label", "count"), lambda x: x.astype("U")),
    "date": (("offset", "size", "label", "count"), lambda x: x.astype("M8[s]")),
    "table": (("offset", "size", "label"), lambda x: x[:, None]),
    "single": (NUMBERS, lambda x: x[0]),
    "negative": (("offset", "size", "count"), lambda x: -1 - x),
}.items():
    CHANGES |= {f"{name} {what}": change for name, change in changed(*names, to=to).items()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=[name[:40] for name in CHANGES])
def test_columns_that_do_not_fit_are_no_index(change):
    columns = columns_of(pack(KNOWN))
    change(columns)
    assert unpack(packed(columns)) == {}


@pytest.mark.parametrize("name", columns_of(pack(KNOWN)))
def test_a_column_of_pickled_objects_is_refused_unread(name):
    columns = columns_of(pack(KNOWN))
    columns[name] = np.array([_Bomb()], object)
    assert unpack(packed(columns)) == {}


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return pytest.exit, ("a pickle was read",)


def test_another_numpy_file_is_no_index():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    assert unpack(buffer.getvalue()) == {}
    assert unpack(packed({"something": np.arange(3)})) == {}


@pytest.mark.parametrize("name", ["version", "keys", "defects", "shard_name", "count", "offset"])
@pytest.mark.parametrize(
    "content", [b"", b"2", b"[[],[],[]]", b"\x93NUM", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff{"]
)
def test_a_column_that_is_no_array_is_no_index(name, content):
    assert unpack(with_entry(f"{name}.npy", content)) == {}


@pytest.mark.filterwarnings("ignore:Reading:UserWarning", "ignore:Data type alias:DeprecationWarning")
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (",
        "'''",
        "((((((",
        "  x\n y",
        "{" * 60 + "}" * 50,
        "{'descr': '<i8,,', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1L,), }",
        "{'descr': 'a8', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '|S0', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999999999,), }",
        "{'descr': '<V2147483647', 'fortran_order': False, 'shape': (2147483647,), }",
    ],
    ids=range(14),
)
def test_a_column_with_a_strange_header_is_no_index(header):
    assert unpack(with_entry("offset.npy", npy(header))) == {}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_index_is_none(method):
    good = with_entry("none", b"", method=method)
    assert plain(unpack(good)) == plain(KNOWN)
    for at in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        back = unpack(bytes(damaged))
        assert not back or plain(back) == plain(KNOWN), at


def test_samples_outside_their_shard_are_no_index():
    for offset, size in ((20480, 100), (20000, 1000), (2**62, 2**62), (512, 2**63 - 1)):
        columns = columns_of(pack(KNOWN))
        columns["offset"][1], columns["size"][1] = offset, size
        assert unpack(packed(columns)) == {}


def test_defects_are_json():
    text = columns_of(pack(KNOWN))["defects"].tobytes().decode()
    assert json.loads(text) == [[list(x) for x in DEFECTS], [], []]
