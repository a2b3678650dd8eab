"""Do damaged shards and indexes ever cost more than themselves? Feeds mutated ones to the readers for some minutes.

python benchmarks/fuzz_shards.py --minutes 10 --keep failures

Mutates tars of all flavors (as tarfile and the tar programs that are installed write them) and index.npz files: flipped
and overwritten bytes, moved, repeated and lost blocks, cuts, headers with extreme numbers and right checksums, random
PAX records and long names, columns with other values. Each is read in this process, under limits on memory and time;
every exception but InputError (and OSError when a sample is read) is a crash. Prints what was found and, as its last
line, one JSON object. Linux only.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np

from quarterlight.ssl.entries import scan_shard
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index
from quarterlight.ssl.sidecar import INDEX_NAME, unpack
from quarterlight.ssl.tar_scan import NO_END_MARK, scan_tar

BLOCK = 512
MEMORY = 4 << 30  # bytes above what the process uses at its start
LONGEST_S = 10
KEPT_OF_A_KIND = 3
LARGE = 16 << 20  # bytes of the largest tars
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -1, -(2**31), -(2**63)]
SIZES = [
    b"77777777777\0",
    b"00000000000\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b" " * 12,
    b"-1".ljust(12),
    b"\x80" * 12,
]
TYPES = b"01234567xgXLKSVDMNAZ\0"
RECORDS = [
    b"path",
    b"size",
    b"linkpath",
    b"GNU.sparse.map",
    b"GNU.sparse.size",
    b"hdrcharset",
    b"comment",
    b"mtime",
    b"",
    b"=",
]
VALUES = [
    b"",
    b"0",
    b"-1",
    b"9" * 30,
    b"9" * 5000,
    b"1e5",
    b"a.jpg",
    b"../" * 200 + b"a.jpg",
    b"\xff.jpg",
    b"\n.jpg",
    b"x" * 3000,
]
VALUES += [b"/", b".", b"a/.jpg", b"\0.jpg", b"BINARY", b"0x10", b"1_0", b" 7 "]


class TookTooLong(BaseException):
    """A case went on for longer than LONGEST_S."""


# What is mutated.


def write_tar(path: Path, format: int, rng: random.Random) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(rng.randint(1, 12)):
            key = rng.choice([f"{i:05d}", f"{'long' * 40}/{i}", f"größe/{i}", f"train/{i}"])
            contents = {"jpg": rng.randbytes(rng.choice([0, 100, 512, 5000])), "cls": b"%d" % i, "txt": b"a dog"}
            contents["json"] = json.dumps({"label": i, "caption": "x" * rng.randint(0, 900)}).encode()
            for extension in rng.sample(sorted(contents), rng.randint(1, 4)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(contents[extension])
                try:
                    tar.addfile(member, io.BytesIO(contents[extension]))
                except ValueError:  # ustar has no room for the name
                    continue


def write_with_programs(folder: Path) -> None:
    """Packs some files with the tar programs that are installed."""
    root = folder / "in"
    for sub in ("a", "b" * 90 + "/" + "c" * 90):
        (root / sub).mkdir(parents=True)
        for i in range(3):
            (root / sub / f"{i}.jpg").write_bytes(bytes([65 + i]) * 700 * i)
            (root / sub / f"{i}.cls").write_text(f"{i}\n")
    with (root / "a" / "sparse.jpg").open("wb") as file:
        for i in range(1, 30):
            file.seek(i << 14)
            file.write(b"data" * 100)
    (root / "a" / "hard.jpg").hardlink_to(root / "a" / "1.jpg")
    (root / "a" / "soft.jpg").symlink_to("1.jpg")
    commands = [["tar", f"--format={x}"] for x in ("v7", "oldgnu", "gnu", "ustar", "pax")]
    commands += [["tar", "-S", f"--format={x}"] for x in ("gnu", "pax")] + [["tar", "-G"], ["busybox", "tar"]]
    commands += [["bsdtar", f"--format={x}"] for x in ("ustar", "pax", "gnutar", "cpio")]
    for number, command in enumerate(commands):
        if shutil.which(command[0]):
            path = folder / f"program-{number:02d}.tar"
            subprocess.run([*command, "-cf", path, "-C", root, "."], stderr=subprocess.DEVNULL)
    shutil.rmtree(root)


def make_corpus(folder: Path, rng: random.Random) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """Returns the contents of tars, and of some of them the index, too."""
    for number, format in enumerate([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT] * 8):
        write_tar(folder / f"tarfile-{number:02d}.tar", format, rng)
    write_with_programs(folder)
    tars = [path.read_bytes() for path in sorted(folder.glob("*.tar"))]
    pairs = []
    for path in sorted(folder.glob("tarfile-*.tar")):
        try:
            open_index(str(path))
        except InputError:  # no image in it
            continue
        pairs.append((path.read_bytes(), (folder / INDEX_NAME).read_bytes()))
        (folder / INDEX_NAME).unlink()
    return tars, pairs


# Mutations of bytes: each changes `data` in place.


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 2, 10, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice([1, 2, 8, 100, 512, 4096])
    data[at : at + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(1, len(data)) :]


def lose(data: bytearray, rng: random.Random) -> None:
    unit = rng.choice([1, BLOCK])
    at = rng.randrange(len(data)) // unit * unit
    del data[at : at + unit * rng.choice([1, 1, 2, 5])]


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data)) // BLOCK * BLOCK
    part = bytes(data[at : at + BLOCK * rng.choice([1, 2, 3, 8])])
    often = LARGE // max(1, len(part)) if rng.randrange(300) == 0 else rng.choice([1, 2, 50])
    data[at:at] = part * often


def swap(data: bytearray, rng: random.Random) -> None:
    count = max(1, len(data) // BLOCK)
    one, two = (rng.randrange(count) * BLOCK for _ in range(2))
    data[one : one + BLOCK], data[two : two + BLOCK] = data[two : two + BLOCK], data[one : one + BLOCK]


def patch_number(data: bytearray, rng: random.Random) -> None:
    at, size = rng.randrange(len(data)), rng.choice([1, 2, 4, 8])
    data[at : at + size] = (rng.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, rng.choice(["little", "big"]))


def pad(data: bytearray, rng: random.Random) -> None:
    data += rng.choice([b"\0", b"x"]) * rng.choice([1, 511, 512, 10240, 1 << 20])


# Mutations of headers, which keep their checksums right.


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header_at(data: bytearray, rng: random.Random) -> int:
    """Returns the offset of a header, or of any block when none is found."""
    found = [at for at in range(0, min(len(data), 1 << 18), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    return rng.choice(found) if found else rng.randrange(len(data)) // BLOCK * BLOCK


def change_header(data: bytearray, rng: random.Random) -> None:
    at = header_at(data, rng)
    block = data[at : at + BLOCK].ljust(BLOCK, b"\0")
    for _ in range(rng.randint(1, 3)):
        field = rng.randrange(5)
        if field == 0:
            block[124:136] = rng.choice([*SIZES, b"%011o\0" % rng.randrange(1 << 22)])
        elif field == 1:
            block[156] = rng.choice(TYPES)
        elif field == 2:
            block[: rng.randint(1, 100)] = b""
            block = block.rjust(BLOCK, rng.choice([b"a", b"/", b".", b"\xff"]))
        elif field == 3:
            block[345:500] = rng.choice([b"p", b"/", b"\xff", b"\0"]) * 155
        else:
            block[rng.choice([100, 108, 116, 136, 257, 265, 329, 482, 504])] = rng.randrange(256)
    data[at : at + BLOCK] = with_checksum(block)


def insert_extension(data: bytearray, rng: random.Random) -> None:
    """Puts a PAX header or a GNU long name before a file."""
    if rng.randrange(3):
        records = b""
        for _ in range(rng.randint(0, 4)):
            record = b" %s=%s\n" % (rng.choice(RECORDS), rng.choice([*VALUES, rng.randbytes(20)]))
            length = next(n for n in itertools.count(len(record)) if n == len(record) + len(str(n)))
            records += b"%d" % (length + rng.choice([0] * 8 + [1, -1, 999])) + record
        kind, content = rng.choice([tarfile.XHDTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE]), records
    else:
        kind, content = rng.choice([tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]), rng.choice(VALUES)
    header = tarfile.TarInfo("extension")
    header.type, header.size = kind, max(0, len(content) + rng.choice([0] * 8 + [1, -1, 600, 1 << 21]))
    at = header_at(data, rng)
    padded = content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")
    data[at:at] = header.tobuf(tarfile.USTAR_FORMAT) + padded


def insert_other(data: bytearray, rng: random.Random, tars: list[bytes]) -> None:
    at = rng.randrange(len(data) + 1) // BLOCK * BLOCK
    other = rng.choice(tars)
    start = rng.randrange(len(other)) // BLOCK * BLOCK
    data[at:at] = other[start : start + BLOCK * rng.choice([1, 4, 20, 1000])]


def change_columns(data: bytearray, rng: random.Random) -> None:
    """Changes values, lengths and types of an index's columns; the file itself stays right."""
    with np.load(io.BytesIO(bytes(data))) as file:
        columns = {name: file[name] for name in file.files}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(columns))
        column = np.atleast_1d(columns[name]).copy()
        what = rng.randrange(6)
        if what <= 2 and column.size and column.dtype.kind in "iu":
            info = np.iinfo(column.dtype)
            value = rng.choice([*EXTREMES, rng.randrange(30_000)])
            column.flat[rng.randrange(column.size)] = min(info.max, max(info.min, value))
        elif what == 3:
            column = column[: rng.randrange(column.size + 1)]
        elif what == 4:
            column = column.astype(rng.choice(["i4", "u8", "f8", "U", "S3", "M8[s]", "?", "c16"]))
        else:
            column = rng.choice(
                [column[:, None], np.append(column, column), column.reshape(())[()] if column.size == 1 else column]
            )
        columns[name] = column
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    data[:] = buffer.getvalue()


