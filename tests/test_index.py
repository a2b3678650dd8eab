"""The index of many shards, its sidecar and its reads, against webdataset as the independent reference."""

import gc
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from quarterlight.ssl.entries import UNLABELLED, ShardEntries, scan_shard
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import OPEN_FILES, ShardIndex, class_names, open_index, refuse_damage
from quarterlight.ssl.sidecar import INDEX_NAME, VERSION

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")


def encoded(seed: int, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, count: int, *, samples_per_shard: int = 4) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/train-%06d.tar", maxcount=samples_per_shard, verbose=0) as writer:
        for i in range(count):
            writer.write({"__key__": f"{i:05d}", "jpg": encoded(i), "cls": i % 3})
    return sorted(folder.glob("*.tar"))


def seen_by_webdataset(*paths: Path) -> list[tuple[str, bytes, int]]:
    """Key, image bytes and label of every sample that webdataset reads and that holds an image."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False):
            image = next((sample[field] for field in IMAGE_FIELDS if field in sample), None)
            label = int(sample["cls"]) if "cls" in sample else json.loads(sample.get("json", b"{}")).get("label", -1)
            if image is not None:
                found.append((sample["__key__"], image, label))
        gc.collect()
    return found


def seen_by_us(*paths: Path) -> list[tuple[str, bytes, int]]:
    index = open_index([str(path) for path in paths])
    return [(index.key(i), index.read(i), int(index.label[i])) for i in range(len(index))]


def test_what_webdataset_writes_is_read_as_webdataset_reads_it(tmp_path):
    paths = write_shards(tmp_path, 11)
    assert len(paths) == 3
    assert seen_by_us(*paths) == seen_by_webdataset(*paths) == [(f"{i:05d}", encoded(i), i % 3) for i in range(11)]


def test_what_gnu_tar_packs_from_a_folder_is_read(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "in" / "sub" / f"{i}.jpg").write_bytes(encoded(i))
        (tmp_path / "in" / "sub" / f"{i}.cls").write_text(f"{i}\n")
    path = tmp_path / "x.tar"
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    assert seen_by_us(path) == seen_by_webdataset(path)
    assert [(label, data) for _, data, label in seen_by_us(path)] == [(i, encoded(i)) for i in range(4)]


def test_names_that_are_not_utf8_are_read_indexed_and_fingerprinted(tmp_path):
    path = tmp_path / "x.tar"
    name = b"caf\xe9 1.jpg".decode("utf-8", "surrogateescape")
    write_tar(path, [(name, encoded(0)), ("plain.jpg", encoded(1))], tarfile.GNU_FORMAT)
    first, again = open_index(str(path)), open_index(str(path))
    assert first.key(0) == again.key(0) == name.removesuffix(".jpg")
    assert first.fingerprint() == again.fingerprint()


def test_a_sample_is_found_under_one_numbering_over_all_shards(tmp_path):
    paths = write_shards(tmp_path, 10)
    index = open_index(str(tmp_path / "*.tar"))
    assert len(index) == 10
    assert index.paths == [str(path) for path in paths]
    assert index.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert [index.key(i) for i in (0, 3, 4, 9)] == ["00000", "00003", "00004", "00009"]


def test_a_shard_without_samples_among_others_is_no_harm(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", encoded(0))])
    write_tar(tmp_path / "b.tar", [])
    write_tar(tmp_path / "c.tar", [("1.jpg", encoded(1))])
    for _ in range(2):
        assert [x[0] for x in seen_by_us(*sorted(tmp_path.glob("*.tar")))] == ["0", "1"]


@pytest.fixture
def shards_of_one(tmp_path) -> ShardIndex:
    for i in range(30):
        write_tar(tmp_path / f"{i:02d}.tar", [("0.jpg", b"%d" % i)])
    return open_index(str(tmp_path / "*.tar"))


def test_more_shards_than_may_be_open_are_read(shards_of_one, monkeypatch):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > OPEN_FILES + 64
    monkeypatch.setattr("quarterlight.ssl.index.OPEN_FILES", 8)
    open_before = len(os.listdir("/proc/self/fd"))
    for i in [*range(30), *reversed(range(30)), 5, 29]:
        assert shards_of_one.read(i) == b"%d" % i
        assert len(os.listdir("/proc/self/fd")) - open_before <= 8
    assert len(os.listdir("/proc/self/fd")) - open_before == 8


def test_the_shard_that_was_read_longest_ago_is_closed(shards_of_one, monkeypatch):
    monkeypatch.setattr("quarterlight.ssl.index.OPEN_FILES", 3)
    opened, really = [], os.open

    def counted(path, *args, **kwargs) -> int:
        opened.append(Path(path).name)
        return really(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", counted)
    for i in (0, 1, 2, 0, 3, 0, 1):  # 3 takes the place of 1, and 1 that of 2
        assert shards_of_one.read(i) == b"%d" % i
    assert opened == ["00.tar", "01.tar", "02.tar", "03.tar", "01.tar"]


def test_an_index_travels_to_another_process_without_its_open_files(tmp_path):
    write_shards(tmp_path, 5)
    index = open_index(str(tmp_path / "*.tar"))
    index.read(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.fingerprint() == index.fingerprint()
    assert [copy.read(i) for i in range(5)] == [index.read(i) for i in range(5)]


# The patterns.


def test_sources_are_numbered_and_each_shard_is_there_once(tmp_path):
    paths = [str(path) for path in write_shards(tmp_path, 12)]
    index = open_index(f"{paths[2]}::{tmp_path}/train-*.tar")
    assert index.paths == [paths[2], *paths[:2]]
    assert index.source.tolist() == [0] * 4 + [1] * 8
    assert open_index([paths[2], f"{tmp_path}/train-00000{{0,1}}.tar"]).source.tolist() == index.source.tolist()
    assert open_index(f"{tmp_path}/*.tar").source.tolist() == [0] * 12


@pytest.mark.parametrize("name", ["none-*.tar", "none.tar", "{a,b}.tar"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path, name):
    write_shards(tmp_path, 1)
    with pytest.raises(InputError, match="none-|none.tar|a.tar"):
        open_index([str(tmp_path / "train-*.tar"), str(tmp_path / name)])


@pytest.mark.parametrize("patterns", ["", []])
def test_no_pattern_at_all_is_refused(patterns):
    with pytest.raises(InputError):
        open_index(patterns)


def test_an_address_without_a_cache_folder_is_refused():
    with pytest.raises(InputError, match="https://example.org/x.tar"):
        open_index("https://example.org/x.tar")


def test_the_shards_of_an_img2dataset_folder_are_read(tmp_path):
    for shard in range(2):
        about = [(f"{shard:05d}{i:04d}", {"caption": "a dog", "status": "success"}) for i in range(3)]
        files = [
            file
            for key, metadata in about
            for file in (
                (f"{key}.jpg", encoded(0)),
                (f"{key}.json", json.dumps(metadata).encode()),
                (f"{key}.txt", b"7"),
            )
        ]
        write_tar(tmp_path / f"{shard:05d}.tar", files)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 3}')
    index = open_index(f"{tmp_path}/{{00000..00001}}.tar")
    assert [index.key(i) for i in range(6)] == [f"0000{i // 3}000{i % 3}" for i in range(6)]
    assert index.label.tolist() == [UNLABELLED] * 6
    assert not index.defects


def test_the_split_of_timms_index_is_read(tmp_path):
    write_shards(tmp_path, 12)
    info = {"splits": {"train": {"filenames": "train-{000000..000001}.tar"}, "validation": {"filenames": []}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert len(open_index(f"{tmp_path}/_info.json:train")) == 8


# Damage.


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b" + b"\0" * 600, b"\0" * 100, b"<!DOCTYPE html><html>404 Not Found</html>" * 40]
)
def test_what_is_no_tar_is_refused_by_name(tmp_path, content):
    write_shards(tmp_path, 4)
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match="x.tar: not a tar"):
        open_index(str(tmp_path / "*.tar"))


def test_a_tar_without_images_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("a.cls", b"1")])
    with pytest.raises(InputError, match="x.tar.*no jpg"):
        open_index(str(path))


def damaged_shard(folder: Path, *, lost: range) -> tuple[Path, list[int]]:
    """Writes 12 images in a tar and damages the headers of some. Returns the tar and all offsets of headers."""
    path = write_tar(folder / "x.tar", [(f"{i:02d}.jpg", encoded(i)) for i in range(12)])
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    data = bytearray(path.read_bytes())
    for i in lost:
        data[headers[i] : headers[i] + 512] = b"\xa5" * 512
    path.write_bytes(data)
    return path, headers


def assert_damage(index: ShardIndex, path: Path, headers: list[int]) -> None:
    assert [index.key(i) for i in range(len(index))] == [f"{i:02d}" for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)]
    assert [index.read(i) for i in range(len(index))] == [encoded(i) for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)]
    assert [(x.shard, x.offset, x.size) for x in index.defects] == [(str(path), headers[3], headers[5] - headers[3])]


def test_damage_costs_its_own_samples_and_is_listed_from_scan_and_sidecar(tmp_path):
    path, headers = damaged_shard(tmp_path, lost=range(3, 5))
    for _ in range(2):
        index = open_index(str(path))
        assert_damage(index, path, headers)
        (line,) = index.describe_defects()
        assert line.startswith(str(path)) and str(headers[3]) in line and "bytes lost" in line


def test_the_number_of_lost_samples_is_estimated_from_lost_bytes(tmp_path):
    files = [(f"{i:02d}.jpg", b"x" * 10_000) for i in range(20)]
    path = write_tar(tmp_path / "x.tar", files)
    assert open_index(str(path)).samples_lost() == 0
    data = path.read_bytes()
    path.write_bytes(data[: 12 * 10_752 + 100])
    assert open_index(str(path)).samples_lost() == 1
    path.write_bytes(data[: 5 * 10_752] + b"\xa5" * 5 * 10_752 + data[10 * 10_752 :])
    os.utime(path, ns=(1, 10**18))
    assert open_index(str(path)).samples_lost() in (5, 6)


def test_many_defects_are_told_in_a_few_lines(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.{x}", b"cat") for i in range(10) for x in ("jpg", "cls")])
    index = open_index(str(path))
    assert len(index.defects) == 10
    lines = index.describe_defects()
    assert len(lines) == 4
    assert "7 more" in lines[-1]
    assert index.samples_lost() == 0


def test_an_evaluation_refuses_lost_bytes_and_nothing_else(tmp_path):
    path = write_tar(tmp_path / "odd.tar", [("0.jpg", b"x"), ("1.jpg", b"x"), ("0.cls", b"cat")])
    index = open_index(str(path))
    assert len(index.defects) == 2
    refuse_damage(index)
    path, headers = damaged_shard(tmp_path, lost=range(3, 4))
    with pytest.raises(InputError, match=f"x.tar.*byte {headers[3]}"):
        refuse_damage(open_index(str(path)))


@pytest.mark.parametrize(
    ("field", "content"), [("cls", b"cat"), ("cls", b""), ("json", b'{"label": null}'), ("json", b"{")]
)
def test_a_label_that_is_no_class_number_leaves_the_sample_without_one(tmp_path, field, content):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", encoded(0)), (f"a.{field}", content), ("b.jpg", encoded(1))])
    for _ in range(2):
        index = open_index(str(path))
        assert index.label.tolist() == [UNLABELLED, UNLABELLED]
        assert [x.size for x in index.defects] == [0]
        assert f"label of a.{field}" in index.describe_defects()[0]
        refuse_damage(index)


def test_a_shard_that_shrank_since_it_was_opened_is_an_oserror_where_it_ends(tmp_path):
    (path,) = write_shards(tmp_path, 4)
    index = open_index(str(path))
    assert index.read(1) == encoded(1)
    os.truncate(path, int(index.offset[3]) + 10)
    assert index.read(0) == encoded(0)
    with pytest.raises(OSError, match="bytes before the image does: was it replaced meanwhile"):
        index.read(3)


def renewed(path: Path) -> None:
    """Puts a shard of the same bytes in place of this one."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(1, path.stat().st_mtime_ns + 1))
    copy.rename(path)


