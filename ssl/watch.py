"""A watch over the processes of a run: one that dies or hangs ends it within bounded time, by name.

The others would wait for it in a collective operation, for hours. So one thread of every process says now and then
where the process is, in the store by which torch joined the processes; and another looks whether its process still
moves. They are two because the store itself may not answer.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

BEAT_S = 5.0
SILENT_S = 60.0  # without a beat a process counts as gone; shorter breaks of a connection are ridden out
PHASES = ("starting", "waiting for data", "computing", "saving", "evaluating")  # in the order of a step
AGAIN = "the same command continues from the newest state"


class Place(NamedTuple):
    """Where a process is."""

    step: int
    phase: str  # of PHASES
    since: float  # monotonic seconds of this process


class Watch:
    """Watches while it is entered, and ends the process with status 1 where the run cannot go on.

    `move` says where this process is, and `detail()` what its data workers are reading.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, detail: Callable[[], str]) -> None:
        self.rank, self.world_size, self.timeout_s, self.detail = rank, world_size, timeout_s, detail
        self.silent_s = min(SILENT_S, timeout_s)
        self.beat_s = min(BEAT_S, self.silent_s / 4)
        self.place = Place(0, "starting", time.monotonic())
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if world_size > 1 else None
        self._present: set[int] = set()  # ranks that have beaten
        self._table: dict[int, dict[str, Any]] = {}  # by rank, what its last beat said
        self._heard_at: dict[int, float] = {}
        self._answered_at = self._resumed_at = time.monotonic()  # the store; this process, if it was stopped (Ctrl-Z)
        self._over = threading.Event()

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
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._over.set()
        if self._store is not None and error is None:
            with suppress(RuntimeError):  # the store may have gone before
                self._store.set(self._key(self.rank), json.dumps({"left": True}))

    def who_is_gone(self) -> str:
        """Returns who does not answer any more, for a process that has lost a connection; waits for some beats."""
        before = {rank: said.get("beat") for rank, said in self._table.items()}
        self.move(self.place.step, self.place.phase)
        time.sleep(3 * self.beat_s)
        gone = [
            self._named(rank, said)
            for rank, said in self._table.items()
            if rank != self.rank and not said.get("left") and said.get("beat") == before.get(rank)
        ]
        return f"{' and '.join(gone)} does not answer" if gone else "it is not known which"

    def _key(self, rank: int) -> str:
        return f"quarterlight/watch/{rank}"

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(self.beat_s if number else 0):
            number += 1
            if self._store is None:
                self._answered_at = time.monotonic()
                continue
            with suppress(RuntimeError):  # that it does not answer is what `_judge` sees
                self._store.set(self._key(self.rank), json.dumps(self._here(number)))
                self._listen()
                self._answered_at = time.monotonic()

    def _here(self, number: int) -> dict[str, Any]:
        step, phase, since = self.place
        detail = self.detail() if phase == "waiting for data" else ""
        here = {"host": socket.gethostname(), "pid": os.getpid(), "step": step, "phase": phase, "detail": detail}
        return here | {"beat": number, "for_s": time.monotonic() - since}

    def _listen(self) -> None:
        for rank in range(self.world_size):
            if rank in self._present or self._store.check([self._key(rank)]):  # get would wait for one not there
                self._present.add(rank)
                said = json.loads(self._store.get(self._key(rank)))
                if said.get("beat") != self._table.get(rank, {}).get("beat"):
                    self._heard_at[rank] = time.monotonic()
                self._table[rank] = said

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.beat_s):
            now = time.monotonic()
            if now - before > 2 * self.beat_s + 1:  # this process was stopped itself; what it thinks of others is old
                self._resumed_at = now
            before = now
            if sentence := self._verdict(now):
                print(f"error: process {self.rank}: {sentence}. {AGAIN}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=False) if self._is_first(self.rank) else None
                os._exit(1)  # the main thread cannot be asked: it hangs

    def _verdict(self, now: float) -> str | None:
        """Returns why the run cannot go on, if it cannot. As long as this process moves, it can."""
        stuck_s = now - max(self.place.since, self._resumed_at)
        if stuck_s < self.silent_s:
            return None
        if now - max(self._answered_at, self._resumed_at) > self.silent_s:
            address = os.environ.get("MASTER_ADDR", "unknown")
            return f"the machine of process 0 ({address}) has not answered for {self.silent_s:.0f} s"
        gone = [
            self._named(rank, said)
            for rank, said in self._table.items()
            if not said.get("left") and now - max(self._heard_at[rank], self._resumed_at) > self.silent_s
        ]
        if gone:
            return f"{' and '.join(gone)} has not been heard of for {self.silent_s:.0f} s"
        if stuck_s > self.timeout_s:
            return f"nothing has moved for {stuck_s:.0f} s (stall_timeout_s {self.timeout_s:.0f}): {self._who_hangs()}"
        return None

    def _who_hangs(self) -> str:
        table = self._table or {self.rank: self._here(0)}
        first = [rank for rank in sorted(table) if self._is_first(rank)]
        shown = [
            f"{self._named(rank, table[rank])} is in step {table[rank]['step'] + 1}, {table[rank]['phase']}"
            f"{table[rank]['detail'] and ' (' + table[rank]['detail'] + ')'}"
            for rank in first[:4]
        ]
        more = f", and {len(first) - 4} more" if len(first) > 4 else ""
        waiting = len(table) - len(first)
        return f"{'; '.join(shown)}{more}" + (f"; {waiting} others wait" if waiting else "")

    def _is_first(self, rank: int) -> bool:
        """Returns whether no process has done less than this one."""
        done = {
            other: (said["step"], PHASES.index(said["phase"]))
            for other, said in (self._table or {self.rank: self._here(0)}).items()
            if not said.get("left")
        }
        return rank in done and done[rank] == min(done.values())

    def _named(self, rank: int, said: dict[str, Any]) -> str:
        return f"process {rank} ({said.get('host')}, pid {said.get('pid')})"
