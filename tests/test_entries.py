"""Which files of a tar are one sample, and its label, against webdataset as the independent reference."""

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from quarterlight.ssl.entries import IMAGE_EXTENSIONS, PICTURES, UNLABELLED, ShardEntries, group, scan_shard
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.tar_scan import Defect, Member

NO_IMAGE = "no jpg, jpeg, png, webp inside"
NOT_READ = "'{}' is not read{}: one image a sample, which ends in jpg, jpeg, png, webp"

Sample = tuple[str, bytes, int]  # key, bytes of the image, label


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def seen_by_webdataset(path: Path) -> list[Sample]:
    found = []
    with path.open("rb") as file:
        for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
            image = next((sample[x] for x in IMAGE_EXTENSIONS if x in sample), None)
            if image is None:  # ours reads what only ends like one, the first in the tar
                files = [x for x in sample if not x.startswith("__")]
                image = next((sample[x] for x in files if x.split(".")[-1] in IMAGE_EXTENSIONS), None)
            label = int(sample["cls"]) if "cls" in sample else json.loads(sample.get("json", b"{}")).get("label", -1)
            if image is not None:
                found.append((sample["__key__"], image, label))
    return found


def samples_of(path: Path, entries: ShardEntries) -> list[Sample]:
    data = path.read_bytes()
    where = zip(entries.keys, entries.offset.tolist(), entries.size.tolist(), entries.label.tolist(), strict=True)
    return [(key, data[offset : offset + size], label) for key, offset, size, label in where]


def seen_by_us(path: Path) -> list[Sample]:
    return samples_of(path, scan_shard(path))


def reasons(entries: ShardEntries) -> list[str]:
    assert not any(x.size for x in entries.defects)
    return [x.reason for x in entries.defects]


# What webdataset reads, too.

LONG = "a" * 90
NAMES = {
    "ustar": (tarfile.USTAR_FORMAT, [f"{LONG}/{LONG[:60]}{i}" for i in range(3)] + ["short"]),
    "gnu": (tarfile.GNU_FORMAT, [f"{LONG}/{LONG}/{LONG}{i}" for i in range(3)] + ["short", "größe/ü 漢字"]),
    "pax": (tarfile.PAX_FORMAT, [f"{LONG}/{LONG}/{LONG}{i}" for i in range(3)] + ["short", "größe/ü 漢字"]),
}


@pytest.mark.parametrize("flavor", NAMES)
def test_long_and_foreign_names_are_read_in_every_tar_flavor(tmp_path, flavor):
    format, keys = NAMES[flavor]
    files = [(f"{key}.{x}", b"%d" % i) for i, key in enumerate(keys) for x in ("cls", "jpg")]
    path = write_tar(tmp_path / "x.tar", files, format)
    assert seen_by_us(path) == seen_by_webdataset(path) == [(key, b"%d" % i, i) for i, key in enumerate(keys)]


def test_all_image_kinds_and_all_kinds_of_label_are_found(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("a.JPG", b"a"),
            ("a.cls", b" 12\n"),
            ("b.json", b'{"label": 3, "caption": "b"}'),
            ("b.png", b"b"),
            ("c.txt", b"a caption"),
            ("c.webp", b"c"),
            ("d.jpeg", b"d"),
            ("d.json", b'{"caption": "no label"}'),
            ("e.txt", b"no image"),
            ("F.PNG", b"f"),
            ("F.CLS", b"0"),
            ("g.WebP", b"g"),
            ("g.json", b'{"label": 2.0}'),
            ("h.JPEG", b"h"),
            ("h.json", b'{"label": -1}'),
        ],
    )
    found = [("a", 12), ("b", 3), ("c", UNLABELLED), ("d", UNLABELLED), ("F", 0), ("g", 2), ("h", UNLABELLED)]
    expected = [(key, key.lower().encode(), label) for key, label in found]
    assert seen_by_us(path) == seen_by_webdataset(path) == expected
    assert not scan_shard(path).defects


