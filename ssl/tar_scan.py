"""The files inside a tar and where their bytes lie, from its headers alone; what is damaged is skipped and listed.

tarfile and webdataset take the first bad header for the end of the archive, so one bad block costs all samples after
it, without a word. Here the scan goes on at the next valid header. Reads ustar, GNU and PAX archives, concatenated ones
too. Every header is read by itself, so memory does not grow with the archive's members' sizes.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and files begin at multiples of it
END_MARK = 2 * BLOCK  # zeros: a tar without them was cut off between two files, or never closed
NO_END_MARK = "no end mark after the last file: the tar was cut off here, or never closed"
CHUNK = 1 << 20
WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
)  # fmt: skip
NAME_BYTES = 100  # of the name in a header; a longer one stands in a header of its own
LONGEST_NUMBER = 20  # digits of a size
LONGEST_EXTENSION = 1 << 20  # bytes of a PAX header or a long name; a longer one is damage, not a name


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int  # of its bytes, from the start of the tar
    size: int  # bytes


class Defect(NamedTuple):
    """A part of a tar that holds no readable file, and why; or, with no bytes lost, what is odd about it."""

    offset: int  # bytes from the start of the tar
    size: int  # bytes that cannot be read
    reason: str


def scan_tar(path: Path) -> tuple[list[Member], list[Defect]]:
    """Returns the regular files of a tar in their order, and what could not be read. Raises OSError.

    Names come as they are in the archive, with undecodable bytes as surrogates. Links, folders and devices are no
    regular files. A file whose bytes are damaged is listed like any other: its header does not tell.
    """
    with path.open("rb") as file:
        return _Scan(file.fileno()).run()


_Extension = dict[str, bytes] | None  # None: it is damaged


class _Scan:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.end = os.fstat(descriptor).st_size
        self.at = 0
        self.archive_start = 0  # of the archive that `at` lies in: concatenated ones follow each other
        self.zeros_to = 0  # where the last zeros ended
        self.lost_to = -1  # where the last part ended that could not be read
        self.links: list[tuple[int, str]] = []
        self.members: list[Member] = []
        self.defects: list[Defect] = []

    def run(self) -> tuple[list[Member], list[Defect]]:
        extension: _Extension = {}  # what a GNU or PAX header says of the next file
        while self.at < self.end:
            block = os.pread(self.descriptor, BLOCK, self.at)
            if not block.strip(b"\0"):
                self._skip_zeros()
                extension = {}
                continue
            header = _parse(block)
            if header is None:
                self._lose("ends in the middle of a header" if len(block) < BLOCK else "a damaged header")
                extension = {}
            elif (stop := self.at + BLOCK + _data_size(header)) > self.end:
                self._lose(f"the tar ends in the middle of {header.name!r}")
                extension = {}
            elif header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extension = self._read_extension(header, extension)
                self.at = _rounded(stop)
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self.at = _rounded(stop)  # neither a file nor the end of what was said of the next one
            else:
                self._add(header, block, extension)
                extension = {}
        self._check_end()
        return self.members, self.defects

    def _add(self, header: tarfile.TarInfo, block: bytes, extension: _Extension) -> None:
        """Takes a file into the list, or goes past what is no regular file, or has lost its name."""
        said = extension or {}
        size = int(said.get("size", header.size))
        stop = self.at + BLOCK + (size if header.isreg() else _data_size(header))
        is_short_form = "path" not in said and (b"\0" not in block[:NAME_BYTES] or b"?" in block[:NAME_BYTES])
        if header.type == tarfile.GNUTYPE_SPARSE or "sparse" in said:
            self._skip(
                self._end_of_sparse(block, stop) if header.type == tarfile.GNUTYPE_SPARSE else _rounded(stop),
                f"{header.name!r} is a sparse file",
            )
        elif extension is None or (is_short_form and self.lost_to == self.at):
            self._skip(_rounded(stop), f"the whole name of {header.name!r} is lost")
        elif stop > self.end:
            self._lose(f"the tar ends in the middle of {header.name!r}")
        else:
            if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                self.links.append((self.at, header.name))
            if header.isreg():
                name = said["path"].decode("utf-8", "surrogateescape") if "path" in said else _name(header, block)
                self.members.append(Member(name, self.at + BLOCK, size))
            self.at = _rounded(stop)

    def _check_end(self) -> None:
        """Adds a defect when the tar may have been cut off between two files, which nothing else shows."""
        if self.members and self.zeros_to < self.end and self.lost_to < self.end:
            self.defects.append(Defect(self.end, END_MARK, NO_END_MARK))
        elif not (self.members or self.defects) and not END_MARK <= self.end <= 2 * tarfile.RECORDSIZE:
            self._note(0, self.end, "nothing but zeros")
        if self.links:
            more = f", and {len(self.links) - 1} like it" if len(self.links) > 1 else ""
            self.defects.append(Defect(self.links[0][0], 0, f"{self.links[0][1]!r} is a link, not followed{more}"))

    def _read_extension(self, header: tarfile.TarInfo, before: _Extension) -> _Extension:
        if before is None or not 0 < header.size <= LONGEST_EXTENSION:
            return None
        data = os.pread(self.descriptor, header.size, self.at + BLOCK)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return before | {"path": data.rstrip(b"\0")}
        records = _pax_records(data)
        return None if records is None else before | records

    def _skip_zeros(self) -> None:
        """Goes to the next block that is not zero. Zeros are the end of an archive, or damage."""
        start = self.at
        while chunk := os.pread(self.descriptor, CHUNK, self.at):
            if rest := len(chunk.lstrip(b"\0")):
                self.at += (len(chunk) - rest) // BLOCK * BLOCK
                break
            self.at += len(chunk)
        self.zeros_to, length = self.at, self.at - self.archive_start
        if self.at < self.end and (length % tarfile.RECORDSIZE or not next(self._headers(self.at, blocks=1), 0)):
            self._note(start, self.at, "zeros where a header should be")
        elif self.at < self.end:
            self.defects.append(Defect(start, 0, "zeros, and more files behind them: joined archives, or damage"))
        elif self.at - start > _longest_end(length):
            self._note(start + END_MARK, self.at, "zeros, many more than a tar ends with")
        self.archive_start = self.at

    def _note(self, start: int, stop: int, reason: str) -> None:
        self.defects.append(Defect(start, stop - start, reason))
        self.lost_to = stop

    def _end_of_sparse(self, block: bytes, stop: int) -> int:
        """Returns where the file after a GNU sparse file begins: its map may go on in further blocks."""
        extended, offset = block[482], self.at + BLOCK
        while extended and offset < self.end:
            more = os.pread(self.descriptor, BLOCK, offset)
            extended, offset, stop = more[504] if len(more) == BLOCK else 0, offset + BLOCK, stop + BLOCK
        return min(self.end, _rounded(stop))

    def _skip(self, to: int, reason: str) -> None:
        to = min(to, self.end)
        self._note(self.at, to, reason)
        self.at = to

    def _lose(self, reason: str) -> None:
        """Goes to the next valid header, or to the end."""
        self._skip(next(self._headers(self.at + BLOCK), self.end), reason)

    def _headers(self, start: int, *, blocks: int | None = None) -> Iterator[int]:
        """Yields the offsets of the blocks from `start` on that are valid headers; among the first `blocks` only."""
        while chunk := os.pread(self.descriptor, CHUNK if blocks is None else blocks * BLOCK, start):
            for offset in range(0, len(chunk), BLOCK):
                header = _parse(chunk[offset : offset + BLOCK])
                if header is not None and start + offset + BLOCK + _data_size(header) <= self.end:
                    yield start + offset
            if blocks is not None:
                return
            start += len(chunk)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """Returns what a header says; None when it is none (its checksum is wrong, or numbers in it are)."""
    if len(block) < BLOCK or block[148:156].strip(b" 01234567\0") or not block[148:156].strip(b" \0"):
        return None  # most blocks that are no header end here: the checksum is no octal number
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return None
    return header if header.size >= 0 else None


def _data_size(header: tarfile.TarInfo) -> int:
    """Returns how many bytes follow a header; links, folders and devices have none, whatever their size says."""
    return 0 if header.type in WITHOUT_DATA else header.size


def _name(header: tarfile.TarInfo, block: bytes) -> str:
    """Returns the name in a header. GNU's own headers hold times where others hold the first part of a long name."""
    if block[257:265] == tarfile.GNU_MAGIC:
        return block[:NAME_BYTES].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return header.name


def _longest_end(length: int) -> int:
    """Returns how many zeros an archive of so many bytes may end with: its end mark, in records filled with zeros.

    Records have 20 blocks (two of them where archives were joined), or a power of two (`tar -b`) that the archive is a
    multiple of.
    """
    records = [BLOCK << n for n in range(12) if length % (BLOCK << n) == 0]
    return END_MARK + max([2 * tarfile.RECORDSIZE, *records])


def _pax_records(data: bytes) -> dict[str, bytes] | None:
    """Returns the records "LENGTH KEY=VALUE" of a PAX header that matter here; None when they are damaged."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(data) - at:
            return None
        key, equals, value = data[at + len(length) + 1 : at + int(length)].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        if key == b"path":
            found["path"] = value[:-1]
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > LONGEST_NUMBER:
                return None
            found["size"] = value[:-1]
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = b""
        at += int(length)
    return found


def _rounded(offset: int) -> int:
    return -(-offset // BLOCK) * BLOCK