CHANGES = {
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "touched": lambda path: os.utime(path, ns=(1, path.stat().st_mtime_ns + 1)),
    "older": lambda path: os.utime(path, ns=(1, path.stat().st_mtime_ns - 10**9)),
    "replaced": renewed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changed_since_it_was_indexed_is_an_oserror_when_it_is_opened(tmp_path, change):
    first, second = write_shards(tmp_path, 8)
    index = open_index([str(first), str(second)])
    CHANGES[change](second)
    sent = pickle.loads(pickle.dumps(index))  # as to a worker
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for read in (index.read, sent.read):
        assert [read(i) for i in range(4)] == [encoded(i) for i in range(4)]
        for i in range(4, 8):
            with pytest.raises(OSError, match="the shard was replaced after the run began: start it again"):
                read(i)
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 2, "one open file for each index"
    assert open_index([str(first), str(second)]).read(4) == encoded(4), "a new run takes it as it is"


@pytest.mark.parametrize("change", ["replaced", "touched", "longer"])
def test_a_shard_that_is_open_goes_on_being_read_when_another_takes_its_place(tmp_path, change):
    (path,) = write_shards(tmp_path, 4)
    index = open_index(str(path))
    assert index.read(0) == encoded(0)
    CHANGES[change](path)
    assert [index.read(i) for i in range(4)] == [encoded(i) for i in range(4)]
    with pytest.raises(OSError, match="start it again"):
        pickle.loads(pickle.dumps(index)).read(0)


# The sidecar.


def test_the_sidecar_gives_the_same_index_as_the_scan(tmp_path):
    write_shards(tmp_path, 11)
    scanned, read = open_index(str(tmp_path / "*.tar")), open_index(str(tmp_path / "*.tar"))
    for name in ("offset", "size", "label", "shard"):
        assert np.array_equal(getattr(scanned, name), getattr(read, name)), name
    assert [scanned.key(i) for i in range(11)] == [read.key(i) for i in range(11)]
    assert scanned.fingerprint() == read.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar") == [INDEX_NAME]


def test_a_second_opening_reads_and_writes_no_tar_and_no_sidecar(tmp_path):
    paths = write_shards(tmp_path, 8)
    open_index(str(tmp_path / "*.tar"))
    written_at = (tmp_path / INDEX_NAME).stat().st_mtime_ns
    stat = paths[0].stat()
    paths[0].write_bytes(b"\xa5" * stat.st_size)
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(open_index(str(tmp_path / "*.tar"))) == 8
    assert (tmp_path / INDEX_NAME).stat().st_mtime_ns == written_at


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip" * 100, b"\0" * 3000])
def test_a_sidecar_of_garbage_is_rebuilt(tmp_path, content):
    write_shards(tmp_path, 8)
    expected = open_index(str(tmp_path / "*.tar")).fingerprint()
    good = (tmp_path / INDEX_NAME).read_bytes()
    (tmp_path / INDEX_NAME).write_bytes(content)
    assert open_index(str(tmp_path / "*.tar")).fingerprint() == expected
    assert len((tmp_path / INDEX_NAME).read_bytes()) == len(good)


def test_a_half_written_sidecar_is_rebuilt(tmp_path):
    write_shards(tmp_path, 8)
    pattern, sidecar = str(tmp_path / "*.tar"), tmp_path / INDEX_NAME
    expected = open_index(pattern).fingerprint()
    good = sidecar.read_bytes()
    for size in range(1, len(good), len(good) // 40):
        sidecar.write_bytes(good[:size])
        assert open_index(pattern).fingerprint() == expected
        assert len(sidecar.read_bytes()) == len(good)


def test_a_flipped_byte_anywhere_in_the_sidecar_changes_nothing(tmp_path):
    write_shards(tmp_path, 8)
    pattern, sidecar = str(tmp_path / "*.tar"), tmp_path / INDEX_NAME
    expected = open_index(pattern).fingerprint()
    good = sidecar.read_bytes()
    directory = good.index(b"PK\x01\x02")
    for at in [*range(0, len(good), 97), *range(directory, directory + 46, 3)]:
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        sidecar.write_bytes(damaged)
        assert open_index(pattern).fingerprint() == expected, at


def test_a_sidecar_of_another_program_is_rebuilt(tmp_path):
    write_shards(tmp_path, 8)
    expected = open_index(str(tmp_path / "*.tar")).fingerprint()
    np.savez(tmp_path / INDEX_NAME, something=np.arange(3))
    assert open_index(str(tmp_path / "*.tar")).fingerprint() == expected


@pytest.mark.parametrize("version", [None, VERSION - 1, VERSION + 1])
def test_a_sidecar_of_another_version_is_rebuilt(tmp_path, version):
    write_shards(tmp_path, 8)
    expected = open_index(str(tmp_path / "*.tar")).fingerprint()
    with np.load(tmp_path / INDEX_NAME) as file:
        columns = {name: file[name] for name in file.files if name != "version"} | {"label": file["label"] + 1}
    np.savez(tmp_path / INDEX_NAME, **columns, **({} if version is None else {"version": np.array(version)}))
    assert open_index(str(tmp_path / "*.tar")).fingerprint() == expected
    with np.load(tmp_path / INDEX_NAME) as file:
        assert file["version"] == VERSION


def test_only_a_changed_shard_is_scanned_again(tmp_path):
    paths = write_shards(tmp_path, 12)
    open_index(str(tmp_path / "*.tar"))
    untouched = paths[0].stat()
    paths[0].write_bytes(b"\xa5" * untouched.st_size)
    os.utime(paths[0], ns=(untouched.st_atime_ns, untouched.st_mtime_ns))
    write_tar(paths[1], [("new.jpg", encoded(77)), ("new.cls", b"5")])
    index = open_index(str(tmp_path / "*.tar"))
    assert [index.key(i) for i in range(len(index))] == [f"{i:05d}" for i in (0, 1, 2, 3)] + [
        "new",
        *(f"{i:05d}" for i in (8, 9, 10, 11)),
    ]
    assert index.read(4) == encoded(77)
    assert index.label[4] == 5


def test_a_shard_of_the_same_size_and_another_time_is_scanned_again(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", encoded(0)), ("0.cls", b"1")])
    assert seen_by_us(path)[0][2] == 1
    size = path.stat().st_size
    write_tar(path, [("0.jpg", encoded(0)), ("0.cls", b"2")])
    os.utime(path, ns=(1, 10**18))
    assert path.stat().st_size == size
    assert seen_by_us(path)[0][2] == 2


def test_added_and_removed_shards_are_noticed(tmp_path):
    paths = write_shards(tmp_path, 8)
    assert len(open_index(str(tmp_path / "*.tar"))) == 8
    write_tar(tmp_path / "train-000009.tar", [("new.jpg", encoded(0))])
    assert len(open_index(str(tmp_path / "*.tar"))) == 9
    paths[0].unlink()
    assert len(open_index(str(tmp_path / "*.tar"))) == 5


def test_one_sidecar_serves_train_and_val_patterns(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("0.jpg", encoded(0))])
    write_tar(tmp_path / "val-0.tar", [("1.jpg", encoded(1))])
    for _ in range(2):
        assert [open_index(str(tmp_path / f"{split}-*.tar")).key(0) for split in ("train", "val")] == ["0", "1"]


def test_shards_in_several_folders_have_an_index_each(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", [(f"{name}.jpg", encoded(0))])
    for _ in range(2):
        index = open_index([str(tmp_path / "b" / "*.tar"), str(tmp_path / "a" / "*.tar")])
        assert [index.key(0), index.key(1)] == ["b", "a"]
    assert (tmp_path / "a" / INDEX_NAME).exists() and (tmp_path / "b" / INDEX_NAME).exists()


READ_AS_NOBODY = """
import os, sys
from quarterlight.ssl.index import open_index
writable, *read_only = sys.argv[1:]
for _ in range(2):  # loads what is loaded on first use, while this user may still read Python's own files
    open_index(writable)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for folder in read_only:
    print(len(open_index(folder)), os.access(os.path.dirname(folder), os.W_OK))
"""


def test_a_read_only_folder_works_with_and_without_a_sidecar(tmp_path):
    write_shards(tmp_path, 1)
    with tempfile.TemporaryDirectory() as name:  # below tmp_path nobody else may look
        Path(name).chmod(0o755)
        folders = [Path(name, sidecar) for sidecar in ("present", "absent", "stale")]
        for folder in folders:
            paths = write_shards(folder, 8)
            if folder.name != "absent":
                open_index(str(folder / "*.tar"))
            if folder.name == "stale":
                os.utime(paths[0], ns=(1, 10**18))
        before = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        for folder in folders:
            folder.chmod(0o555)
        patterns = [str(folder / "*.tar") for folder in (tmp_path, *folders)]
        done = subprocess.run(
            [sys.executable, "-c", READ_AS_NOBODY, *patterns], capture_output=True, text=True, cwd="/"
        )
        for folder in folders:
            folder.chmod(0o755)
        assert done.stdout.split() == ["8", "False"] * 3, done.stderr
        assert [sorted(path.name for path in folder.iterdir()) for folder in folders] == before


@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
def test_shards_in_a_read_only_folder_keep_their_index_in_the_cache(tmp_path, monkeypatch, changed):
    paths = write_shards(tmp_path / "shards", 8)
    access, scanned = os.access, []

    def counted(path: Path) -> ShardEntries:
        scanned.append(path.name)
        return scan_shard(path)

    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK) and access(path, mode))  # root may always
    monkeypatch.setattr("quarterlight.ssl.index_files.scan_shard", counted)
    first = open_index(str(tmp_path / "shards" / "*.tar"), cache_dir=tmp_path / "cache")
    assert scanned == [path.name for path in paths]
    assert not (tmp_path / "shards" / INDEX_NAME).exists()
    assert len(list((tmp_path / "cache" / "indexes").glob(f"*/{INDEX_NAME}"))) == 1
    scanned.clear()
    if changed:
        os.utime(paths[1], ns=(1, 10**18))
    for _ in range(2):
        again = open_index(str(tmp_path / "shards" / "*.tar"), cache_dir=tmp_path / "cache")
        assert again.fingerprint() == first.fingerprint()
    assert scanned == ([paths[1].name] if changed else [])
    monkeypatch.undo()
    open_index(str(tmp_path / "shards" / "*.tar"), cache_dir=tmp_path / "cache")
    assert (tmp_path / "shards" / INDEX_NAME).exists(), "where it may be written it stands beside the shards"


def test_an_index_that_cannot_be_written_is_told_and_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path, 5)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("quarterlight.ssl.index_files.replace_file", full)
        assert len(open_index(str(tmp_path / "*.tar"))) == 5
    file = tmp_path / INDEX_NAME
    assert capsys.readouterr().err == f"{file} cannot be written (No space left on device)\n"
    file.mkdir()
    assert len(open_index(str(tmp_path / "*.tar"))) == 5
    said = capsys.readouterr().err
    assert said.startswith(f"{file} cannot be written (") and len(said.splitlines()) == 1
    file.rmdir()
    assert len(open_index(str(tmp_path / "*.tar"))) == 5 and not capsys.readouterr().err


