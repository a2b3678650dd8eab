"""Remote shards in a local folder, as the loader's workers see them: open what is there, ask for what is not.

    FOLDER/shards-HASH/HASH-NAME.tar          complete shards; the first HASH is of the URL's folder, the second of what
                                              the index says of this shard, so another state of it is another file
    FOLDER/shards-HASH/.HASH-NAME.tar.PID.partial  a download under way
    FOLDER/requests-HASH/                     where readers and fetcher of one list of shards meet:
        fetcher.lock                          held by the fetcher as long as it lives
        names                                 the files that this fetcher may use; others' fetchers leave them alone
        3.wanted                              somebody waits for shard 3
        3.failed                              why shard 3 cannot be had, one sentence

Readers know only files, no fsspec and no connection, so they may be forked or spawned.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .addresses import folder_of, shard_name, shown
from .errors import InputError
from .patience import unwritable

LONGEST_WAIT_S = 0.05  # between two looks for a file
SHARDS, REQUESTS = "shards-", "requests-"


class ShardCache:
    """The shards behind `urls`, of `sizes` bytes, in `folder`; their number is their place in `urls`.

    `contents` has `ShardEntries.digest()` of each, by which a shard is told from another state of it that has the same
    size; None: sizes must do. Raises InputError when a URL stands there twice.
    """

    def __init__(
        self,
        folder: Path,
        urls: Sequence[str],
        sizes: Sequence[int],
        contents: Sequence[str] | None = None,
        *,
        grace_s: float = 10.0,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.urls = list(urls)
        self.sizes = [int(size) for size in sizes]
        self.contents = None if contents is None else list(contents)
        states = list(zip(self.urls, self.sizes, self.contents or [""] * len(self.urls), strict=True))
        self.names = [_file_name(*state) for state in states]  # below `folder`
        places = Counter(map(_place, self.urls))
        if twice := next((url for url in self.urls if places[_place(url)] > 1), None):
            raise InputError(f"shards: {shown(twice)} is named twice")
        listing = "\n".join(f"{url} {size} {content}" for url, size, content in states)
        self.desk = self.folder / f"{REQUESTS}{_hash(listing)}"
        self.grace_s = grace_s  # a reader waits so long for a fetcher to appear

    @property
    def lock(self) -> Path:
        """The file that a living fetcher of these shards holds."""
        return self.desk / "fetcher.lock"

    def path(self, shard: int) -> Path:
        """Returns where the shard is, or would be."""
        return self.folder / self.names[shard]

    def wanted(self, shard: int) -> Path:
        """Returns the file that says that somebody waits for the shard."""
        return self.desk / f"{shard}.wanted"

    def failed(self, shard: int) -> Path:
        """Returns the file that holds why the shard cannot be had."""
        return self.desk / f"{shard}.failed"

    def open(self, shard: int) -> int:
        """Returns a descriptor to read the complete shard, which the caller closes; waits while it is being fetched.

        Raises InputError when the shard cannot be had, or when nobody is there to fetch it.
        """
        descriptor = self._open_complete(shard)
        return self._wait_for(shard) if descriptor is None else descriptor

    @staticmethod
    def evicted(descriptor: int) -> bool:
        """Returns True once the file of `descriptor` has been deleted: to close it then frees the disk space."""
        return os.fstat(descriptor).st_nlink == 0

    def _open_complete(self, shard: int) -> int | None:
        try:
            descriptor = os.open(self.path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{self.path(shard)} cannot be opened ({error.strerror}); see data.cache_dir") from error
        if os.fstat(descriptor).st_size == self.sizes[shard]:
            return descriptor
        os.close(descriptor)
        return None

    def _wait_for(self, shard: int) -> int:
        failed, wait_s = self.failed(shard), 0.001
        earlier = _stamp(failed)  # of another request, and perhaps mended since
        watch = _Watch(self.lock, self.grace_s)
        try:
            while True:
                verdict = _stamp(failed)  # looked for before the file: a verdict is withdrawn when the file comes
                if (descriptor := self._open_complete(shard)) is not None:
                    return descriptor
                if verdict not in (None, earlier):
                    with contextlib.suppress(FileNotFoundError):
                        raise InputError(failed.read_text(encoding="utf-8"))
                if not watch.is_alive():
                    raise InputError(
                        f"{shown(self.urls[shard])} is not in {self.folder}, and the process that fetches shards died; "
                        "its last words stand above, and a run that is started again goes on from its last checkpoint"
                    )
                self._ask(shard)
                time.sleep(wait_s)
                wait_s = min(LONGEST_WAIT_S, wait_s * 1.5)
        finally:
            with contextlib.suppress(OSError):
                self.wanted(shard).unlink(missing_ok=True)  # another reader that waits asks again at its next look

    def _ask(self, shard: int) -> None:
        try:
            self.desk.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.wanted(shard), os.O_WRONLY | os.O_CREAT, 0o666))
        except OSError as error:
            raise unwritable(self.folder, error) from error


class _Watch:
    """Tells whether a fetcher has lived at some time in the last `grace_s`."""

    def __init__(self, lock: Path, grace_s: float) -> None:
        self.lock = lock
        self.grace_s = grace_s
        self.seen = self.looked = time.monotonic()

    def is_alive(self) -> bool:
        """Returns False once nobody has held the lock for the whole time."""
        now = time.monotonic()
        if now - self.looked > min(1.0, self.grace_s / 4):
            self.looked = now
            if is_held(self.lock):
                self.seen = now
        return now - self.seen <= self.grace_s


def is_held(lock: Path) -> bool:
    """Returns True while a living process holds this lock; the kernel lets go of it however the process ends."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _stamp(file: Path) -> tuple[int, int] | None:
    """Returns what differs between two files of one name, or None when there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _place(url: str) -> tuple[str, str]:
    return shown(folder_of(url)), shard_name(url)


def _file_name(url: str, size: int, content: str) -> str:
    """Returns SUBFOLDER/NAME, the same in every run for the same state of what is behind the URL."""
    folder, name = _place(url)
    plain = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII).lstrip(".")[-100:]
    state = _hash(f"{name} {size} {content}")  # of the whole name: two may differ in nothing but what was taken away
    return f"{SHARDS}{_hash(folder)}/{state}-{plain}"
