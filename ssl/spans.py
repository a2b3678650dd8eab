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


class BlockSpans:
    """Positions of whole blocks, batch by batch, the blocks dealt out among ranks in turn.

    Block b covers positions b * block to (b + 1) * block - 1, and no batch reaches over its end: whatever the number of
    ranks, and whichever blocks are done already, batches consist of the same samples.
    """

    def __init__(
        self, blocks: Sequence[int], *, num_samples: int, block: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self.blocks = blocks  # those that are still to be done
        self.num_samples, self.block, self.batch_size = num_samples, block, batch_size
        self.rank, self.world_size = rank, world_size

    def of_rank(self, rank: int) -> "BlockSpans":
        """Returns the spans that another rank reads."""
        sizes = {"num_samples": self.num_samples, "block": self.block, "batch_size": self.batch_size}
        return BlockSpans(self.blocks, **sizes, rank=rank, world_size=self.world_size)

    @property
    def largest(self) -> int:
        """The most positions in a span."""
        return max(1, min(self.batch_size, self.block, self.num_samples))

    def __len__(self) -> int:
        sizes = (min(self.block, self.num_samples - number * self.block) for number in self._mine())
        return sum(-(-size // self.batch_size) for size in sizes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in self._mine():
            last = min((number + 1) * self.block, self.num_samples)
            for start in range(number * self.block, last, self.batch_size):
                yield start, min(start + self.batch_size, last)

    def _mine(self) -> Sequence[int]:
        return self.blocks[self.rank :: self.world_size]


AnySpans = Spans | EvalSpans | BlockSpans
