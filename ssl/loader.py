"""Batches in a known order: position in the run -> sample -> pixels and mask, the same for any number of processes.

A map-style data set whose batch sampler yields only spans of positions, so a run resumes anywhere at once. It is never
given to `accelerator.prepare`, which would shard it a second time.
"""

import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .batches import Batch, Samples
from .errors import InputError, ProcessError
from .ring import InRing, Ring

PREFETCHED = 2  # batches a worker reads ahead


class Spans(Sampler[tuple[int, int]]):
    """The spans of positions that one rank reads, one for each micro-batch.

    Step s covers positions s * batch_size, ..., (s + 1) * batch_size - 1; rank r of w reads the r-th of w equal parts,
    in micro-batches one after another. So the samples of a step do not depend on w or on the micro-batch size.
    """

    def __init__(self, steps: range, *, batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.per_rank = batch_size // world_size
        self.rank = rank

    @property
    def largest(self) -> int:
        """The most positions in a span."""
        return self.micro_batch_size

    def __len__(self) -> int:
        return len(self.steps) * (self.per_rank // self.micro_batch_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.per_rank
            for start in range(first, first + self.per_rank, self.micro_batch_size):
                yield start, start + self.micro_batch_size


class EvalSpans(Sampler[tuple[int, int]]):
    """Positions 0, ..., num_samples - 1 once over all ranks; the last batch of a rank may be short."""

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.last = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
        self.batch_size = batch_size

    @property
    def largest(self) -> int:
        """The most positions in a span."""
        return max(1, min(self.batch_size, self.last - self.first))

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(self.first, self.last, self.batch_size):
            yield start, min(start + self.batch_size, self.last)


class _Refused(NamedTuple):
    """What a worker sends instead of a batch when it cannot go on."""

    sentence: str


@dataclass
class _Reader(Dataset):
    """Samples as torch's DataLoader wants them: `__getitems__` gets what the batch sampler yields."""

    samples: Samples
    ring: Ring | None

    def __getitems__(self, numbered: tuple[int, int, int]) -> Batch | InRing | _Refused:
        number, start, stop = numbered
        try:
            if self.ring is None:
                return self.samples.batch(start, stop)
            return InRing(self.ring, number, self.samples.batch(start, stop, self.ring.slot(number, stop - start)))
        except InputError as error:  # as an exception it would arrive with a traceback of this process
            return _Refused(str(error))


@dataclass
class _Numbered(Sampler[tuple[int, int, int]]):
    """The spans of a sampler with their numbers in front."""

    spans: Sampler[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.spans)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for number, (start, stop) in enumerate(self.spans):
            yield number, start, stop


class Loader:
    """Batches in the order of the spans, for any number of workers."""

    def __init__(
        self, samples: Samples, spans: Spans | EvalSpans, *, num_workers: int, persistent: bool = False
    ) -> None:
        self.samples = samples
        self.spans = spans
        self.num_workers = num_workers
        self.persistent = persistent and num_workers > 0
        self._kept: DataLoader | None = None
        self._passes = 0

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        """Returns batches; a new pass ends an earlier one. Raises ProcessError when a shard cannot be had."""
        loader = self._kept or self._build()
        self._kept = loader if self.persistent else None
        self._passes += 1
        return self._pass(iter(loader), self._passes)  # the workers begin now, not when the first batch is asked for

    def _pass(self, batches: Iterator[Any], mine: int) -> Iterator[Batch]:
        copies = self.num_workers > 0 and not torch.cuda.is_available()  # pinning copies as well
        for batch in batches:
            if isinstance(batch, _Refused):
                raise ProcessError(batch.sentence)
            yield batch._replace(images=batch.images.clone()) if copies else batch
            if self.persistent and mine != self._passes:  # its batches have been overwritten by the later one
                raise RuntimeError("a later pass over this loader has begun: this one cannot go on")

    def _build(self) -> DataLoader:
        """Returns torch's loader, with a ring of its own."""
        cuda, workers = torch.cuda.is_available(), self.num_workers
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: slower, not wrong
        slots = workers * PREFETCHED + 2  # those on their way, one arriving, one being copied
        return DataLoader(
            _Reader(self.samples, Ring(slots, self.spans.largest, self.samples.shape) if workers else None),
            batch_sampler=_Numbered(self.spans),  # type: ignore[arg-type]
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=cuda,
            persistent_workers=self.persistent,
            multiprocessing_context=_start_method(cuda) if workers else None,
            generator=torch.Generator(),  # it draws a seed for workers, and must not move the global generator
        )


def build_loader(samples: Samples, spans: Spans | EvalSpans, *, num_workers: int, persistent: bool = False) -> Loader:
    """Returns a loader of Batches; `persistent` workers wait for another pass."""
    return Loader(samples, spans, num_workers=num_workers, persistent=persistent)


def _start_method(cuda: bool) -> Any:
    """Workers are forked where no GPU is in use (0.2 s), since a fork after CUDA has started deadlocks.

    Else they come from a server process, which imports torch once for all of them (4 s).
    """
    context = multiprocessing.get_context("forkserver" if cuda else "fork")
    if cuda:
        context.set_forkserver_preload([__name__])
    return context


def _as_it_is(batch: Any) -> Any:
    return batch
