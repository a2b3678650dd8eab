"""What the fetcher's process does: decides which shards to fetch and which to delete, and fetches them."""

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from .errors import InputError
from .look_ahead import LookAhead
from .patience import Patience
from .remote import fetch, remove_dead_partials
from .shard_cache import REQUESTS, SHARDS, ShardCache, is_held

POLL_S = 0.02  # between two looks for requests
REVIEW_S = 1.0  # between two looks at the whole folder while nothing happens
RETRY_S = 30.0  # before a shard that could not be fetched ahead is tried again
UNCLAIMED_S = 5.0  # a shard that was asked for waits so long for its reader, who may be dead


@dataclass
class Counts:
    """What a fetcher did."""

    fetched: int = 0  # shards
    evicted: int = 0  # shards
    fetched_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """What a fetcher is to do; see `fetcher.Fetcher`."""

    cache: ShardCache
    plan: Iterable[tuple[int, int]]
    limit_bytes: int
    patience: Patience
    parallel: int
    parent: int  # process id


class Stock:
    """The shards in the folder: one thread decides, one reads positions from stdin, and each download has its own."""

    def __init__(self, job: Job) -> None:
        self.job, self.cache = job, job.cache
        self.numbers = {name: shard for shard, name in enumerate(self.cache.names)}
        self.changed = threading.Condition()  # guards everything below
        self.has_news = True
        self.look_ahead = LookAhead(job.plan, self.cache.sizes, job.limit_bytes)
        self.counts = Counts()
        self.in_flight: set[int] = set()
        self.present: set[int] = set()
        self.others: list[tuple[float, int, Path]] = []  # age, bytes and path of shards of runs that have ended
        self.not_before: dict[int, float] = {}  # when a shard that failed may be fetched ahead again
        self.unclaimed_until: dict[int, float] = {}  # for shards that somebody asked for and that are there now

    def advance(self, position: int) -> None:
        """Notes where the run is."""
        with self.changed:
            self.look_ahead.position = max(self.look_ahead.position, position)
            if position >= self.look_ahead.turn:
                self.has_news = True
                self.changed.notify()

    def run(self) -> None:
        """Decides what to fetch and to delete, until the process ends."""
        self._move_in()
        review_at, seen = 0.0, set[int]()
        while os.getppid() == self.job.parent:  # a forked worker may hold the pipe of a dead parent: its end is no sign
            try:
                wanted = {int(name[:-7]) for name in os.listdir(self.cache.desk) if name.endswith(".wanted")}
            except FileNotFoundError as error:
                raise InputError(f"{self.cache.desk} was deleted while a run needs it; start the run again") from error
            with self.changed:
                if self.has_news or wanted != seen or time.monotonic() > review_at:
                    self.has_news, seen, review_at = False, wanted, time.monotonic() + REVIEW_S
                    self._survey()
                    self._serve(wanted)
                if not self.has_news:
                    self.changed.wait(POLL_S)
        self.end()

    def end(self) -> NoReturn:
        """Says what was done, drops what is half done and ends the process."""
        with self.changed:
            for shard in self.in_flight:
                path = self.cache.path(shard)
                path.with_name(f".{path.name}.{os.getpid()}.partial").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there may be nobody left to listen
                os.write(sys.stdout.fileno(), json.dumps(asdict(self.counts)).encode() + b"\n")
            os._exit(0)  # threads in the middle of a download would keep the process

    def _move_in(self) -> None:
        desk = self.cache.desk
        desk.mkdir(parents=True, exist_ok=True)
        _replace_text(desk / "names", "\n".join(self.cache.names))
        fcntl.flock(os.open(self.cache.lock, os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_SH)  # until the process ends
        for old in [*desk.glob("*.wanted"), *desk.glob("*.failed")]:  # who still waits asks again at his next look
            old.unlink(missing_ok=True)
        for folder in self.cache.folder.glob(f"{SHARDS}*"):
            remove_dead_partials(folder)

    def _survey(self) -> None:
        """Looks at what is in the folder, where other runs may work too, and deletes shards of a wrong size."""
        foreign: set[str] = set()
        for desk in self.cache.folder.glob(f"{REQUESTS}*"):
            if desk != self.cache.desk and is_held(desk / "fetcher.lock"):
                foreign.update((desk / "names").read_text(encoding="utf-8").split("\n"))
        self.present, self.others = set(), []
        for folder in self.cache.folder.glob(f"{SHARDS}*"):
            for file in os.scandir(folder):
                name = f"{folder.name}/{file.name}"
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue  # another run deleted it
                if (shard := self.numbers.get(name)) is None:
                    if name not in foreign and not file.name.endswith(".partial"):
                        self.others.append((stat.st_mtime, stat.st_size, Path(file.path)))
                elif stat.st_size == self.cache.sizes[shard]:
                    self.present.add(shard)
                elif shard not in self.in_flight:
                    Path(file.path).unlink(missing_ok=True)

    def _serve(self, wanted: set[int]) -> None:
        """Starts downloads: of what somebody waits for, then of what the run needs next, as far as there is room.

        Who waits does not wait for the plan, whose epochs may be long; what is fetched ahead does, since it takes the
        place of what is needed last.
        """
        now = time.monotonic()
        for shard in wanted & self.present:
            if now > self.unclaimed_until.setdefault(shard, now + UNCLAIMED_S):
                self.cache.wanted(shard).unlink(missing_ok=True)
        self.unclaimed_until = {shard: at for shard, at in self.unclaimed_until.items() if shard in wanted}
        places = self.look_ahead.next_uses()
        in_turn = sorted(wanted, key=lambda x: places.get(x, len(places)))
        if not self._start(in_turn, places, wanted, self.job.parallel * 2):  # a request need not wait for others
            return
        if not self.look_ahead.extend():
            self.has_news = True  # goes on after another look at who waits
            return
        places = self.look_ahead.next_uses()
        ahead = [shard for shard in places if shard not in wanted and self.not_before.get(shard, now) <= now]
        self._start(ahead, places, wanted, self.job.parallel)

    def _start(self, shards: Iterable[int], places: dict[int, int], wanted: set[int], parallel: int) -> bool:
        """Starts the downloads of those that are not there; returns False where one has to wait, and all after it."""
        for shard in shards:
            if shard in self.present | self.in_flight:
                continue
            if len(self.in_flight) >= parallel:
                return False
            if not self._make_room(shard, -1 if shard in wanted else places[shard], places, wanted):
                return False
            self.in_flight.add(shard)
            threading.Thread(target=or_end, args=(self._download, shard), daemon=True).start()
        return True

    def _make_room(self, shard: int, place: int, places: dict[int, int], wanted: set[int]) -> bool:
        """Deletes what is needed after `place`, latest first, until `shard` fits; nothing, and False, if it cannot."""
        sizes = self.cache.sizes
        used = sum(sizes[x] for x in self.present | self.in_flight) + sum(size for _, size, _ in self.others)
        excess = used + sizes[shard] - self.job.limit_bytes
        last = len(places)
        own = sorted(self.present - wanted - self.in_flight, key=lambda x: -places.get(x, last))
        spare = [(size, path, None) for _, size, path in sorted(self.others)]
        spare += [(sizes[x], self.cache.path(x), x) for x in own if places.get(x, last) > place]
        victims = []
        for victim in spare:
            if excess <= 0:
                break
            victims.append(victim)
            excess -= victim[0]
        if excess > 0:
            return False
        for _, path, number in victims:
            path.unlink(missing_ok=True)
            self.counts.evicted += 1
            self.present.discard(-1 if number is None else number)
        gone = {path for _, path, number in victims if number is None}
        self.others = [other for other in self.others if other[2] not in gone]
        return True

    def _download(self, shard: int) -> None:
        failure = None
        try:
            fetch(
                self.cache.urls[shard],
                self.cache.path(shard),
                size=self.cache.sizes[shard],
                content=None if self.cache.contents is None else self.cache.contents[shard],
                patience=self.job.patience,
            )
        except InputError as error:
            failure = str(error)
        with self.changed:
            self.in_flight.discard(shard)
            if failure is None:
                self.counts.fetched += 1
                self.counts.fetched_bytes += self.cache.sizes[shard]
                self.cache.failed(shard).unlink(missing_ok=True)
            else:
                self.not_before[shard] = time.monotonic() + RETRY_S
                self._refuse(shard, failure)
            self.has_news = True
            self.changed.notify()

    def _refuse(self, shard: int, failure: str) -> None:
        """Tells those who wait for the shard, if any, why it cannot be had."""
        wanted, failed = self.cache.wanted(shard), self.cache.failed(shard)
        if wanted.exists():
            _replace_text(failed, failure)
            wanted.unlink(missing_ok=True)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def or_end(work: Callable[..., None], *args: object) -> None:
    """Runs a thread's work; an error that nobody foresaw ends the process, so that readers learn of it."""
    try:
        work(*args)
    except BaseException as error:
        if isinstance(error, InputError):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
