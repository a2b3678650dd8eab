"""What happens to damaged and odd shards: one table, each row run from shards to batches as a training run does it.

A second table says how often damage to the bytes of a photograph is noticed, which depends on its format. Both stand in
docs/damage.md; `python tests/test_damage_table.py` prints them as markdown, from the runs themselves.
"""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quarterlight.ssl.augment import RandomCrop
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.decode import UnreadableImage, decode_image
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import class_names, open_index
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.order import ShuffledOrder
from quarterlight.ssl.spans import EvalSpans

PAGE = (Path(__file__).parents[1] / "docs" / "damage.md").read_text(encoding="utf-8").splitlines()
SHARDS, PER_SHARD = "abc", 8
BLOCK = 512
DAMAGED = "b.tar"  # the shard that is damaged, between two that are not
ALL = [f"{shard}{i}" for shard in SHARDS for i in range(PER_SHARD)]

Files = list[tuple[str | tarfile.TarInfo, bytes]]


def encoded(seed: int, format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (128, 96), **options) -> bytes:
    """A noisy picture, of about twenty blocks of a tar."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def files_of(shard: str) -> Files:
    found: Files = []
    for i in range(PER_SHARD):
        found += [(f"{shard}{i}.jpg", encoded(SHARDS.index(shard) * 100 + i)), (f"{shard}{i}.cls", b"%d" % (i % 4))]
    return found


def write(path: Path, files: Files, format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))


def member(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


# How a folder is damaged.

Damage = Callable[[Path], None]


def cut(where: Callable[[tarfile.TarInfo], int], name: str = "b4.jpg") -> Damage:
    """Cuts the shard at a place that is told from a file in it."""

    def damage(folder: Path) -> None:
        os.truncate(folder / DAMAGED, where(member(folder / DAMAGED, name)))

    return damage


def padded(found: tarfile.TarInfo) -> int:
    return found.offset_data + -(-found.size // BLOCK) * BLOCK


def overwrite(where: Callable[[tarfile.TarInfo], int], change: Callable[[bytes], bytes], size: int) -> Damage:
    """Changes some bytes of b3.jpg, its header or its data."""

    def damage(folder: Path) -> None:
        with (folder / DAMAGED).open("r+b") as file:
            at = where(member(folder / DAMAGED, "b3.jpg"))
            file.seek(at)
            before = file.read(size)
            file.seek(at)
            file.write(change(before))

    return damage


def zeros(where: Callable[[tarfile.TarInfo], int], size: int) -> Damage:
    return overwrite(where, lambda before: bytes(len(before)), size)


def flipped(before: bytes) -> bytes:
    """One bit of every 64th byte."""
    return bytes(x ^ 16 if i % 64 == 5 else x for i, x in enumerate(before))


def rewritten(change: Callable[[Files], Files], format: int = tarfile.GNU_FORMAT) -> Damage:
    """Writes the shard again from other files."""
    return lambda folder: write(folder / DAMAGED, change(files_of("b")), format)


def replaced(name: str, new_name: str | None, data: bytes | None = None) -> Damage:
    """Writes the shard again with one file that has another name, or other bytes."""

    def change(files: Files) -> Files:
        return [(new_name or old, old_data if data is None else data) if old == name else (old, old_data)
                for old, old_data in files]  # fmt: skip

    return rewritten(change)


def without(name: str) -> Damage:
    return rewritten(lambda files: [(old, data) for old, data in files if old != name])


def with_entry(name: str, kind: bytes, link: str = "") -> Damage:
    """Writes the shard again with an entry in the middle that is no regular file."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return rewritten(lambda files: [*files[:8], (entry, b""), *files[8:]])


def renamed(rename: Callable[[str], str], format: int = tarfile.GNU_FORMAT) -> Damage:
    return rewritten(lambda files: [(rename(str(name)), data) for name, data in files], format)


def contents(data: bytes | Callable[[bytes], bytes], name: str = DAMAGED) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return damage