def test_files_that_webdataset_passes_over_do_not_cut_a_sample_in_two(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            ("._0.cls", b"apple"),
            ("0.cls", b"7"),
            ("._0.jpg", b"apple"),
            ("0.jpg", b"image"),
            ("d/1.cls", b"8"),
            ("README", b"no extension"),
            ("d/._1.jpg", b"apple"),
            ("d/1.jpg", b"other"),
        ],
    )
    assert seen_by_us(path) == [("0", b"image", 7), ("d/1", b"other", 8)]
    assert seen_by_webdataset(path)[0] == ("0", b"image", 7)  # in a folder, webdataset lets a dot file cut the sample
    assert not scan_shard(path).defects


def test_folders_and_links_in_a_tar_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        image = tarfile.TarInfo("d/0.jpg")
        image.size = 5
        tar.addfile(image, io.BytesIO(b"image"))
        link = tarfile.TarInfo("d/1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        tar.addfile(link)
    assert seen_by_us(path) == seen_by_webdataset(path) == [("d/0", b"image", UNLABELLED)]


@pytest.mark.parametrize(
    "key",
    ["../a", "/a", "//a", "./a", "../../etc/a", "a b", "d.e/a", "d/e.f/a", "漢字", "quo'te\"", "tab\ta", "-", "a\\b"],
)
def test_any_key_is_the_one_that_webdataset_reads(tmp_path, key):
    files = [(f"{key}.jpg", b"image"), (f"{key}.cls", b"3"), ("z.jpg", b"z"), ("z.cls", b"0")]
    path = write_tar(tmp_path / "x.tar", files, tarfile.GNU_FORMAT)
    assert seen_by_us(path) == seen_by_webdataset(path) == [(key, b"image", 3), ("z", b"z", 0)]


def test_the_extension_is_everything_after_the_first_dot(tmp_path):
    files = [("a.seg.png", b"2"), ("a.jpg", b"1"), ("a.cls", b"3"), ("b.v2.jpg", b"4"), ("b.cls", b"5")]
    path = write_tar(tmp_path / "x.tar", files)
    assert seen_by_us(path) == seen_by_webdataset(path) == [("a", b"1", 3), ("b", b"4", 5)]
    assert reasons(scan_shard(path)) == [NOT_READ.format("a.seg.png", "")]


@pytest.mark.parametrize(
    ("names", "image"),
    [
        (["v2.jpg"], "v2.jpg"),
        (["V2.JPG"], "V2.JPG"),
        (["seg.png"], "seg.png"),
        (["seg.png", "webp"], "webp"),
        (["seg.png", "v2.jpg"], "seg.png"),  # neither is better: the first in the tar
        (["png", "jpg"], "jpg"),
        (["a.b.c.jpeg"], "a.b.c.jpeg"),
        (["jpg.txt", "jpgx"], None),
    ],
)
def test_an_image_may_end_like_one_where_there_is_no_other(tmp_path, names, image):
    path = write_tar(tmp_path / "x.tar", [(f"d.e/cat.{name}", name.encode()) for name in names])
    entries = scan_shard(path)
    assert samples_of(path, entries) == ([("d.e/cat", image.encode(), -1)] if image else [])
    unread = [x for x in names if x != image and image]
    assert reasons(entries) == ([NOT_READ.format(f"d.e/cat.{unread[0]}", "")] if unread else [NO_IMAGE] * (not image))


@pytest.mark.parametrize("ending", PICTURES)
def test_pictures_that_are_not_read_are_told_and_no_others(tmp_path, ending):
    hidden = [f"._0{ending}", f"d/.1{ending}"]  # as macOS leaves them beside every file
    path = write_tar(tmp_path / "x.tar", [(x, b"x") for x in ["0.jpg", "0.cls", *hidden, "0.txt"]])
    assert reasons(scan_shard(path)) == ["label of 0.cls is b'x', not a class number"]
    more = [f"0.depth{ending}", f"0.SEG{ending.upper()}", f"1.x{ending}.json", "2.mp4"]
    path = write_tar(tmp_path / "y.tar", [(x, b"x") for x in ["0.jpg", *more]])
    entries = scan_shard(path)
    assert reasons(entries) == [NOT_READ.format(more[0], ", and 1 like it")]
    assert [x.offset for x in entries.defects] == [path.read_bytes().index(more[0].encode()) + 512]
    assert len(entries.keys) == 1


STEM = st.text(st.sampled_from("abZ09_- é漢"), min_size=1, max_size=6)
FOLDER = st.sampled_from(["", "", "d/", "d/e.f/", "./", "../", "größe/"])
EXTENSION = st.sampled_from(["jpg", "JPG", "jpeg", "png", "webp", "cls", "json", "txt", "seg.png", "mp4"])
CONTENT = {"cls": b"4", "json": b'{"label": 5}', "txt": b"a caption"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    samples=st.dictionaries(
        st.builds(str.__add__, FOLDER, STEM), st.lists(EXTENSION, min_size=1, unique_by=str.lower), max_size=8
    )
)
def test_what_lies_together_is_read_as_webdataset_reads_it(tmp_path, format, samples):
    files = [
        (f"{key}.{x}", CONTENT.get(x, f"{key}.{x}".encode())) for key, extensions in samples.items() for x in extensions
    ]
    path = write_tar(tmp_path / "x.tar", files, format)
    assert seen_by_us(path) == (seen_by_webdataset(path) if files else [])
    pictures = {k: [x for x in names if x.lower().endswith(IMAGE_EXTENSIONS)] for k, names in samples.items()}
    spare = sum(max(0, len(names) - 1) for names in pictures.values())
    found = reasons(scan_shard(path))
    bare = [k for k, names in samples.items() if not pictures[k] and {"cls", "json"} & set(names)]
    if not any(pictures.values()):
        assert found == [NO_IMAGE if files else "no file inside"]
    else:
        more = f", and {spare - 1} like it: one" if spare > 1 else "read: one"
        assert len(found) == (spare > 0) + bool(bare)
        assert not spare or (" is not read" in found[-1] and more in found[-1])
        assert not bare or repr(bare[0]) in found[0]
        assert not bare or (f", and {len(bare) - 1} like it" in found[0]) == (len(bare) > 1)


# What webdataset does not read as it is meant.


def test_labels_that_lie_apart_from_their_images_are_found_and_told(tmp_path):
    images = [(f"{i}.jpg", b"%d" % i) for i in range(20)]
    labels = [(f"{i}.cls", b"%d" % (i % 7)) for i in range(20)]
    expected = [(f"{i}", b"%d" % i, i % 7) for i in range(20)]
    entries = scan_shard(write_tar(tmp_path / "x.tar", images + labels))
    assert samples_of(tmp_path / "x.tar", entries) == expected
    assert reasons(entries) == ["'0.cls' is apart from the other files of its sample, and 18 like it"]
    assert sorted(seen_by_us(write_tar(tmp_path / "y.tar", labels + images))) == sorted(expected)


def test_files_in_any_order_give_the_same_samples(tmp_path):
    files = [(f"d{i % 3}/{i}.{x}", b"%d" % i) for i in range(30) for x in ("jpg", "cls", "txt")]
    random.Random(0).shuffle(files)
    path = write_tar(tmp_path / "x.tar", files)
    assert sorted(seen_by_us(path)) == sorted((f"d{i % 3}/{i}", b"%d" % i, i) for i in range(30))


def test_a_key_that_is_there_twice_is_two_samples_and_told(tmp_path):
    files = [("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2"), ("b.cls", b"2"), ("a.jpg", b"3"), ("a.cls", b"3")]
    entries = scan_shard(write_tar(tmp_path / "x.tar", files))
    assert samples_of(tmp_path / "x.tar", entries) == [("a", b"1", 1), ("b", b"2", 2), ("a", b"3", 3)]
    assert reasons(entries) == ["'a.jpg' is there before"]


def test_a_key_twice_in_a_row_is_two_samples_and_told(tmp_path):
    files = [("a.jpg", b"1"), ("a.cls", b"1"), ("a.JPG", b"3"), ("a.cls", b"3")]
    entries = scan_shard(write_tar(tmp_path / "x.tar", files))
    assert samples_of(tmp_path / "x.tar", entries) == [("a", b"1", 1), ("a", b"3", 3)]
    assert reasons(entries) == ["'a.JPG' is there before"]


def test_absolute_and_relative_names_are_two_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("/a.jpg", b"1"), ("/a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2")])
    assert seen_by_us(path) == [("/a", b"1", 1), ("a", b"2", 2)]