ON_BYTES = [flip, overwrite, cut, lose, repeat, swap, patch_number, pad]
ON_TARS = [*ON_BYTES, change_header, change_header, insert_extension, insert_extension]


def mutated_tar(tars: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(tars))
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        if not data:
            break
        if rng.randrange(10) == 0:
            insert_other(data, rng, tars)
        else:
            rng.choice(ON_TARS)(data, rng)
    return bytes(data[: 2 * LARGE])


def mutated_index(index: bytes, rng: random.Random) -> bytes:
    data = bytearray(index)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if data:
            with contextlib.suppress(Exception):  # a change that is impossible after the one before
                rng.choice([*ON_BYTES, change_columns, change_columns, change_columns])(data, rng)
    return bytes(data[: 2 * LARGE])


# What reads it.


def scan(path: Path) -> None:
    end = path.stat().st_size
    members, defects = scan_tar(path)
    inside = [*members, *(x for x in defects if x.reason != NO_END_MARK)]
    if not all(x.offset >= 0 and x.size >= 0 and x.offset + x.size <= end for x in inside):
        raise AssertionError("a member or a defect lies outside the file")
    if any(one.offset + one.size > two.offset for one, two in itertools.pairwise(members)):
        raise AssertionError("members overlap")
    entries = scan_shard(path)
    if not len(entries.keys) == len(entries.offset) == len(entries.size) == len(entries.label):
        raise AssertionError("the columns have different lengths")
    if any("\n" in key for key in entries.keys):
        raise AssertionError("a newline in a key")


