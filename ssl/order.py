"""The order of samples: a pure function of (seed, position), the same for any number of ranks and workers.

Position p of a run belongs to epoch p // num_samples; a batch may straddle two epochs, so no sample is ever dropped.
An order is an object with `len` (the positions of an epoch), `samples` (all ids it may give) and `ids(positions)`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from .balanced import BalancedOrder
from .config import DataConfig
from .epochs import ByEpoch, permutation
from .errors import InputError
from .randoms import hashes

REMOTE_BLOCK_SAMPLES = 16384
REMOTE_LANES = 8


@runtime_checkable  # by the tests, at every call
class Order(Protocol):
    """Which sample is at which position."""

    @property
    def samples(self) -> Int[np.ndarray, " n"]:
        """All ids it may give."""
        ...

    def __len__(self) -> int: ...

    def ids(self, positions: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """Returns the sample ids at these positions."""
        ...


class ShuffledOrder(ByEpoch):
    """Every epoch visits every sample once, in an order of its own.

    With `shards` and `block_samples`, shards come in a random order, about `block_samples` at a time, and samples are
    shuffled within such a block: so few shards are in use at any time, as a cache of remote ones needs.

    The permutation sorts hashes rather than calling numpy's shuffle, whose stream may change between versions: a
    resumed run must find the same order. 1.3 M samples take 0.1 s once an epoch, and so does resuming anywhere.
    """

    def __init__(
        self,
        samples: Int[np.ndarray, " n"],
        seed: int,
        *,
        shards: Int[np.ndarray, " n"] | None = None,  # the shard of each sample
        block_samples: int | None = None,  # None: one block
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.shards = None if block_samples is None else shards
        self.block_samples = block_samples

    def __len__(self) -> int:
        return len(self.samples)

    def _epoch_ids(self, epoch: int) -> np.ndarray:
        places = permutation(self.seed, f"order of epoch {epoch}", len(self))
        if self.shards is not None and self.block_samples is not None:
            blocks = self._blocks(epoch)
            blocks = blocks.astype(np.min_scalar_type(blocks.max(initial=0)))  # 16 bits are sorted by counting
            places = places[np.argsort(blocks[places], kind="stable")]
        return self.samples[places]

    def _blocks(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Returns the block of each sample: that in which its shard begins, in this epoch's order of the shards."""
        assert self.shards is not None and self.block_samples is not None
        shards, counts = np.unique(self.shards, return_counts=True)
        rank = np.argsort(hashes(self.seed, f"shards of epoch {epoch}", shards, 1)[:, 0], kind="stable")
        starts = np.empty_like(counts)
        starts[rank] = np.cumsum(counts[rank]) - counts[rank]
        return (starts // self.block_samples)[np.searchsorted(shards, self.shards)]


class MixedOrder(ByEpoch):
    """Several orders in one, shuffled together: an epoch takes round(weight * samples) positions of each.

    So weight 2 shows every sample of a source twice an epoch and 0.5 every second epoch, up to that rounding; each
    source goes through its own epochs without a gap.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.orders = list(orders)
        self.samples = np.concatenate([order.samples for order in orders])
        self.counts = [max(1, round(w * len(order))) for w, order in zip(weights, orders, strict=True)]
        self.seed = seed

    def __len__(self) -> int:
        return sum(self.counts)

    def _epoch_ids(self, epoch: int) -> np.ndarray:
        places = permutation(self.seed, f"mixture of epoch {epoch}", len(self))
        which = np.repeat(np.arange(len(self.orders)), self.counts)[places]
        ids = np.empty(len(self), np.int64)
        for i, (order, count) in enumerate(zip(self.orders, self.counts, strict=True)):
            ids[which == i] = order.ids(np.arange(epoch * count, (epoch + 1) * count))
        return ids


@dataclass
class _Rearranged:
    """An order that visits the positions of another one differently."""

    order: Order

    @property
    def samples(self) -> Int[np.ndarray, " n"]:
        """All ids it may give."""
        return self.order.samples

    def __len__(self) -> int:
        return len(self.order)


@dataclass
class RepeatedOrder(_Rearranged):
    """`repeats` positions in a row show the same sample: one decoding, several crops and masks.

    An epoch keeps its number of positions, as with timm's RepeatAugSampler: a pass over all samples takes `repeats`
    epochs (Hoffer et al. 2020, "Augment your batch"; MAE-ST and Hiera decode a video once for several clips).
    """

    repeats: int

    def ids(self, positions: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """Returns the sample ids at these positions."""
        return self.order.ids(positions // self.repeats)


@dataclass
class LaneOrder(_Rearranged):
    """Gives each of `lanes` parts of every batch a stretch of the order of its own, so that a node needs few shards.

    A node that reads the first quarter of every batch goes through the first quarter of an epoch, from end to end. The
    samples of a step depend on `lanes` and `batch_size` but not on how many ranks share them. Positions are only
    exchanged within a span of whole batches about an epoch long, so still every sample comes once.
    """

    batch_size: int
    lanes: int  # divides batch_size

    def ids(self, positions: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """Returns the sample ids at these positions."""
        steps = max(1, len(self) // self.batch_size)
        span, inside = np.divmod(positions, steps * self.batch_size)
        step, place = np.divmod(inside, self.batch_size)
        per_lane = self.batch_size // self.lanes
        lane, in_lane = np.divmod(place, per_lane)
        return self.order.ids(span * steps * self.batch_size + (lane * steps + step) * per_lane + in_lane)


class FileOrder:
    """The order in which samples lie in the shards, once: for evaluation."""

    def __init__(self, samples: Int[np.ndarray, " n"]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def ids(self, positions: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """Returns the sample ids at these positions."""
        return self.samples[positions]


def build_order(
    data: DataConfig,
    samples: Int[np.ndarray, " n"],
    *,
    shards: Int[np.ndarray, " n"],
    sources: Int[np.ndarray, " n"],
    num_sources: int,
    seed: int,
    batch_size: int,
    remote: bool,
    balanced: Int[np.ndarray, " n"] | None = None,
) -> Order:
    """Returns the order of a training run; `shards` and `sources` are those of each of `samples`.

    Local shards are shuffled as a whole. Remote ones in blocks, and in lanes where there are several machines. With
    the labels of `samples` as `balanced`, every class comes equally often.
    Raises InputError for weights, lanes, repeats or a balance that do not fit.
    """
    block = data.block_samples if data.block_samples is not None or not remote else REMOTE_BLOCK_SAMPLES
    lanes = data.lanes if data.lanes is not None else (math.gcd(REMOTE_LANES, batch_size) if remote else 1)
    if batch_size % lanes:
        divisors = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= 2 * lanes]
        raise InputError(f"data.lanes {lanes} does not divide batch_size {batch_size}: use {', '.join(divisors[-4:])}")
    if batch_size // lanes % data.repeats:
        raise InputError(
            f"data.repeats {data.repeats} does not divide {batch_size // lanes}, the images of a lane in a batch "
            f"(batch_size {batch_size} / data.lanes {lanes}): use a divisor of it"
        )
    weights = data.train_weights
    if balanced is not None:
        _refuse_balance(data, remote)
        order: Order = BalancedOrder(samples, balanced, seed)
    elif weights is None:
        order = ShuffledOrder(samples, seed, shards=shards, block_samples=block)
    else:
        if len(weights) != num_sources:
            raise InputError(
                f"data.train_weights has {len(weights)} numbers for {num_sources} sources in data.train: give one each"
            )
        parts = [sources == i for i in range(num_sources)]
        if empty := [i for i, part in enumerate(parts) if not part.any()]:
            raise InputError(
                f"data.train: source {empty[0] + 1} of {num_sources} has no samples of its own: its shards stand in an "
                "earlier source too"
            )
        mixed = [
            ShuffledOrder(samples[part], seed + i, shards=shards[part], block_samples=block)
            for i, part in enumerate(parts)
        ]
        order = MixedOrder(mixed, weights, seed)
    if data.repeats > 1:
        order = RepeatedOrder(order, data.repeats)
    return LaneOrder(order, batch_size, lanes) if lanes > 1 else order


def _refuse_balance(data: DataConfig, remote: bool) -> None:
    """Raises InputError where samples of all classes cannot be had at any time."""
    if remote:
        raise InputError(
            "data.balanced takes images from all shards at any time, and remote ones come one after another: copy them "
            "to a local disk, or give class_weights balanced instead"
        )
    for name in ("train_weights", "block_samples"):
        if getattr(data, name) is not None:
            raise InputError(f"data.balanced and data.{name} are given, and each decides the order: take one back")


def settings_of(order: Order) -> dict[str, Any]:
    """Returns what decides an order beside its seed and samples, as numbers: null means others for remote shards."""
    lanes, repeats = 1, 1
    while isinstance(order, LaneOrder | RepeatedOrder):
        lanes = order.lanes if isinstance(order, LaneOrder) else lanes
        repeats = order.repeats if isinstance(order, RepeatedOrder) else repeats
        order = order.order
    parts = order.orders if isinstance(order, MixedOrder) else [order]
    blocks = [x.block_samples or len(x) for x in parts if isinstance(x, ShuffledOrder)]
    counts = order.counts if isinstance(order, MixedOrder) else [len(order)]
    size = min(max(blocks, default=0), len(order.samples))  # one block is one block, however large
    return {"lanes": lanes, "block_samples": size, "repeats": repeats, "samples_of_sources": counts}


@dataclass
class ShardPlan:
    """Which shards a machine needs, by the number of the batch that needs them: what is fetched ahead."""

    order: Order
    shard_of: Int[np.ndarray, " n"]  # shard of each sample id
    spans: Sequence[Iterable[tuple[int, int]]]  # the positions that each process of the machine reads, batch by batch
    remote: frozenset[int]  # the shards that have to be fetched

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number, together in enumerate(zip_longest(*self.spans)):
            positions = np.concatenate([np.arange(*span) for span in together if span is not None])
            shards = self.shard_of[self.order.ids(positions)].tolist()
            yield from ((number, shard) for shard in dict.fromkeys(shards) if shard in self.remote)


def labelled_subset(labels: Int[np.ndarray, " n"], samples_per_class: int | None, seed: int) -> Int[np.ndarray, " m"]:
    """Returns the ids of `samples_per_class` samples of each class, drawn by `seed`; null: all samples.

    Raises InputError when there are no labels, or when a class has fewer.
    """
    if samples_per_class is None:
        return np.arange(len(labels))
    if samples_per_class < 1:
        raise InputError(f"samples_per_class is {samples_per_class}: give at least 1, or null for all samples")
    if not (labels >= 0).any():
        raise InputError("samples_per_class is given, but no sample has a label (no .cls or .json in the shards)")
    rank = hashes(seed, "labelled subset", np.arange(len(labels)), 1)[:, 0]
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        (members,) = np.nonzero(labels == label)
        if len(members) < samples_per_class:
            raise InputError(f"samples_per_class is {samples_per_class}, but class {label} has {len(members)} samples")
        chosen.append(members[np.argsort(rank[members], kind="stable")[:samples_per_class]])
    return np.sort(np.concatenate(chosen))