def test_newlines_in_names_become_spaces_in_keys(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("d\n/a\nb.jpg", b"1"), ("d\n/a\nb.cls", b"4")], tarfile.PAX_FORMAT)
    assert seen_by_us(path) == [("d /a b", b"1", 4)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_that_are_not_utf8_are_keys_with_the_same_bytes(tmp_path, format):
    name = b"caf\xe9 1".decode("utf-8", "surrogateescape")
    path = write_tar(tmp_path / "x.tar", [(f"{name}.jpg", b"1"), (f"{name}.cls", b"4")], format)
    assert seen_by_us(path) == [(name, b"1", 4)]


def test_files_of_an_img2dataset_shard_are_read_without_labels(tmp_path):
    files = []
    for i in range(3):
        about = {"url": "https://example.org/x", "caption": "2024", "key": f"{i:09d}", "status": "success", "width": 9}
        files += [(f"{i:09d}.jpg", b"%d" % i), (f"{i:09d}.json", json.dumps(about).encode()), (f"{i:09d}.txt", b"2024")]
    path = write_tar(tmp_path / "00000.tar", files)
    assert seen_by_us(path) == seen_by_webdataset(path) == [(f"{i:09d}", b"%d" % i, UNLABELLED) for i in range(3)]
    assert not scan_shard(path).defects


# Labels.


@pytest.mark.parametrize(
    ("field", "content", "label"),
    [
        ("cls", b"0", 0),
        ("cls", b" 12\r\n", 12),
        ("cls", b"007", 7),
        ("cls", b"-1", UNLABELLED),
        ("cls", b"9223372036854775807", 2**63 - 1),
        ("txt", b"5\n", 5),
        ("txt", b"a dog", UNLABELLED),
        ("txt", b"", UNLABELLED),
        ("txt", b"5 dogs", UNLABELLED),
        ("txt", b"\xff\xfe", UNLABELLED),
        ("txt", b"-5", UNLABELLED),
        ("json", b'{"label": 6}', 6),
        ("json", b'{"label": 6.0}', 6),
        ("json", b'{"label": "6"}', 6),
        ("json", b'\xef\xbb\xbf{"label": 6}', 6),
        ("json", '{"label": 6, "name": "größe"}'.encode("utf-16"), 6),
        ("json", b"{}", UNLABELLED),
        ("json", b'{"Label": 6}', UNLABELLED),
    ],
)
def test_a_label_is_read(tmp_path, field, content, label):
    entries = scan_shard(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (f"a.{field}", content)]))
    assert entries.label.tolist() == [label]
    assert not entries.defects


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("cls", b"cat"),
        ("cls", b""),
        ("cls", b"1.5"),
        ("cls", b"-2"),
        ("cls", b"1_0"),
        ("cls", b"\xff"),
        ("cls", b"9" * 30),
        ("cls", b"9" * 5000),
        ("cls", b"1 2"),
        ("txt", b"9" * 30),
        ("txt", b"9" * 5000),
        ("json", b'{"label": "cat"}'),
        ("json", b'{"label": null}'),
        ("json", b'{"label": 1.5}'),
        ("json", b'{"label": -2}'),
        ("json", b'{"label": Infinity}'),
        ("json", b'{"label": NaN}'),
        ("json", b'{"label": 1e400}'),
        ("json", b'{"label": [1]}'),
        ("json", b'{"label": {"label": 1}}'),
        ("json", b'{"label": 99999999999999999999}'),
        ("json", b'{"label": ' + b"9" * 5000 + b"}"),
        ("json", b"[1]"),
        ("json", b"1"),
        ("json", b"null"),
        ("json", b"{"),
        ("json", b""),
        ("json", b"\xff\xff"),
        ("json", b"[" * 100_000),
        ("json", b'{"a":' * 100_000),
    ],
    ids=range(30),
)
def test_a_label_that_is_no_class_number_leaves_the_sample_without_one(tmp_path, field, content):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (f"a.{field}", content), ("b.jpg", b"2"), ("b.cls", b"2")])
    entries = scan_shard(path)
    assert samples_of(path, entries) == [("a", b"1", UNLABELLED), ("b", b"2", 2)]
    (reason,) = reasons(entries)
    assert reason.startswith(f"label of a.{field} is {content[:40]!r}")


