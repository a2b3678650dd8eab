"""A watch over the processes of a run: one that dies or hangs ends it within bounded time, by name.

The others would wait for it in a collective operation, for hours. So one thread of every process says now and then
where the process is, in the store by which torch joined the processes; and another looks whether its process still
moves. They are two because the store itself may not answer.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from .errors import Stopped

BEAT_S = 5.0
# Without a beat for so long a process counts as gone. A link that was cut for 30 s is used again after up to 51 s, and
# one that was cut for a minute after up to 102 s, since TCP doubles the pauses between its attempts.
SILENT_S = 120.0
PHASES = ("starting", "waiting for data", "computing", "saving", "evaluating")  # in the order of a step
AGAIN = "the same command continues from the newest state"
NAMED = 4  # processes that a sentence names at most

_watching: list["Watch"] = []  # the one that is entered, for `alive`


class Place(NamedTuple):
    """Where a process is."""

    step: int
    phase: str  # of PHASES
    since: float  # monotonic seconds of this process


class Watch:
    """Watches while it is entered, and ends the process with status 1 where the run cannot go on.

    `move` says where this process is, and `detail()` what its data workers are reading. Where `timeout_s` is short,
    beats and the silence that is allowed are shorter.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, detail: Callable[[], str]) -> None:
        self.rank, self.world_size, self.timeout_s, self.detail = rank, world_size, timeout_s, detail
        self.silent_s = min(SILENT_S, timeout_s / 2)
        # Every process reads a line of every other at each beat: many processes beat less often.
        self.beat_s = min(BEAT_S * max(1, world_size / 64), self.silent_s / 4)
        self.place = Place(0, "starting", time.monotonic())
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if world_size > 1 else None
        self._table: dict[int, dict[str, Any]] = {}  # by rank, what its last beat said
        self._heard_at: dict[int, float] = {}
        self._answered_at = self._resumed_at = time.monotonic()  # the store; this process, if it was stopped (Ctrl-Z)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
        self._lost = False  # this process has lost the connection to another

    def move(self, step: int, phase: str) -> None:
        """Notes that this process has got there."""
        self.place = Place(step, phase, time.monotonic())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Notes a phase, and afterwards the one before it."""
        step, before, _ = self.place
        self.move(step, phase)
        yield
        self.move(step, before)

    def __enter__(self) -> "Watch":
        self._heard_at = dict.fromkeys(range(self.world_size), time.monotonic())
        for thread in self._threads:
            thread.start()
        _watching.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        _watching.remove(self)
        failed = None
        if error is not None and not isinstance(error, Stopped) and not self._lost:
            failed = " ".join(str(error).split()).removesuffix(f"; {AGAIN}") or type(error).__name__
        self._leave(failed)
        for thread in self._threads:  # none may be in the midst of torch's code when the interpreter ends
            thread.join(self.beat_s)

    def who_is_gone(self) -> str:
        """Returns who does not answer any more, or "", for a process that has lost a connection. Waits for beats."""
        self._lost, asked_at = True, time.monotonic()
        before = {rank: said.get("beat") for rank, said in self._table.items()}
        while time.monotonic() - asked_at < 4 * self.beat_s:
            self.move(self.place.step, self.place.phase)  # so that the other thread does not end the process meanwhile
            if failed := self._who_failed():
                return failed
            time.sleep(self.beat_s / 4)
        if self._answered_at < asked_at + self.beat_s:
            return f"{self._keeper()} does not answer"
        gone = [
            rank
            for rank, said in sorted(self._table.items())
            if rank != self.rank and not said.get("left") and said.get("beat") == before.get(rank)
        ]
        return f"{self._all_named(gone)} {'do' if len(gone) > 1 else 'does'} not answer" if gone else ""

    def _who_failed(self) -> str:
        """Returns which process has ended with an error of its own, and the error, or ""."""
        for rank, said in sorted(self._table.items()):
            if said.get("failed"):
                return f"process {rank} ({said['host']}, pid {said['pid']}) ended: {said['failed']}"
        return ""

    def _leave(self, failed: str | None) -> bool:
        """Tells the others that this process ends, and by which error of its own. Returns whether that arrived."""
        self._over.set()
        self._threads[0].join(self.beat_s)  # lest a beat overwrite it
        if self._store is None:
            return False
        said = self._here(0) | {"left": True, "failed": failed}
        told: list[bool] = []

        def tell() -> None:
            with suppress(RuntimeError):  # the store may have gone before
                self._store.set(self._key(self.rank), json.dumps(said))
                told.append(self._store.check([self._key(self.rank)]))

        thread = threading.Thread(target=tell, daemon=True)  # it may hang
        thread.start()
        thread.join(self.beat_s)
        return bool(told)

    def _key(self, rank: int) -> str:
        return f"quarterlight/watch/{rank}"

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(self.beat_s if number else 0):
            number += 1
            if self._store is not None:
                try:
                    self._store.set(self._key(self.rank), json.dumps(self._here(number)))
                    self._listen()
                    self._answered_at = time.monotonic()
                except dist.DistNetworkError:  # it never connects again: `_judge` will see that it does not answer
                    return
                except RuntimeError:  # it is out of time, perhaps: another beat may tell
                    continue

    def _here(self, number: int) -> dict[str, Any]:
        step, phase, since = self.place
        waiting = phase == "waiting for data" and time.monotonic() - since > self.beat_s
        here = {"host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": phase, "beat": number}
        return here | {"detail": self.detail() if waiting else ""}

    def _listen(self) -> None:
        keys = {rank: self._key(rank) for rank in range(self.world_size)}
        there = [rank for rank in keys if rank in self._table or self._store.check([keys[rank]])]  # else get would wait
        texts = self._store.multi_get([keys[rank] for rank in there])
        table = {rank: json.loads(text) for rank, text in zip(there, texts, strict=True)}
        for rank, said in table.items():
            if said["beat"] != self._table.get(rank, {}).get("beat"):
                self._heard_at[rank] = time.monotonic()
        self._table = table  # at once, since the other threads read it

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.beat_s):
            now = time.monotonic()
            if now - before > self.silent_s / 2:  # this process was stopped itself; what it thinks of others is old
                self._resumed_at = now
            before = now
            if sentence := self._verdict(now):
                self._end(sentence)

    def _end(self, sentence: str) -> None:
        """Ends this process. Of those of a machine the first one speaks, and any whom the others cannot hear."""
        host, now = socket.gethostname(), time.monotonic()
        lower = [
            rank
            for rank, said in self._table.items()
            if rank < self.rank and said["host"] == host and now - self._heard_at[rank] < self.silent_s / 2
        ]
        told = self._leave(sentence)
        if not (told and lower):
            print(f"error: process {self.rank}: {sentence}; {AGAIN}", file=sys.stderr, flush=True)
        if self._is_first(self.rank) and "nothing has moved" in sentence:
            main = sys._current_frames().get(threading.main_thread().ident or 0)
            traceback.print_stack(main, limit=6, file=sys.stderr)
        os._exit(1)  # the main thread cannot be asked: it hangs

    def _verdict(self, now: float) -> str | None:
        """Returns why the run cannot go on, if it cannot. As long as this process moves, it can."""
        stuck_s = now - max(self.place.since, self._resumed_at)
        if stuck_s > 2 * self.beat_s and (failed := self._who_failed()):  # not all collectives notice that
            return failed
        if stuck_s < self.silent_s:
            return None
        if self._store is not None and now - max(self._answered_at, self._resumed_at) > self.silent_s:
            return f"{self._keeper()} has not answered for {self.silent_s:.0f} s"
        silent = {r: now - max(at, self._resumed_at) for r, at in self._heard_at.items()}
        gone = [r for r, said in sorted(self._table.items()) if not said.get("left") and silent[r] > self.silent_s]
        if gone:
            verb = "have" if len(gone) > 1 else "has"
            return f"{self._all_named(gone)} {verb} not been heard of for {min(silent[r] for r in gone):.0f} s"
        if stuck_s > self.timeout_s:
            return f"nothing has moved for {stuck_s:.0f} s (stall_timeout_s {self.timeout_s:.0f}): {self._who_hangs()}"
        return None

    def _keeper(self) -> str:
        """Returns who keeps the store: process 0, or the launcher of its machine."""
        host, address = self._table.get(0, {}).get("host"), os.environ.get("MASTER_ADDR", "unknown")
        return f"the machine of process 0 ({address if host in (None, address) else f'{host}, {address}'})"

    def _who_hangs(self) -> str:
        if absent := sorted(set(range(self.world_size)) - self._table.keys() - {self.rank}):
            return f"process {', '.join(map(str, absent[:NAMED]))} has not begun to train"
        table = self._table | {self.rank: self._here(0)}
        first = [rank for rank in sorted(table) if self._is_first(rank)]
        waiting = sum(not said.get("left") for said in table.values()) - len(first)
        waits = f"; {waiting} other{'s wait' if waiting > 1 else ' waits'}" if waiting else ""
        return f"{self._all_named(first, 'in')} hang{'s' if len(first) == 1 else ''} there{waits}"

    def _is_first(self, rank: int) -> bool:
        """Returns whether no process has done less than this one."""
        done = {
            other: (said["step"], PHASES.index(said["phase"]), said["phase"] == "saving" and other > 0)  # 0 writes
            for other, said in (self._table | {self.rank: self._here(0)}).items()
            if not said.get("left")
        }
        return rank in done and done[rank] == min(done.values())

    def _all_named(self, ranks: list[int], where: str = "last seen in") -> str:
        """Returns "process 1 (host, pid 7; in step 3, computing)" and so on, some of them for all."""
        table = self._table | {self.rank: self._here(0)}
        named = [
            f"process {rank} ({said['host']}, pid {said['pid']}; {where} step {said['step'] + 1}, {said['phase']}"
            f"{said['detail'] and ': ' + said['detail']})"
            for rank, said in [(rank, table[rank]) for rank in ranks[:NAMED]]
        ]
        return " and ".join([*named, *([f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else [])])


def alive() -> None:
    """Notes that this process moves, in long work within a phase."""
    for watch in _watching:
        watch.move(watch.place.step, watch.place.phase)
