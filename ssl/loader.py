"""Batches in a known order: position in the run -> sample -> pixels and mask, the same for any number of processes.

A map-style data set whose batch sampler yields only spans of positions, so a run resumes anywhere at once. It is never
given to `accelerator.prepare`, which would shard it a second time.
"""

import atexit
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .addresses import shown
from .batches import Batch, Samples
from .errors import InputError, ProcessError, printable
from .fetching import Fetching, ranks_of_machine, remote_shards
from .order import ShardPlan
from .ring import InRing, Ring
from .signals import ignored_by_children, leave_signals_to_parent
from .spans import AnySpans
from .watch import AGAIN

PREFETCHED = 2  # batches a worker reads ahead
_workers: set[multiprocessing.process.BaseProcess] = set()  # of all loaders in this process
os.register_at_fork(after_in_child=_workers.clear)


class _Refused(NamedTuple):
    """What a worker sends instead of a batch when it cannot go on."""

    sentence: str


@dataclass
class _Reader(Dataset):
    """Samples as torch's DataLoader wants them: `__getitems__` gets what the batch sampler yields."""

    samples: Samples
    ring: Ring | None
    places: Tensor | None = None  # a worker notes here its process, and which sample it reads

    def __getitems__(self, numbered: tuple[int, int, int]) -> Batch | InRing | _Refused:
        number, start, stop = numbered
        if self.places is not None:
            worker = get_worker_info()
            pid, self.samples.place = self.places[worker.id if worker else 0]
            pid.fill_(os.getpid())
        try:
            if self.ring is None:
                return self.samples.batch(start, stop)
            return InRing(self.ring, number, self.samples.batch(start, stop, self.ring.slot(number, stop - start)))
        except InputError as error:  # as an exception it would arrive with a traceback of this process
            return _Refused(str(error))


@dataclass
class _Numbered:
    """The spans with their numbers in front."""

    spans: AnySpans

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for number, (start, stop) in enumerate(self.spans):
            yield number, start, stop


class Loader:
    """Batches in the order of the spans, for any number of workers."""

    def __init__(
        self,
        samples: Samples,
        spans: AnySpans,
        *,
        num_workers: int,
        persistent: bool = False,
        fetching: Fetching | None = None,
    ) -> None:
        """Takes the memory for the batches at once where workers are persistent, lest a late pass find too little.

        With `fetching`, remote shards are fetched in the order of each pass.
        """
        self.samples = samples
        self.spans = spans
        self.num_workers = num_workers
        self.persistent = persistent and num_workers > 0
        self.fetching = fetching
        # By worker, its process and the sample that it reads.
        self._places = torch.full((max(1, num_workers), 2), -1, dtype=torch.int64).share_memory_()
        self._kept = self._build() if self.persistent else None
        self._passes = 0

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        """Returns batches; a new pass ends an earlier one. Raises ProcessError when a shard cannot be had."""
        loader = self._kept or self._build()
        self._passes += 1
        self._follow()
        before = set(multiprocessing.active_children())
        with _deaths_noticed_later():  # the workers begin now, not when the first batch is asked for
            batches = iter(loader)
        _workers.intersection_update(before)  # those that have ended are forgotten
        _workers.update(set(multiprocessing.active_children()) - before)
        return self._pass(batches, self._passes)

    def _pass(self, batches: Iterator[Any], mine: int) -> Iterator[Batch]:
        copies = self.num_workers > 0 and not torch.cuda.is_available()  # pinning copies as well
        for number, batch in enumerate(self._named_deaths(batches)):
            if self.fetching is not None:
                self.fetching.advance(self.samples.index, number)
            if isinstance(batch, _Refused):
                raise ProcessError(batch.sentence)
            yield batch._replace(images=batch.images.clone()) if copies else batch
            if self.persistent and mine != self._passes:  # its batches have been overwritten by the later one
                raise RuntimeError("a later pass over this loader has begun: this one cannot go on")

    def reading(self, *pids: int) -> str:
        """Returns which sample each worker is reading, or read last, for a message on one that hangs or died.

        With `pids`, only those of these processes.
        """
        index = self.samples.index
        places = [
            (worker, sample)
            for worker, (pid, sample) in enumerate(self._places.tolist())
            if sample >= 0 and (not pids or pid in pids)
        ]
        return "; ".join(
            f"worker {worker}: {shown(index.paths[int(index.shard[sample])])}, sample {printable(index.key(sample))}"
            for worker, sample in places
        )

    def _named_deaths(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields `batches`. Raises ProcessError when a worker dies, with what was being read."""
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            said, opening, pids = " ".join(str(error).split()).rstrip(".").partition("(pid")
            reading = self.reading(*map(int, re.findall(r"\d+", pids))) or "nothing yet"
            raise ProcessError(
                f"{said}{opening}{pids}, reading {reading}: if memory ran out, lower num_workers or micro_batch_size; "
                f"{AGAIN}"
            ) from error

    def _follow(self) -> None:
        """Has the shards fetched that the processes of this machine read in this pass."""
        index = self.samples.index
        if self.fetching is not None and index.cache is not None:
            spans = [self.spans.of_rank(rank) for rank in ranks_of_machine(self.spans.rank)]
            self.fetching.follow(index, ShardPlan(self.samples.order, index.shard, spans, remote_shards(index)))

    def _build(self) -> DataLoader:
        """Returns torch's loader, with a ring of its own."""
        cuda, workers = torch.cuda.is_available(), self.num_workers
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: slower, not wrong
        slots = workers * PREFETCHED + 2  # those on their way, one arriving, one being copied
        return DataLoader(
            _Reader(
                self.samples, Ring(slots, self.spans.largest, self.samples.shape) if workers else None, self._places
            ),
            batch_sampler=_Numbered(self.spans),  # type: ignore[arg-type]
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=cuda,
            persistent_workers=self.persistent,
            multiprocessing_context=_start_method(cuda) if workers else None,
            worker_init_fn=_begin_worker if workers else None,
            generator=torch.Generator(),  # it draws a seed for workers, and must not move the global generator
        )


def build_loader(
    samples: Samples,
    spans: AnySpans,
    *,
    num_workers: int,
    persistent: bool = False,
    fetching: Fetching | None = None,
) -> Loader:
    """Returns a loader of Batches; `persistent` workers wait for another pass."""
    return Loader(samples, spans, num_workers=num_workers, persistent=persistent, fetching=fetching)


@contextmanager
def _deaths_noticed_later() -> Iterator[None]:
    """Has a worker that dies noticed where its batch is waited for.

    The handler that torch installs when workers begin raises an error wherever the main thread happens to be.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGCHLD, before)


def _start_method(cuda: bool) -> Any:
    """Workers are forked where no GPU is in use (0.2 s), since a fork after CUDA has started deadlocks.

    Else they come from a server process, which imports torch once for all of them (4 s).
    """
    context = multiprocessing.get_context("forkserver" if cuda else "fork")
    if cuda:
        context.set_forkserver_preload([__name__])
        # Both are programs of their own, and a signal to all processes of a job would end them, and the workers.
        with ignored_by_children() if threading.current_thread() is threading.main_thread() else nullcontext():
            resource_tracker.ensure_running()
            forkserver.ensure_running()
    return context


@atexit.register
def _end_workers() -> None:
    """Ends the workers of loaders that are still in use when this process ends.

    Python sends them one SIGTERM then and waits for their end without limit, and one they ignore.
    """
    for worker in _workers:
        worker.kill()


def _begin_worker(worker: int) -> None:
    del worker
    leave_signals_to_parent()


def _as_it_is(batch: Any) -> Any:
    return batch