def sparse(folder: Path) -> None:
    """GNU's old kind: a map in the header, and fewer bytes than the file has."""
    entry = tarfile.TarInfo("b9.jpg")
    entry.type, entry.size = tarfile.GNUTYPE_SPARSE, BLOCK
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = b"00000010000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = folder / DAMAGED
    at = member(path, "b4.jpg").offset
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes(block) + bytes(BLOCK) + data[at:])


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(40_001 * 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def mended_after(damage: Damage) -> Damage:
    """Damages it after its index was made."""

    def both(folder: Path) -> None:
        open_index(f"{folder}/*.tar")
        damage(folder)

    return both


def linked(target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / DAMAGED).rename(folder / "elsewhere")
        (folder / DAMAGED).symlink_to(folder / target)

    return damage


def as_folder(folder: Path) -> None:
    (folder / DAMAGED).unlink()
    (folder / DAMAGED).mkdir()


def index_of_others(folder: Path) -> None:
    """An index.npz of shards with the same names, copied from elsewhere."""
    other = folder / "other"
    other.mkdir()
    for shard in SHARDS:
        write(other / f"{shard}.tar", [("x.jpg", encoded(7))])
    open_index(f"{other}/*.tar")
    (other / "index.npz").rename(folder / "index.npz")


def replaced_shard(folder: Path) -> None:
    """By one of the same name with larger images in it."""
    files: Files = []
    for i in range(9):
        files += [(f"z{i}.jpg", encoded(500 + i, size=(200, 150))), (f"z{i}.cls", b"1")]
    write(folder / "new", files)
    (folder / "new").rename(folder / DAMAGED)


def replaced_by_the_like(folder: Path) -> None:
    """By one of the same name whose files lie at the same places, as raw pixels or small images of one size do."""
    files: Files = []
    for name, data in files_of("b"):
        other = encoded(900 + len(files), quality=60)
        files.append((name, data if str(name).endswith("cls") else other + bytes(len(data) - len(other))))
    write(folder / "new", files)
    (folder / "new").rename(folder / DAMAGED)


def touched(folder: Path) -> None:
    os.utime(folder / DAMAGED, ns=(1, 10**18))


@dataclass
class Case:
    """A damage and what is to come of it."""

    what: str
    damage: Damage
    lost: str = ""  # numbers of the samples of the damaged shard that cannot be used
    reported: str | None = None  # words in the report; None: any if samples are lost, else nothing is to be reported
    refused: str | None = None  # words in the sentence that refuses the shards
    unlabelled: str = ""  # numbers of the samples that have no label
    silent: bool = False  # nothing tells that there was more
    whole: bool = False  # the tar is whole, and told to lack images: no bytes are lost
    opened: bool = False  # the damage comes after the index is opened
    read: bool = False  # the damage comes after the shards are opened
    pattern: str = "*.tar"
    extra: list[str] = field(default_factory=list)  # keys of samples that are there in addition


E8, REST = "01234567", "4567"
LINK = "'b9.jpg' is a link, not followed"
NO_IMAGE = "no jpg, jpeg, png, webp inside"
AGAIN = "the shard was replaced after the run began: start it again"
DATASET = '{"classes": ["cat", "dog", "fox", "owl"]}'

CASES = [
    Case("nothing at all", lambda folder: None),
    # Cut short.
    Case("shard cut in a header", cut(lambda m: m.offset + 200), REST, "ends in the middle of a header"),
    Case("shard cut in half a header's worth of its name", cut(lambda m: m.offset + 3), REST, "middle of a header"),
    Case("shard cut in an image", cut(lambda m: m.offset_data + m.size // 2), REST, "ends in the middle of 'b4.jpg'"),
    Case("shard cut in the zeros after an image", cut(lambda m: m.offset_data + m.size + 1), "567", "", unlabelled="4"),
    Case("shard cut in a label", cut(lambda m: m.offset_data, "b4.cls"), "567", "'b4.cls'", unlabelled="4"),
    Case("shard cut between two samples", cut(lambda m: m.offset), REST, "cut off"),
    Case("shard cut after the last file: no end mark", cut(padded, "b7.cls"), "", "cut off"),
    Case("shard cut within its end mark", cut(lambda m: padded(m) + BLOCK, "b7.cls"), ""),
    Case("shard cut in its first header", cut(lambda m: 300, "b0.jpg"), refused="not a tar"),
    # Overwritten.
    Case("512 bytes zeroed: a header", zeros(lambda m: m.offset, 512), "3", "zeros where a header should be"),
    Case("512 bytes zeroed: in a JPEG of noise", zeros(lambda m: m.offset_data + 2048, 512), "3"),
    Case("4096 bytes zeroed: header and start of an image", zeros(lambda m: m.offset, 4096), "3", "header"),
    Case("4096 bytes zeroed: in a JPEG of noise", zeros(lambda m: m.offset_data + 1024, 4096), "3"),
    Case("a bit flipped in a header", overwrite(lambda m: m.offset + 100, flipped, 6), "3", "a damaged header"),
    Case(
        "a bit of every 64th byte flipped: in a JPEG of noise",
        overwrite(lambda m: m.offset_data + 1024, flipped, 4096),
        "3",
    ),
    Case("zeros to the end", overwrite(lambda m: m.offset, lambda x: bytes(len(x)), 1 << 20), "34567", "zeros"),
    # Files that are not what they are called.
    Case("a PNG called .jpg", replaced("b3.jpg", None, encoded(1, "PNG"))),
    Case("a TIFF called .jpg", replaced("b3.jpg", None, encoded(1, "TIFF"))),
    Case("a JPEG called .png", replaced("b3.jpg", "b3.png")),
    Case("an extension in capitals", replaced("b3.jpg", "b3.JPG")),
    Case("a text called .jpg", replaced("b3.jpg", None, b"Not found\n" * 20), "3", "not an image in a known format"),
    Case("a PDF called .jpg", replaced("b3.jpg", None, b"%PDF-1.4\n" * 20), "3", "not an image in a known format"),
    Case("an image file of no bytes", replaced("b3.jpg", None, b""), "3", "not an image in a known format (0 bytes)"),
    Case("an image cut short inside a whole tar", replaced("b3.jpg", None, encoded(3)[:2000]), "3"),
    Case("a JPEG without its end marker", replaced("b3.jpg", None, encoded(3)[:-2])),
    # Odd images.
    Case("a PNG of 40,000 x 40,000 pixels", replaced("b3.jpg", "b3.png", huge_png()), "3", "bomb"),
    Case("an image of 1 x 1 pixel", replaced("b3.jpg", None, encoded(3, size=(1, 1)))),
    Case("an image of 3000 x 1 pixels", replaced("b3.jpg", None, encoded(3, size=(3000, 1)))),
    Case("a JPEG in CMYK", replaced("b3.jpg", None, encoded(3, mode="CMYK"))),
    Case("a grey JPEG", replaced("b3.jpg", None, encoded(3, mode="L"))),
    Case("an animated GIF called .png", replaced("b3.jpg", "b3.png", animation())),
    # Labels.
    Case("a label is missing", without("b3.cls"), unlabelled="3"),
    Case("a label beyond 64 bits", replaced("b3.cls", None, b"9" * 30), "", "not a class number", unlabelled="3"),
    Case("a negative label", replaced("b3.cls", None, b"-2"), "", "not a class number", unlabelled="3"),
    Case("a text as a label", replaced("b3.cls", None, b"cat"), "", "not a class number", unlabelled="3"),
    Case("a label of no bytes", replaced("b3.cls", None, b""), "", "not a class number", unlabelled="3"),
    Case(
        "an image is missing: only its label is there", without("b3.jpg"), "3", "'b3' has .cls and no image", whole=True
    ),
    # Names and entries.
    Case(
        "a key twice",
        rewritten(lambda files: [*files, ("b3.jpg", encoded(3))]),
        "",
        "'b3.jpg' is there before",
        unlabelled="3",
        extra=["b3"],
    ),
    Case(
        "images first, all labels after them",
        rewritten(lambda files: files[::2] + files[1::2]),
        reported="'b0.cls' is apart from the other files of its sample, and 6 like it",
    ),
    Case("names that are not UTF-8", renamed(lambda name: name.replace("b", "b\udce9", 1))),
    Case("names of 300 characters (GNU)", renamed(lambda name: "x" * 290 + "/" + name)),
    Case("names of 300 characters (PAX)", renamed(lambda name: "x" * 290 + "/" + name, tarfile.PAX_FORMAT)),
    Case("names with ../", renamed(lambda name: f"../../{name}")),
    Case("absolute names", renamed(lambda name: f"/etc/{name}")),
    Case("an entry for a folder", with_entry("folder.jpg", tarfile.DIRTYPE)),
    Case("a symbolic link called .jpg", with_entry("b9.jpg", tarfile.SYMTYPE, "/etc/passwd"), "", LINK),
    Case("a hard link called .jpg", with_entry("b9.jpg", tarfile.LNKTYPE, "b0.jpg"), "", LINK),
    Case("a sparse file", sparse, "", "'b9.jpg' is a sparse file"),
    Case(
        "two tars joined",
        contents(lambda data: data + data),
        "",
        "'b0.jpg' is there before, and 7 like it",
        extra=[f"b{i}" for i in range(8)],
    ),
    # Whole shards.
    Case("a shard of no bytes", contents(b""), refused="not a tar (it is empty)"),
    Case("a tar without files", rewritten(lambda files: []), E8, "no file inside", whole=True),
    Case("a tar of texts only", rewritten(lambda files: files[1::2]), E8, NO_IMAGE, whole=True),
    Case("a web page in place of a tar", contents(b"<!DOCTYPE html><html>404</html>" * 50), refused="<!DOCTYPE html>"),
    Case(
        "a tar that is gzipped",
        contents(lambda data: gzip.compress(data, 0, mtime=0)),  # level 0: no two programs pack alike
        refused="not a tar (it begins with b'\\x1f\\x8b",
    ),
    Case("random bytes in place of a tar", contents(np.random.default_rng(0).bytes(20_000)), refused="not a tar"),
    Case("a folder called .tar", as_folder, refused="is a folder"),
    Case("a shard is missing", lambda f: (f / DAMAGED).unlink(), refused="does not exist", pattern="{a,b,c}.tar"),
    Case("a shard is a link", linked("elsewhere")),
    Case("a shard is a link to nothing", linked("nothing"), refused="a link to"),
    Case("no shard matches", lambda folder: None, refused="matches no file", pattern="none-*.tar"),
    # After the index was made.
    Case("shard cut after it was indexed, before the run", mended_after(cut(lambda m: m.offset)), REST, "cut off"),
    Case(
        "shard replaced before the run",
        mended_after(replaced_shard),
        E8,
        silent=True,
        extra=[f"z{i}" for i in range(9)],
    ),
    Case("shard replaced during the run", replaced_shard, E8, AGAIN, opened=True),
    Case("shard replaced during the run by one of the same sizes", replaced_by_the_like, E8, AGAIN, opened=True),
    Case("shard touched during the run", touched, E8, AGAIN, opened=True),
    Case("shard cut during the run", cut(lambda m: m.offset_data + 9), E8, AGAIN, opened=True),
    Case("shard deleted during the run", lambda f: (f / DAMAGED).unlink(), E8, "No such file", opened=True),
    # After the shard was opened, too.
    Case("shard replaced while it is read", replaced_shard, read=True),
    Case("shard deleted while it is read", lambda f: (f / DAMAGED).unlink(), read=True),
    Case("shard cut while it is read", cut(lambda m: m.offset_data + 9), REST, "was it replaced meanwhile", read=True),
    # What lies beside the shards.
    Case("index.npz cut", mended_after(contents(lambda data: data[: len(data) // 2], "index.npz"))),
    Case("index.npz of no bytes", contents(b"", "index.npz")),
    Case("index.npz of other shards of the same names", index_of_others),
    Case("index.npz is a pickle", contents(pickle.dumps({"version": 2}), "index.npz")),
    Case("index.npz is a folder", lambda folder: (folder / "index.npz").mkdir()),
    Case("index.npz: bits flipped", mended_after(contents(flipped, "index.npz"))),
    Case("dataset.json cut", contents(DATASET[:20].encode(), "dataset.json"), refused="dataset.json is no JSON"),
    Case("dataset.json is a list", contents(b"[1, 2]", "dataset.json"), refused="dataset.json is no JSON object"),
]


@dataclass
class Outcome:
    """What came of a folder of shards."""

    refused: str | None = None  # the sentence
    seen: list[str] = field(default_factory=list)  # keys in one epoch, of samples that were not replaced
    total: int = 0
    unlabelled: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    lost: int = 0  # as the index counts them

    def words(self, what: Case) -> str:
        """What happened, in a few words."""
        if self.refused is not None:
            return f"refused: `{self.refused}`"
        there = len(ALL) + len(what.extra)
        parts = ["all samples are used" if len(self.seen) == there else f"{len(self.seen)} of {there} samples are used"]
        parts += [f"{len(self.unlabelled)} without a label"] if self.unlabelled else []
        parts += [f"about {self.lost} counted as lost"] if self.lost else []
        parts += [f"{len(self.unreadable)} replaced and listed"] if self.unreadable else []
        return "; ".join([*parts, *(f"`{reason}`" for reason in self.reasons[:2])])


def run(case: Case, folder: Path, num_workers: int = 1) -> Outcome:
    """Writes the shards, damages them and reads one epoch as a run does."""
    for shard in SHARDS:
        write(folder / f"{shard}.tar", files_of(shard))
    index = open_index(f"{folder}/*.tar") if case.opened or case.read else None
    if index is not None and case.read:
        for first in range(0, len(index), PER_SHARD):
            index.read(first)
    case.damage(folder)
    try:
        index = index or open_index(f"{folder}/{case.pattern}")
        class_names(index)
        samples = Samples(
            index, ShuffledOrder(np.arange(len(index)), 0), RandomCrop((16, 16), (0.2, 1.0), (3 / 4, 4 / 3), 0.5), 0
        )
        spans = EvalSpans(len(index), batch_size=5, rank=0, world_size=1)
        batches = list(build_loader(samples, spans, num_workers=num_workers))
    except (InputError, OSError) as error:  # a command says either in one sentence
        return Outcome(refused=_plain(str(error), folder))
    bad = {(sample.shard, sample.key): sample.reason for batch in batches for sample in batch.bad}
    wanted = samples.order.ids(np.arange(len(index))).tolist()
    given = [key for batch in batches for key in batch.keys]
    seen = [index.key(i) for i, key in zip(wanted, given, strict=True) if (index.paths[index.shard[i]], key) not in bad]
    return Outcome(
        seen=sorted(key for key, i in zip(given, wanted, strict=True) if key == index.key(i)) if bad else sorted(seen),
        total=len(index),
        unlabelled=sorted({index.key(i) for i in np.flatnonzero(index.label < 0).tolist()}),
        unreadable=sorted(key for _, key in bad),
        reasons=list(dict.fromkeys(_plain(r, folder) for r in [*(d.reason for d in index.defects), *bad.values()])),
        lost=index.samples_lost(),
    )


def _plain(text: str, folder: Path) -> str:
    """The text without this run's folders."""
    return text.replace(f"{folder}/", "").replace(f" (seen from {Path.cwd()})", "")


def row(case: Case, outcome: Outcome) -> str:
    """A row of the first table."""
    return f"| {case.what} | {outcome.words(case).replace('|', chr(92) + '|')} |"


def base_name(key: str) -> str:
    """The key without folders and odd bytes: the sample that it was."""
    return key.rpartition("/")[2].replace("\udce9", "")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_damage_costs_its_own_samples_or_is_refused_in_one_sentence(tmp_path, case):
    outcome = run(case, tmp_path, num_workers=1 if case.refused is None else 0)
    assert row(case, outcome) in PAGE, "docs/damage.md is not what this file prints"
    if case.refused is not None:
        assert outcome.refused is not None and case.refused in outcome.refused
        assert "\n" not in outcome.refused
        assert any(name in outcome.refused for name in (DAMAGED, "none-*.tar", "dataset.json"))
        return
    assert outcome.refused is None
    lost = [f"b{i}" for i in case.lost]
    expected = sorted([key for key in ALL if key not in lost] + case.extra)
    assert sorted(map(base_name, outcome.seen)) == expected, "every good sample once"
    assert set(map(base_name, outcome.unreadable)) <= set(lost)
    assert {base_name(key) for key in outcome.unlabelled} == {f"b{i}" for i in case.unlabelled}
    if case.reported is not None:
        assert any(case.reported in reason for reason in outcome.reasons)
    elif not lost or case.silent:
        assert outcome.reasons == [] and outcome.lost == 0
    if case.opened:
        assert set(map(base_name, outcome.unreadable)) == set(lost) and len(outcome.reasons) == 1
    if case.whole or not lost:
        assert outcome.lost <= 1  # no end mark, or a file that holds no sample
    elif not case.silent:
        assert outcome.lost or set(map(base_name, outcome.unreadable)) == set(lost), "nothing is lost silently"
        assert outcome.lost <= 2 * len(lost)


# The bytes of a photograph.

PLACES = 40  # where it is damaged, one after the other
PHOTOS = {
    "PNG": ("PNG", {}),
    "JPEG": ("JPEG", {"quality": 90}),
    "progressive JPEG": ("JPEG", {"quality": 90, "progressive": True}),
    "WebP": ("WEBP", {"quality": 90}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "TIFF": ("TIFF", {}),
    "BMP": ("BMP", {}),
}
INJURIES: dict[str, Callable[[bytes, int], bytes]] = {
    "one bit flipped": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "64 bytes zeroed": lambda data, at: data[:at] + bytes(64) + data[at + 64 :],
    "512 bytes zeroed": lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
    "4096 bytes zeroed": lambda data, at: data[:at] + bytes(4096) + data[at + 4096 :],
    "cut short": lambda data, at: data[:at],
}


def photo(format: str, **options) -> bytes:
    """A smooth picture with a little noise, as cameras make."""
    y, x = np.mgrid[:256, :256]
    pixels = np.stack([128 + 100 * np.sin(x / 17), 128 + 90 * np.cos(y / 23), (x + y) / 2], -1)
    noise = np.random.default_rng(0).normal(0, 8, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(buffer, format, **options)
    return buffer.getvalue()


def noticed(name: str) -> dict[str, int]:
    """How often each kind of damage behind the header of a photograph is noticed, of PLACES."""
    format, options = PHOTOS[name]
    data = photo(format, **options)
    header = data.index(b"\xff\xda") + 20 if format == "JPEG" else 200
    places = np.random.default_rng(1).integers(header, len(data) - 5000, PLACES).tolist()
    found = dict.fromkeys(INJURIES, 0)
    for injury, injure in INJURIES.items():
        for at in places:
            try:
                decode_image(injure(data, at))
            except UnreadableImage:
                found[injury] += 1
    return found


def photo_row(name: str, found: dict[str, int]) -> str:
    """A row of the second table."""
    return f"| {name} | {' | '.join(map(str, found.values()))} |"


@pytest.mark.parametrize("name", PHOTOS)
def test_damage_to_a_photograph_is_noticed_as_often_as_the_page_says(name):
    found = noticed(name)
    assert photo_row(name, found) in PAGE, "docs/damage.md is not what this file prints"
    assert found["cut short"] == PLACES
    assert name != "PNG" or set(found.values()) == {PLACES}, "its checksums are compared"


def test_the_page_has_no_other_rows():
    rows = {line.split(" | ")[0].removeprefix("| ") for line in PAGE if line.startswith("| ")}
    assert rows == {"what", "photograph", *PHOTOS, *(case.what for case in CASES)}


def test_the_table_has_many_rows_and_each_its_own_words():
    assert len(CASES) >= 60 and len({case.what for case in CASES}) == len(CASES)


def main() -> None:
    print("| what | what happened |\n|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(row(case, run(case, Path(folder))), flush=True)
            except Exception as error:
                print(f"| {case.what} | crashed: `{_plain(repr(error), Path(folder))}` |", flush=True)
    print(f"\n| photograph | {' | '.join(INJURIES)} |\n|---{'|---' * len(INJURIES)}|")
    for name in PHOTOS:
        print(photo_row(name, noticed(name)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
