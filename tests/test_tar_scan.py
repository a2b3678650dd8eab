"""The scan of tar headers against Python's tarfile, real tar programs, and archives damaged in every place."""

import functools
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarterlight.ssl.tar_scan import BLOCK, LONGEST_EXTENSION, NO_END_MARK, Defect, Member, scan_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def regular(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files:
            tar.addfile(regular(name, len(data)), io.BytesIO(data))
    return path


def seen_by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [Member(x.name, x.offset_data, x.size) for x in tar if x.isreg() and not x.issparse()]


def links_told(path: Path) -> list[Defect]:
    """What a scan is to say of the links in an archive: one defect, and no bytes are lost."""
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        links = [x for x in tar if x.issym() or x.islnk()]
    if not links:
        return []
    more = f", and {len(links) - 1} like it" if len(links) > 1 else ""
    return [Defect(-1, 0, f"{links[0].name!r} is a link, not followed{more}")]


def anywhere(defects: list[Defect]) -> list[Defect]:
    return [x._replace(offset=-1) for x in defects]


def with_checksum(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def covered(defects: list[Defect], offset: int) -> bool:
    return any(defect.offset <= offset < defect.offset + defect.size for defect in defects)


def odd_within(defects: list[Defect], touched: range) -> bool:
    """Is something said of these bytes, though none is called lost? Zeros may be the end of one of several archives."""
    return any(defect.offset in touched and not defect.size for defect in defects)


# What tarfile writes.

PART = st.text(st.sampled_from("abcXYZ019._- é漢😀\n\\'\"{}"), min_size=1, max_size=30)
LONG_PART = st.builds(lambda part, times: (part * times)[:240], PART, st.integers(1, 40))
PARTS = st.lists(PART | LONG_PART | st.just(".."), min_size=1, max_size=5)
NAME = st.builds(lambda parts, start: start + "/".join(parts), PARTS, st.sampled_from(["", "", "./", "/"]))
RAW_NAME = st.binary(min_size=1, max_size=150).map(lambda x: x.replace(b"\0", b"_").replace(b"/", b"_"))
TYPE = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.CONTTYPE, b"V", b"Z"])
WITHOUT_BYTES = st.sampled_from([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
SIZE = st.sampled_from([0, 1, 511, 512, 513, 1024, 10240]) | st.integers(0, 3000)


@st.composite
def entries(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes | None]:
    raw = draw(st.integers(0, 9)) == 0
    name = draw(RAW_NAME).decode("utf-8", "surrogateescape") if raw else draw(NAME)
    size = draw(SIZE)
    member = regular(name, size)
    if draw(st.integers(0, 3)) == 0:
        member.type, member.linkname = draw(WITHOUT_BYTES), draw(NAME)
        return member, None  # its size may say otherwise, as old programs write it for links
    member.type = draw(TYPE)
    member.mtime = draw(st.integers(0, 2**33) | st.floats(0, 2**33))
    if draw(st.booleans()):
        member.pax_headers = draw(st.dictionaries(st.sampled_from(["comment", "user.x", "LIBARCHIVE.y"]), PART))
    return member, draw(st.sampled_from([b"\0", b"x", b"ustar\0"])) * size


@pytest.mark.parametrize("format", FORMATS)
@EXAMPLES
@given(listed=st.lists(entries(), max_size=12))
def test_any_archive_is_read_as_tarfile_reads_it(tmp_path, format, listed):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=FORMATS[format], encoding="utf-8", errors="surrogateescape") as tar:
        for member, data in listed:
            try:
                member.tobuf(FORMATS[format], "utf-8", "surrogateescape")
            except ValueError:  # ustar has no room for a name or a number
                continue
            tar.addfile(member, None if data is None else io.BytesIO(data))
    members, defects = scan_tar(path)
    assert members == seen_by_tarfile(path)
    assert len(defects) == len(links_told(path)) and not any(x.size for x in defects)
    if format == "ustar":  # elsewhere the name of a link may stand in a header before it
        assert anywhere(defects) == links_told(path)


@EXAMPLES
@given(
    first=st.lists(st.tuples(NAME, SIZE), min_size=1, max_size=5),
    second=st.lists(st.tuples(NAME, SIZE), min_size=1, max_size=5),
    formats=st.tuples(*[st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])] * 2),
)
def test_archives_one_after_the_other_are_read_as_both(tmp_path, first, second, formats):
    paths = [
        write_tar(tmp_path / f"{i}.tar", [(name, b"x" * size) for name, size in files], format)
        for i, (files, format) in enumerate(zip((first, second), formats, strict=True))
    ]
    both = tmp_path / "both.tar"
    both.write_bytes(paths[0].read_bytes() + paths[1].read_bytes())
    start = paths[0].stat().st_size
    later = [Member(x.name, x.offset + start, x.size) for x in seen_by_tarfile(paths[1])]
    members, defects = scan_tar(both)
    assert members == seen_by_tarfile(paths[0]) + later
    assert not any(x.size for x in defects)