def test_the_fingerprint_is_the_same_wherever_the_shards_lie(tmp_path):
    fingerprints = []
    for name in "ab":
        write_shards(tmp_path / name, 6)
        fingerprints.append(open_index(str(tmp_path / name / "*.tar")).fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_the_fingerprint_of_known_samples_is_the_one_of_earlier_runs(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.{x}", b"%d" % i) for i in range(5) for x in ("cls", "jpg")])
    assert open_index(str(path)).fingerprint() == "ce3eb49f0fe65a9b"


def test_the_fingerprint_tells_keys_labels_sizes_and_the_order_of_shards_apart(tmp_path):
    variants = {
        "as it is": [("0.cls", b"1"), ("0.jpg", b"xy")],
        "key": [("1.cls", b"1"), ("1.jpg", b"xy")],
        "label": [("0.cls", b"2"), ("0.jpg", b"xy")],
        "size": [("0.cls", b"1"), ("0.jpg", b"xyz")],
    }
    fingerprints = []
    for name, files in variants.items():
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", files)
        write_tar(tmp_path / name / "b.tar", [("9.cls", b"1"), ("9.jpg", b"xy")])
        fingerprints.append(open_index(str(tmp_path / name / "{a,b}.tar")).fingerprint())
    fingerprints.append(open_index(str(tmp_path / "as it is" / "{b,a}.tar")).fingerprint())
    assert len(set(fingerprints)) == 5


def test_class_names_come_from_the_file_beside_the_shards(tmp_path):
    write_shards(tmp_path, 1)
    index = open_index(str(tmp_path / "*.tar"))
    assert class_names(index) is None
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert class_names(index) == ["cat", "dog"]


def test_a_shard_with_fewer_samples_than_dataset_json_lists_is_reported_with_its_bytes(tmp_path):
    paths = write_shards(tmp_path, 8)
    with tarfile.open(paths[0]) as tar:
        cut = tar.getmembers()[4].offset  # between two samples: nothing in the tar shows how much is missing
    listed = [{"name": path.name, "samples": 4, "bytes": path.stat().st_size} for path in paths]
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": listed}}}))
    assert not open_index(str(tmp_path / "*.tar")).defects
    os.truncate(paths[0], cut)
    index = open_index(str(tmp_path / "*.tar"))
    assert len(index) == 6
    assert "2 samples are there, and dataset.json lists 4" in [defect.reason for defect in index.defects]
    assert sum(defect.size for defect in index.defects) >= listed[0]["bytes"] - cut
    with pytest.raises(InputError, match=r"train-000000\.tar: .*an evaluation must count every image"):
        refuse_damage(index)