def open_and_read(path: Path) -> None:
    index = open_index(str(path))
    for sample in range(len(index)):
        index.key(sample)
        try:
            index.read(sample)
        except OSError:
            continue
    index.describe_defects()
    index.samples_lost()
    if pickle.loads(pickle.dumps(index)).fingerprint() != index.fingerprint():
        raise AssertionError("another index after pickling")
    if open_index(str(path)).fingerprint() != index.fingerprint():
        raise AssertionError("another index from the sidecar")
    for descriptor in index._files.values():
        os.close(descriptor)


class Fuzzer:
    def __init__(self, folder: Path, keep: Path | None, seed: int) -> None:
        self.folder, self.keep, self.seed = folder, keep, seed
        (folder / "corpus").mkdir()
        self.tars, self.pairs = make_corpus(folder / "corpus", random.Random(seed))
        self.shard, self.index = folder / "x.tar", folder / INDEX_NAME
        self.cases: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.slowest_s = 0.0

    def run_case(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        self.index.unlink(missing_ok=True)
        kind = rng.choices(["scan_shard", "unpack", "open a tar", "open an index"], [6, 3, 1, 2])[0]
        self.cases[kind] += 1
        if kind in ("scan_shard", "open a tar"):
            data = mutated_tar(self.tars, rng)
            self.shard.write_bytes(data)
            self.attempt(number, kind, data, (lambda: scan(self.shard)) if kind == "scan_shard" else self.open_and_read)
        else:
            tar, index = rng.choice(self.pairs)
            data = mutated_index(index, rng)
            if kind == "unpack":
                self.attempt(number, kind, data, lambda: unpack(data))
            else:
                self.shard.write_bytes(tar)
                data = self.fitted(data)
                self.index.write_bytes(data)
                self.attempt(number, kind, data, self.open_and_read)

    def fitted(self, index: bytes) -> bytes:
        """Gives an index of one shard the shard's name, size and time, lest it be scanned anew at once."""
        buffer, found = io.BytesIO(), self.shard.stat()
        try:
            with np.load(io.BytesIO(index)) as file:
                columns = {name: file[name] for name in file.files}
            columns["shard_name"] = np.frombuffer(self.shard.name.encode(), np.uint8)
            columns["shard_size"], columns["shard_mtime_ns"] = np.array([found.st_size]), np.array([found.st_mtime_ns])
            np.savez(buffer, **columns)
        except Exception:  # too damaged for that
            return index
        return buffer.getvalue()

    def open_and_read(self) -> None:
        open_and_read(self.shard)

    def attempt(self, number: int, kind: str, data: bytes, read: Callable[[], object]) -> None:
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        try:
            read()
        except InputError:
            pass
        except TookTooLong:
            self.fail(number, kind, data, "hang")
        except Exception as error:
            frames = [
                x
                for x in traceback.extract_tb(error.__traceback__)
                if "quarterlight" in x.name or "/ssl/" in x.filename
            ]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"
            self.fail(number, kind, data, f"{type(error).__name__} at {where}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)

    def fail(self, number: int, kind: str, data: bytes, what: str) -> None:
        failure = f"{kind}: {what}"
        self.failures[failure] += 1
        if self.failures[failure] <= KEPT_OF_A_KIND:
            print(f"case {number} of seed {self.seed}: {failure}", flush=True)
            print("".join(traceback.format_exc().splitlines(keepends=True)[-3:]), flush=True)
            if self.keep:
                self.keep.mkdir(parents=True, exist_ok=True)
                name = f"seed{self.seed}-case{number}"
                (self.keep / f"{name}.bin").write_bytes(data)
                (self.keep / f"{name}.txt").write_text(f"{failure}\n\n{traceback.format_exc()}")


def memory(name: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def stop_the_case(_signal: int, _frame: FrameType | None) -> None:
    raise TookTooLong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases in the same order")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one that failed")
    parser.add_argument("--keep", type=Path, help="folder for inputs that failed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop_the_case)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.keep, args.seed)
        limit = memory("VmSize") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        number, started, rss, half = args.first, time.monotonic(), memory("VmHWM"), None
        while (spent_s := time.monotonic() - started) < 60 * args.minutes:
            fuzzer.run_case(number)
            number += 1
            if half is None and spent_s > 30 * args.minutes:
                half = memory("VmHWM")
    result = {
        "seed": args.seed,
        "seconds": round(spent_s, 1),
        "cases": sum(fuzzer.cases.values()),
        "cases_by_kind": dict(fuzzer.cases),
        "crashes": sum(n for what, n in fuzzer.failures.items() if not what.endswith("hang")),
        "hangs": sum(n for what, n in fuzzer.failures.items() if what.endswith("hang")),
        "failures": dict(fuzzer.failures.most_common()),
        "slowest_s": round(fuzzer.slowest_s, 3),
        "peak_rss_growth_mib": round((memory("VmHWM") - rss) / 2**20, 1),
        "peak_rss_growth_in_second_half_mib": round((memory("VmHWM") - (half or rss)) / 2**20, 1),
    }
    for name, value in result.items():
        print(f"{name:36} {value}")
    print(json.dumps(result))
    sys.exit(1 if fuzzer.failures else 0)


if __name__ == "__main__":
    main()