@pytest.mark.parametrize("format", FORMATS)
def test_an_archive_without_the_final_blocks_is_read_and_the_lack_reported(tmp_path, format):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.jpg", b"x" * 100 * i) for i in range(9)], FORMATS[format])
    bare = tmp_path / "bare.tar"
    last = seen_by_tarfile(whole)[-1]
    for end in (last.offset + last.size, -(-(last.offset + last.size) // BLOCK) * BLOCK):
        bare.write_bytes(whole.read_bytes()[:end])
        members, defects = scan_tar(bare)
        assert members == seen_by_tarfile(whole)
        assert defects == [Defect(end, 2 * BLOCK, NO_END_MARK)]


def test_an_empty_archive_holds_nothing_and_lacks_nothing(tmp_path):
    assert scan_tar(write_tar(tmp_path / "x.tar", [])) == ([], [])


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_file_of_more_than_8_gib_is_gone_past(tmp_path, format):
    path, size = tmp_path / "x.tar", 9 << 30
    with path.open("wb") as file:  # with holes: it takes a few blocks on the disk
        file.write(regular("big.bin", size).tobuf(FORMATS[format]))
        start = file.tell()
        file.seek(start + size)
        file.write(regular("small.jpg", 5).tobuf(FORMATS[format]) + b"image".ljust(BLOCK, b"\0") + bytes(1024))
    expected = [Member("big.bin", start, size), Member("small.jpg", start + size + BLOCK, 5)]
    assert scan_tar(path) == (expected, [])
    assert seen_by_tarfile(path) == expected


@pytest.mark.parametrize("size", [0, 1, 700, 5000])
def test_a_size_in_binary_is_read(tmp_path, size):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * size), ("b.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[:BLOCK] = with_checksum(data[:BLOCK])
    path.write_bytes(data)
    members, defects = scan_tar(path)
    assert members == seen_by_tarfile(path)
    assert [x.size for x in members] == [size, 1]
    assert not defects


def test_checksums_as_old_programs_wrote_them_are_right(tmp_path):
    name = "größe.jpg"  # bytes above 127: old programs added them as negative numbers
    path = write_tar(tmp_path / "x.tar", [(name, b"image"), ("b.jpg", b"y")])
    data = bytearray(path.read_bytes())
    block = data[:BLOCK]
    block[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(x - 256 if x > 127 else x for x in block)
    path.write_bytes(data)
    assert scan_tar(path) == (seen_by_tarfile(path), [])
    assert scan_tar(path)[0][0].name == name
    data[148:156] = data[148:154].lstrip(b"0").rjust(7) + b"\0"  # spaces before it, as in the first tars
    path.write_bytes(data)
    assert scan_tar(path) == (seen_by_tarfile(path), [])


def test_a_pax_size_counts_more_than_the_size_in_the_header(tmp_path):
    path = tmp_path / "x.tar"
    member = regular("a.jpg", 0)
    member.pax_headers = {"size": "700"}
    other = regular("b.jpg", 1).tobuf(tarfile.USTAR_FORMAT) + b"y".ljust(BLOCK, b"\0")
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + (b"x" * 700).ljust(2 * BLOCK, b"\0") + other + bytes(1024))
    members, defects = scan_tar(path)
    assert members == seen_by_tarfile(path)
    assert [x.size for x in members] == [700, 1]
    assert not defects


def test_global_pax_headers_and_long_links_change_no_name(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0123abc"}) as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "x" * 300
        tar.addfile(link)
        tar.addfile(regular("a.jpg", 0))
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        link.name = "y" * 300
        tar.addfile(link)
        tar.addfile(regular("b.jpg", 0))
    members, defects = scan_tar(path)
    assert members == seen_by_tarfile(path)
    assert [x.name for x in members] == ["a.jpg", "b.jpg"]
    assert anywhere(defects) == [Defect(-1, 0, "'link' is a link, not followed, and 1 like it")]


def test_one_link_is_told_by_its_name_and_place(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(regular("a.jpg", 1), io.BytesIO(b"a"))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    assert scan_tar(path) == (seen_by_tarfile(path), [Defect(1024, 0, "'b.jpg' is a link, not followed")])


@pytest.mark.parametrize("name", ["?", "who?.jpg", "n" * 96 + ".jpg", "p" * 80 + "/" + "n" * 96 + ".jpg"])
def test_the_first_file_may_have_a_name_that_fills_its_header(tmp_path, name):
    path = write_tar(tmp_path / "x.tar", [(name, b"a"), ("b.jpg", b"b")])
    assert scan_tar(path) == (seen_by_tarfile(path), [])
    assert scan_tar(path)[0][0].name == name


def test_a_tar_inside_a_tar_is_one_file(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", [("in.jpg", b"x" * 700)]).read_bytes()
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a"), ("inner.tar", inner), ("b.jpg", b"b")])
    assert [x.name for x in scan_tar(path)[0]] == ["a.jpg", "inner.tar", "b.jpg"]


def test_no_such_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        scan_tar(tmp_path / "none.tar")


# What tar programs write.

PROGRAMS = {
    **{f"gnu tar {x}": ["tar", "--sort=name", f"--format={x}"] for x in ("v7", "oldgnu", "gnu", "ustar", "pax")},
    "gnu tar of 1 MiB records": ["tar", "-b", "2048"],
    "gnu tar of blocks": ["tar", "-b", "1"],
    **{f"bsdtar {x}": ["bsdtar", f"--format={x}"] for x in ("v7tar", "gnutar", "ustar", "pax", "rpax")},
    "busybox": ["busybox", "tar"],
}
NEEDS_SHORT_NAMES = ("v7", "ustar", "v7tar")


@functools.cache
def has(program: str) -> bool:
    """Is it installed? "tar" is GNU tar here; that of BSD and macOS is bsdtar."""
    if shutil.which(program) is None:
        return False
    return program != "tar" or b"GNU" in subprocess.run([program, "--version"], capture_output=True).stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_tar_programs_pack_is_read_as_tarfile_reads_it(tmp_path, name):
    command = PROGRAMS[name]
    if not has(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    root = tmp_path / "in"
    long = "" if name.split()[-1] in NEEDS_SHORT_NAMES else "n" * 120
    for folder in ("train/cats", f"train/{long}größe 漢字"):
        (root / folder).mkdir(parents=True)
        for i in range(4):
            (root / folder / f"{long}{i}.jpg").write_bytes(bytes([i]) * 600 * i)
            (root / folder / f"{long}{i}.cls").write_text(f"{i}\n")
    (root / "train" / "hard.jpg").hardlink_to(root / "train" / "cats" / f"{long}1.jpg")
    (root / "train" / "soft.jpg").symlink_to(f"cats/{long}1.jpg")
    path = tmp_path / "x.tar"
    subprocess.run([*command, "-cf", path, "-C", root, "."], check=True)
    members, defects = scan_tar(path)
    assert members == seen_by_tarfile(path)
    assert len(members) in (16, 17)  # a second name of a file may be a link or a file
    assert len(defects) == len(links_told(path)) == 1 and "is a link, not followed" in defects[0].reason
    assert ("and 1 like it" in defects[0].reason) == (len(members) == 16)
    assert not defects[0].size
    data = path.read_bytes()
    for member in members:
        assert data[member.offset : member.offset + member.size] == (root / member.name).read_bytes()


@pytest.mark.skipif(not has("tar"), reason="GNU tar is not installed")
def test_appended_and_joined_archives_are_read(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * 700 * i)
    run = ["tar", "-C", tmp_path]
    subprocess.run([*run, "-cf", tmp_path / "x.tar", "0.jpg"], check=True)
    subprocess.run([*run, "-rf", tmp_path / "x.tar", "1.jpg"], check=True)
    subprocess.run([*run, "-cf", tmp_path / "y.tar", "2.jpg"], check=True)
    subprocess.run([*run, "-Af", tmp_path / "x.tar", tmp_path / "y.tar"], check=True)
    members, defects = scan_tar(tmp_path / "x.tar")
    assert members == seen_by_tarfile(tmp_path / "x.tar")
    assert [(x.name, x.size) for x in members] == [("0.jpg", 0), ("1.jpg", 700), ("2.jpg", 1400)]
    assert not any(x.size for x in defects)


SPARSE = {
    **{f"gnu tar {x}": ["tar", "--sort=name", "-S", f"--format={x}"] for x in ("gnu", "oldgnu", "pax")},
    **{f"gnu tar pax {x}": ["tar", "-S", "--format=pax", f"--sparse-version={x}"] for x in ("0.0", "0.1", "1.0")},
    "bsdtar pax": ["bsdtar", "--format=pax"],
}


@pytest.mark.parametrize("holes", [1, 40])
@pytest.mark.parametrize("folder", ["d", f"{'p' * 80}/{'q' * 70}", f"{'p' * 70}/{'q' * 70}/{'r' * 70}"], ids=range(3))
@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_file_is_reported_and_the_others_are_read(tmp_path, name, folder, holes):
    if not has(SPARSE[name][0]):
        pytest.skip(f"{SPARSE[name][0]} is not installed")
    root = tmp_path / "in" / folder
    root.mkdir(parents=True)
    with (root / "b.bin").open("wb") as file:
        for i in range(holes):
            file.seek((2 * i + 1) << 16)
            file.write(b"data" * 300)
    for image in ("a.jpg", "c.jpg"):
        (root / image).write_bytes(b"image of " + image.encode() * 200)
    subprocess.run([*SPARSE[name], "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    members, defects = scan_tar(tmp_path / "x.tar")
    assert members == seen_by_tarfile(tmp_path / "x.tar")
    assert {"a.jpg", "c.jpg"} <= {x.name.rpartition("/")[2] for x in members}
    assert ["sparse" in x.reason for x in defects] == [True] * (3 - len(members))  # some disks keep no holes


@pytest.mark.skipif(not has("tar"), reason="GNU tar is not installed")
def test_times_in_the_headers_of_an_incremental_archive_are_no_part_of_names(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "a.cls"):
        (tmp_path / "in" / name).write_text("1")
    subprocess.run(["tar", "--incremental", "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    assert sorted(x.name for x in scan_tar(tmp_path / "x.tar")[0]) == ["./a.cls", "./a.jpg"]


# Damage.

LONG = "l" * 130
FILES = [
    ("0.jpg", b"a" * 700),
    ("0.cls", b"0"),
    ("dir/1.jpg", b"b" * 1500),
    ("dir/1.cls", b""),
    (f"{LONG}/2.jpg", b"c" * 512),
    (f"{LONG}/2.cls", b"2"),
    ("größe.jpg", b"d" * 3000),
    ("größe.cls", b"3"),
    ("empty.txt", b""),
    (f"{LONG}/{LONG}4.txt", b""),
    ("4.jpg", b"\0" * 2000),
    ("5.jpg", b"e" * 9000),
    ("6.jpg", b"f"),
]


class Whole(NamedTuple):
    """An archive, before it is damaged."""

    data: bytes
    files: dict[Member, tuple[int, int]]  # from the first header of a file to the end of its bytes
    headers: list[int]  # those of long names, too
    long_names: list[int]  # the latter
    path: Path  # to write damaged copies to

    def scan(self, damaged: bytes) -> tuple[list[Member], list[Defect]]:
        self.path.write_bytes(damaged)
        return scan_tar(self.path)


@pytest.fixture(scope="module", params=FORMATS)
def whole(tmp_path_factory, request) -> Whole:
    path = tmp_path_factory.mktemp(request.param) / "x.tar"
    write_tar(path, [x for x in FILES if request.param != "ustar" or len(x[0]) < 200], FORMATS[request.param])
    data, files, headers, long_names = path.read_bytes(), {}, [], []
    with tarfile.open(path) as tar:
        for x in tar.getmembers():
            files[Member(x.name, x.offset_data, x.size)] = x.offset, x.offset_data + x.size
            headers += {x.offset: None, x.offset_data - BLOCK: None}
            long_names += [x.offset] if x.offset_data - BLOCK > x.offset else []
    assert bool(long_names) == (request.param != "ustar")
    return Whole(data, files, headers, long_names, path)


def check_damaged(whole: Whole, damaged: bytes, touched: range) -> list[Member]:
    """Scans and asserts what holds after any damage to headers: only touched files are lost, and all loss is listed.

    Zeros from a header to the end are an end like any other while they are no more than tars end with.
    """
    members, defects = whole.scan(damaged)
    if not damaged[touched.start :].strip(b"\0"):
        return members
    for member, (start, stop) in whole.files.items():
        if stop <= touched.start or start >= touched.stop:
            assert member in members
            assert not any(x.offset < stop and start < x.offset + x.size for x in defects)
        elif member not in members and start >= touched.start:
            assert covered(defects, start) or odd_within(defects, touched)
    for header in whole.headers:
        if header in touched or touched.start in range(header, header + BLOCK):
            intact = members == list(whole.files)
            assert intact or covered(defects, header) or odd_within(defects, touched)
    assert [x.offset for x in members] == sorted({x.offset for x in members})
    return members


DAMAGES: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "noise": (512, lambda old: b"\xa5" * len(old)),
    "text": (512, lambda old: (b"<!DOCTYPE html>\n" * 32)[: len(old)]),
    "inverted": (512, lambda old: bytes(x ^ 0xFF for x in old)),
    "zeros": (512, lambda old: bytes(len(old))),
    "a page of zeros": (4096, lambda old: bytes(len(old))),
    "a page of noise": (4096, lambda old: b"\x5a" * len(old)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_header_costs_its_own_file_only(whole, kind):
    size, change = DAMAGES[kind]
    for header in whole.headers:
        part = whole.data[header : header + size]
        damaged = whole.data[:header] + change(part) + whole.data[header + size :]
        check_damaged(whole, damaged, range(header, header + len(part)))


def test_a_flipped_bit_in_any_header_costs_its_own_file_only(whole):
    for number, header in enumerate(whole.headers):
        for at in {*range(number * 11 % 53, BLOCK, 53), 0, 124, 135, 148, 150, 155, 156, 257, 345, 511}:
            damaged = bytearray(whole.data)
            damaged[header + at] ^= 1 << (at + number) % 8
            check_damaged(whole, bytes(damaged), range(header + at, header + at + 1))


@pytest.mark.parametrize("kind", ["inverted", "zeros", "noise"])
def test_no_file_is_listed_under_a_wrong_name_when_its_long_name_is_lost(whole, kind):
    names, change = {x.name for x in whole.files}, DAMAGES[kind][1]
    for header in whole.long_names:
        damaged = whole.data[:header] + change(whole.data[header : header + BLOCK]) + whole.data[header + BLOCK :]
        members = check_damaged(whole, damaged, range(header, header + BLOCK))
        assert {x.name for x in members} <= names, header


def test_damaged_bytes_of_a_long_name_cost_its_own_file_only(whole):
    for header in whole.long_names:
        for at in range(header + BLOCK, header + 2 * BLOCK, 13):
            damaged = bytearray(whole.data)
            damaged[at] ^= 0x15
            members, _ = whole.scan(damaged)
            for member, (start, stop) in whole.files.items():
                assert member in members or start <= at < stop


def test_any_cut_keeps_the_files_before_it_and_reports_the_file_in_it(whole):
    end = max(stop for _, stop in whole.files.values())
    for size in sorted({*range(100, end, 100), *range(BLOCK, end, BLOCK)}):
        members, defects = whole.scan(whole.data[:size])
        assert members == [x for x, (_, stop) in whole.files.items() if stop <= size]
        cut = any(start < size < stop for start, stop in whole.files.values())
        last_header = max(x for x in whole.headers if x < size)
        if cut and last_header + BLOCK > size:
            assert defects == [Defect(last_header, size - last_header, "ends in the middle of a header")]
        elif cut and last_header not in whole.long_names:
            assert len(defects) == 1
            assert defects[0].offset + defects[0].size == size


def test_a_cut_inside_or_after_a_long_name_is_reported(whole):
    for header in whole.long_names:
        for size in (header + 512, header + 600, header + 950, header + 1024):
            assert len(whole.scan(whole.data[:size])[1]) == 1, size - header


def test_a_cut_in_the_final_zeros_costs_nothing(whole):
    end = max(stop for _, stop in whole.files.values())
    for size in range(-(-end // BLOCK) * BLOCK + 1, len(whole.data), 100):
        assert not any(x.size for x in whole.scan(whole.data[:size])[1]), size


def test_a_size_that_points_past_the_end_costs_one_file(whole):
    for header in whole.headers:
        for size in (
            b"00000777777\0",
            b"77777777777\0",
            b"\x80" + b"\xff" * 11,
            b"\x80" + (1 << 62).to_bytes(11, "big"),
        ):
            block = bytearray(whole.data[header : header + BLOCK])
            block[124:136] = size
            damaged = whole.data[:header] + with_checksum(block) + whole.data[header + BLOCK :]
            check_damaged(whole, damaged, range(header, header + BLOCK))


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" + b"\0" * 11, b"-0000000001\0", b"0x000000001\0", b"99999999999\0"]
)
def test_a_size_that_is_no_number_of_bytes_costs_one_file(whole, size):
    header = whole.headers[1]
    block = bytearray(whole.data[header : header + BLOCK])
    block[124:136] = size
    damaged = whole.data[:header] + with_checksum(block) + whole.data[header + BLOCK :]
    check_damaged(whole, damaged, range(header, header + BLOCK))


PAX_DAMAGES = [
    b"12 path=a.jp",  # no newline
    b"99999 path=a.jpg\n",  # longer than the header
    b"1 path=a.jpg\n",
    b"-5 path=a.jpg\n",
    b"path=a.jpg\n",
    b"14 path a.jpg\n",
    b"12 size=-70\n",
    b"12 size=0x7\n",
    b"0 size=0x70\n",
    b"%d size=%s\n" % (5011, b"9" * 5000),
    b"\0" * 30,
    b"",
]


@pytest.mark.parametrize("records", PAX_DAMAGES, ids=range(len(PAX_DAMAGES)))
def test_damaged_pax_records_cost_one_file_at_most(tmp_path, records):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(regular("a.jpg", 700), io.BytesIO(b"a" * 700))
        header = regular("PaxHeaders/b.jpg", len(records))
        header.type = tarfile.XHDTYPE
        tar.addfile(header, io.BytesIO(records))
        tar.addfile(regular("b.jpg", 700), io.BytesIO(b"b" * 700))
        tar.addfile(regular("c.jpg", 700), io.BytesIO(b"c" * 700))
    members, defects = scan_tar(path)
    assert [x.name for x in members] in (["a.jpg", "b.jpg", "c.jpg"], ["a.jpg", "c.jpg"])
    assert len(members) == 3 or len(defects) == 1


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_name_of_absurd_length_is_damage(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        header = regular("long", LONGEST_EXTENSION + 1)
        header.type = kind
        tar.addfile(header, io.BytesIO(b"n" * header.size))
        tar.addfile(regular("a.jpg", 1), io.BytesIO(b"a"))
        tar.addfile(regular("b.jpg", 1), io.BytesIO(b"b"))
    members, defects = scan_tar(path)
    assert [x.name for x in members] == ["b.jpg"]
    assert len(defects) == 1


def test_zeros_to_the_end_where_files_were_are_reported(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x" * 3000) for i in range(50)])
    data, members = path.read_bytes(), seen_by_tarfile(path)
    for size in (members[20].offset - BLOCK, members[20].offset + 1000, members[21].offset - BLOCK):
        path.write_bytes(data[:size] + bytes(len(data) - size))  # a download into a file made in full length before
        found, defects = scan_tar(path)
        assert found[:20] == members[:20]
        assert any(x.size for x in defects), size


def test_a_lost_file_gives_its_long_name_to_no_other(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{LONG}/a.txt", b""), ("b.jpg", b"data")], tarfile.PAX_FORMAT)
    data, header = path.read_bytes(), seen_by_tarfile(path)[0].offset - BLOCK
    path.write_bytes(data[:header] + bytes(BLOCK) + data[header + BLOCK :])
    members, defects = scan_tar(path)
    assert [x.name for x in members] == ["b.jpg"]
    assert covered(defects, header)


def test_a_damaged_header_before_a_tar_inside_a_tar_costs_no_other_file(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", [("in.jpg", b"x" * 700)]).read_bytes()
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"a"), ("inner.tar", inner), ("b.jpg", b"b")])
    data, header = bytearray(path.read_bytes()), seen_by_tarfile(path)[1].offset - BLOCK
    data[header] ^= 1
    path.write_bytes(data)
    members, defects = scan_tar(path)
    assert {"a.jpg", "b.jpg"} <= {x.name for x in members}
    assert covered(defects, header)


@EXAMPLES
@given(data=st.data())
def test_any_bytes_give_members_inside_the_file_and_no_error(tmp_path, data):
    files = data.draw(st.lists(st.tuples(NAME, SIZE), min_size=1, max_size=5))
    format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    path = write_tar(tmp_path / "x.tar", [(name, b"x" * size) for name, size in files], format)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(max_size=40) | st.integers(1, 3000).map(bytes))
        content[start : start + len(patch)] = patch
        if data.draw(st.booleans()):  # a header that is wrong and passes for right
            at = start // BLOCK * BLOCK
            content[at : at + BLOCK] = with_checksum(content[at : at + BLOCK].ljust(BLOCK, b"\0"))
    path.write_bytes(content)
    members, defects = scan_tar(path)
    inside = [*members, *(x for x in defects if x.reason != NO_END_MARK)]
    assert all(x.offset >= 0 and x.size >= 0 and x.offset + x.size <= len(content) for x in inside)
    assert [x.offset for x in members] == sorted({x.offset for x in members})