def test_a_class_file_counts_more_than_a_json_and_a_json_more_than_a_text(tmp_path):
    files = [("a.jpg", b""), ("a.txt", b"3"), ("a.json", b'{"label": 2}'), ("a.cls", b"1")]
    assert scan_shard(write_tar(tmp_path / "x.tar", files)).label.tolist() == [1]
    assert scan_shard(write_tar(tmp_path / "x.tar", files[:3])).label.tolist() == [2]
    assert scan_shard(write_tar(tmp_path / "x.tar", files[:2])).label.tolist() == [3]


def test_samples_without_a_label_among_labelled_ones_are_unlabelled(tmp_path):
    files = [("a.jpg", b"a"), ("b.jpg", b"b"), ("b.cls", b"1"), ("c.cls", b"2"), ("d.jpg", b"d")]
    path = write_tar(tmp_path / "x.tar", files)
    assert seen_by_us(path) == seen_by_webdataset(path) == [("a", b"a", -1), ("b", b"b", 1), ("d", b"d", -1)]


# Groups, by themselves.


def test_groups_keep_the_order_of_first_files_and_lower_extensions():
    names = ["b.JPG", "a.jpg", "b.cls", "README", ".hidden.jpg", "dot.", "a.TXT"]
    members = [Member(name, 512 * i, 1) for i, name in enumerate(names)]
    samples, odd = group(members)
    assert samples == [("b", {"jpg": members[0], "cls": members[2]}), ("a", {"jpg": members[1], "txt": members[6]})]
    assert [(x.offset, x.size) for x in odd] == [(members[2].offset, 0)]


