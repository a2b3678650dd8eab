"""Batches in a known order: position in the run -> sample -> pixels and mask, the same for any number of processes.

A map-style data set whose batch sampler yields only spans of positions, so a run resumes anywhere at once. It is never
given to `accelerator.prepare`, which would shard it a second time.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import CenterCrop, RandomCrop
from .decode import UnreadableImage, decode_image
from .errors import InputError
from .index import ShardIndex
from .masking import Masking, MaskSampler
from .order import FileOrder, ShuffledOrder
from .randoms import hashes, uniforms

REPLACEMENT_TRIES = 100


class BadSample(NamedTuple):
    """A sample that could not be read, and why."""

    shard: str
    key: str
    reason: str


class Batch(NamedTuple):
    """What one process gets for one forward pass."""

    images: UInt8[Tensor, "B H W C"]
    labels: Int[Tensor, " B"]  # class numbers, or -1 where there is none
    masking: Masking | None
    keys: list[str]
    bad: list[BadSample]  # samples that were to be here and were replaced

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch with its tensors on `device`."""
        masking = self.masking and self.masking.to(device, non_blocking=True)
        images, labels = (x.to(device, non_blocking=True) for x in (self.images, self.labels))
        return self._replace(images=images, labels=labels, masking=masking)


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

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(self.first, self.last, self.batch_size):
            yield start, min(start + self.batch_size, self.last)


@dataclass
class Samples(Dataset):
    """Turns a span of positions into a Batch."""

    index: ShardIndex
    order: ShuffledOrder | FileOrder
    transform: RandomCrop | CenterCrop
    seed: int
    in_chans: Literal[1, 3] = 3
    masks: MaskSampler | None = None

    def __getitems__(self, span: tuple[int, int]) -> Batch:
        positions = np.arange(*span)
        ids = self.order.ids(*span)
        draws = uniforms(self.seed, "augment", positions, self.transform.num_draws)
        images = torch.empty(len(ids), *self.transform.size, self.in_chans, dtype=torch.uint8)
        bad: list[BadSample] = []
        for i, position in enumerate(positions):
            pixels, ids[i] = self._readable(int(ids[i]), int(position), bad)
            images[i] = self.transform(pixels, draws[i])
        labels = torch.from_numpy(self.index.label[ids])
        masking = self.masks and self.masks.sample(self.seed, positions)
        return Batch(images, labels, masking, [self.index.key(int(i)) for i in ids], bad)

    def _readable(self, sample: int, position: int, bad: list[BadSample]) -> tuple[np.ndarray, int]:
        """Returns the pixels and id of `sample`, or of another one that `position` decides when it is damaged."""
        for other in hashes(self.seed, "replacement", np.array([position]), REPLACEMENT_TRIES)[0]:
            try:
                return decode_image(self.index.read(sample), self.in_chans), sample
            except (UnreadableImage, OSError) as error:
                shard = self.index.paths[int(self.index.shard[sample])]
                bad.append(BadSample(str(shard), self.index.key(sample), str(error)))
                sample = int(self.order.samples[int(other) % len(self.order)])
        size = (*self.transform.size, self.in_chans)  # the share of bad samples stops the run; a worker cannot say so
        return np.zeros(size, np.uint8), sample


def build_loader(
    samples: Samples, spans: Sampler[tuple[int, int]], *, num_workers: int, persistent: bool = False
) -> DataLoader:
    """Returns a DataLoader of Batches, in order for any number of workers; `persistent` ones wait for another pass.

    Workers are forked where no GPU is in use (0.2 s; 4 s otherwise), since a fork after CUDA has started deadlocks.
    """
    cuda = torch.cuda.is_available()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: slower, not wrong
    return DataLoader(
        samples,
        batch_sampler=spans,  # type: ignore[arg-type]  # spans reach __getitems__ as they are
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=cuda,
        persistent_workers=persistent and num_workers > 0,
        multiprocessing_context=("forkserver" if cuda else "fork") if num_workers else None,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def refuse_bad(bad: list[BadSample]) -> None:
    """Raises InputError when samples to evaluate on could not be read: a figure must count every image."""
    if bad:
        raise InputError(
            f"{bad[0].shard}: sample {bad[0].key} cannot be read ({bad[0].reason}), and an evaluation must count every "
            "image: write the shards anew without it"
        )


def refuse_unlabelled(labels: Int[np.ndarray, " n"], where: str) -> None:
    """Raises InputError when a sample has no label."""
    if missing := int((labels < 0).sum()):
        raise InputError(
            f"{where}: {missing} of {len(labels)} samples have no label (no .cls or .json in the shard); "
            "write the shards from class folders"
        )
