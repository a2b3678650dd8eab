"""Which positions of a run a process reads, batch by batch; the same samples for any number of processes.

Without torch, so that the process that fetches remote shards knows them without loading it.
"""

from collections.abc import Iterator, Sequence


class Spans:
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
        self.world_size = world_size

    def of_rank(self, rank: int) -> "Spans":
        """Returns the spans that another rank reads."""
        sizes = {"batch_size": self.batch_size, "micro_batch_size": self.micro_batch_size}
        return Spans(self.steps, **sizes, rank=rank, world_size=self.world_size)

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


class EvalSpans:
    """Positions 0, ..., num_samples - 1 once over all ranks; the last batch of a rank may be short."""

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.first, self.last = num_samples * rank // world_size, num_samples * (rank + 1) // world_size
        self.batch_size = batch_size
        self.num_samples, self.rank, self.world_size = num_samples, rank, world_size

    def of_rank(self, rank: int) -> "EvalSpans":
        """Returns the spans that another rank reads."""
        return EvalSpans(self.num_samples, batch_size=self.batch_size, rank=rank, world_size=self.world_size)

    @property
    def largest(self) -> int:
        """The most positions in a span."""
        return max(1, min(self.batch_size, self.last - self.first))

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(self.first, self.last, self.batch_size):
            yield start, min(start + self.batch_size, self.last)


class ChunkSpans(EvalSpans):
    """Chunks of positions, each read whole by one rank: what is done chunk by chunk can be continued by any number."""

    def __init__(self, chunks: Sequence[tuple[int, int]], *, batch_size: int, rank: int, world_size: int) -> None:
        """Gives chunk i, positions first, ..., last - 1, to rank i % world_size."""
        self.chunks, self.mine = chunks, chunks[rank::world_size]
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def of_rank(self, rank: int) -> "ChunkSpans":
        """Returns the spans that another rank reads."""
        return ChunkSpans(self.chunks, batch_size=self.batch_size, rank=rank, world_size=self.world_size)

    @property
    def largest(self) -> int:
        """The most positions in a span."""
        return max([1, *(min(self.batch_size, last - first) for first, last in self.mine)])

    def __len__(self) -> int:
        return sum(-(-(last - first) // self.batch_size) for first, last in self.mine)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first, last in self.mine:
            for start in range(first, last, self.batch_size):
                yield start, min(start + self.batch_size, last)


def chunks_of(numbers: Sequence[int], size: int, num_samples: int) -> list[tuple[int, int]]:
    """Returns the first position of each of these chunks of `size` positions, and that behind its last."""
    return [(number * size, min((number + 1) * size, num_samples)) for number in numbers]


AnySpans = Spans | EvalSpans