def test_no_files_are_no_groups():
    assert group([]) == ([], [])


# No tar.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b" + b"\0" * 600,
        b"\0" * 100,
        b"\0" * 512 + b"x",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40,
        random.Random(0).randbytes(5000),
    ],
    ids=["nothing", "gzip", "zeros", "zeros and a byte", "page", "noise"],
)
def test_what_is_no_tar_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.tar: not a tar"):
        scan_shard(path)


def test_a_large_file_of_zeros_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(1 << 20))  # as downloads leave it that ask for the full length first
    with pytest.raises(InputError, match=r"x\.tar"):
        scan_shard(path)


@pytest.mark.parametrize("files", [[], [("a.txt", b"1"), ("a.cls", b"1")], [("a.png.gz", b"1")], [("README", b"1")]])
def test_a_tar_without_images_has_no_samples(tmp_path, files):
    entries = scan_shard(write_tar(tmp_path / "x.tar", files))
    assert entries.keys == []
    assert entries.defects == [Defect(0, 0, NO_IMAGE if files else "no file inside")]
    assert all(x.dtype == np.int64 and x.shape == (0,) for x in (entries.offset, entries.size, entries.label))


def test_labels_without_their_image_are_told(tmp_path):
    names = ["0.jpg", "0.cls", "1.cls", "1.txt", "2.jpg", "3.json", "4.cls", "5.mp4", "6.txt"]
    path = write_tar(tmp_path / "x.tar", [(name, b"1" if name.endswith("cls") else b"{}") for name in names])
    entries = scan_shard(path)
    assert entries.keys == ["0", "2"]
    place = path.read_bytes().index(b"1.cls") + 512
    assert entries.defects == [Defect(place, 0, "'1' has .cls, .txt and no image, and 2 like it")]


def test_damage_is_listed_beside_the_samples_that_are_left(tmp_path):
    files = [(f"{i}.{x}", b"%d " % i * 600) for i in range(4) for x in ("jpg", "txt")]
    path = write_tar(tmp_path / "x.tar", files)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmembers()[2].offset
    data[header : header + 512] = b"\xa5" * 512
    path.write_bytes(data)
    entries = scan_shard(path)
    assert entries.keys == ["0", "2", "3"]
    assert [(x.offset, x.size) for x in entries.defects] == [(header, 512 + 1536)]
