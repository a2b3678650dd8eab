import numpy as np
import pytest

from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.order import (
    REMOTE_LANES,
    FileOrder,
    LaneOrder,
    MixedOrder,
    Order,
    RepeatedOrder,
    ShardPlan,
    ShuffledOrder,
    build_order,
    labelled_subset,
    settings_of,
)
from quarterlight.ssl.randoms import hashes
from quarterlight.ssl.spans import EvalSpans, Spans

SAMPLES = np.arange(100, 137)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_epoch_is_a_permutation(seed):
    order = ShuffledOrder(SAMPLES, seed)
    for epoch in range(5):
        ids = order.ids(np.arange(epoch * 37, (epoch + 1) * 37))
        assert np.array_equal(np.sort(ids), SAMPLES)


def test_epochs_and_seeds_have_different_orders():
    orders = [
        tuple(ShuffledOrder(SAMPLES, seed).ids(np.arange(epoch * 37, epoch * 37 + 37)))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 6


def test_an_epoch_sorts_the_samples_by_their_hashes():
    keys = hashes(5, "order of epoch 2", np.arange(37), 1)[:, 0].tolist()
    expected = [int(sample) for _, sample in sorted(zip(keys, SAMPLES, strict=True))]
    assert ShuffledOrder(SAMPLES, 5).ids(np.arange(74, 111)).tolist() == expected


def test_the_order_is_the_one_that_earlier_runs_have_seen():
    order = ShuffledOrder(np.arange(10), 0)
    assert order.ids(np.arange(0, 10)).tolist() == [3, 1, 2, 6, 8, 9, 0, 4, 7, 5]
    assert order.ids(np.arange(10, 20)).tolist() == [8, 0, 1, 3, 7, 6, 9, 4, 2, 5]
    assert ShuffledOrder(np.arange(1000), 42).ids(np.arange(123_456, 123_464)).tolist() == [
        952,
        521,
        153,
        321,
        457,
        273,
        525,
        845,
    ]


def test_spans_join_without_a_seam_at_any_cut():
    order = ShuffledOrder(SAMPLES, 3)
    whole = order.ids(np.arange(0, 120))
    for cut in range(121):
        assert np.array_equal(np.concatenate([order.ids(np.arange(0, cut)), order.ids(np.arange(cut, 120))]), whole)


def test_a_span_may_straddle_several_epochs():
    order, small = ShuffledOrder(SAMPLES, 3), ShuffledOrder(np.arange(3), 3)
    straddling = order.ids(np.arange(30, 44))
    assert np.array_equal(straddling[:7], order.ids(np.arange(0, 37))[30:])
    assert np.array_equal(straddling[7:], order.ids(np.arange(37, 74))[:7])
    assert sorted(np.bincount(small.ids(np.arange(1, 20)))) == [6, 6, 7]


def test_the_order_has_no_memory():
    fresh = [ShuffledOrder(SAMPLES, 1).ids(np.arange(p, p + 5)) for p in (400, 0, 36, 1000, 3)]
    used = ShuffledOrder(SAMPLES, 1)
    for position, expected in zip((400, 0, 36, 1000, 3), fresh, strict=True):
        assert np.array_equal(used.ids(np.arange(position, position + 5)), expected)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5]])
def test_lanes_sort_no_epoch_twice(monkeypatch, weights):
    """An epoch is not a whole number of batches, so from the first span on every batch takes parts of two epochs."""
    sorted_epochs: list[tuple[int, int]] = []

    def counting(order: ShuffledOrder, epoch: int) -> np.ndarray:
        sorted_epochs.append((order.seed, epoch))
        return epoch_ids(order, epoch)

    epoch_ids = ShuffledOrder._epoch_ids
    monkeypatch.setattr(ShuffledOrder, "_epoch_ids", counting)
    count, batch = 1000, 64
    data = DataConfig(train="", lanes=8, train_weights=weights)
    order = build_order(
        data,
        np.arange(count),
        shards=np.arange(count) // 10,
        sources=np.arange(count) % 2,
        num_sources=2,
        seed=0,
        batch_size=batch,
        remote=True,
    )
    for start in range(40 * len(order), 44 * len(order), 16):
        order.ids(np.arange(start, start + 16))
    assert len(sorted_epochs) == len(set(sorted_epochs)) > 3


def test_an_empty_span_holds_nothing():
    assert ShuffledOrder(SAMPLES, 0).ids(np.arange(40, 40)).shape == (0,)
    assert FileOrder(SAMPLES).ids(np.arange(4, 4)).shape == (0,)


@pytest.mark.parametrize(
    "order", [ShuffledOrder(SAMPLES.copy(), 0), FileOrder(SAMPLES.copy())], ids=["shuffled", "file"]
)
def test_ids_belong_to_the_caller(order):
    before = order.ids(np.arange(0, 5)).copy()
    order.ids(np.arange(0, 5))[:] = -7
    assert np.array_equal(order.ids(np.arange(0, 5)), before)


def test_every_sample_is_equally_likely_at_every_position():
    order = ShuffledOrder(np.arange(5), 11)
    epochs = order.ids(np.arange(0, 5 * 4000)).reshape(4000, 5)
    counts = np.stack([np.bincount(column, minlength=5) for column in epochs.T])
    assert np.abs(counts - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def test_file_order_is_the_order_of_the_samples():
    order = FileOrder(SAMPLES)
    assert len(order) == 37
    assert np.array_equal(order.ids(np.arange(0, 37)), SAMPLES)
    assert np.array_equal(order.ids(np.arange(10, 12)), [110, 111])


LABELS = np.array([2, 0, 1, -1, 0, 2, 1, 1, 0, -1, 2, 0])


def test_no_number_of_samples_per_class_means_all_of_them():
    assert np.array_equal(labelled_subset(LABELS, None, 0), np.arange(12))


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_has_the_same_number_of_each_class_and_no_unlabelled_sample(seed):
    for count in (1, 2, 3):
        subset = labelled_subset(LABELS, count, seed)
        assert np.array_equal(subset, np.unique(subset))
        assert np.bincount(LABELS[subset]).tolist() == [count] * 3


def test_a_larger_subset_holds_the_smaller_one():
    labels = np.repeat(np.arange(4), 50)
    small, large = (set(labelled_subset(labels, count, 9).tolist()) for count in (5, 20))
    assert small < large


def test_subsets_depend_on_the_seed_and_are_those_of_earlier_runs():
    labels = np.repeat(np.arange(3), 10)
    assert labelled_subset(labels, 2, 0).tolist() == [3, 4, 15, 19, 20, 27]
    assert len({tuple(labelled_subset(labels, 2, seed)) for seed in range(10)}) > 5


def test_a_class_with_too_few_samples_is_named():
    with pytest.raises(InputError, match="class 1 has 3 samples"):
        labelled_subset(np.array([0, 0, 0, 0, 1, 1, 1]), 4, 0)


def test_a_subset_of_unlabelled_samples_is_refused():
    with pytest.raises(InputError):
        labelled_subset(np.full(5, -1), 1, 0)


@pytest.mark.parametrize("count", [0, -1])
def test_a_subset_of_no_samples_is_refused(count):
    with pytest.raises(InputError):
        labelled_subset(LABELS, count, 0)


# Pure functions of the position, whatever the order.

SHARDS = np.arange(37) // 5  # eight shards, the last one short


def blocks(samples: int = 400, per_shard: int = 10, block: int = 60, seed: int = 3) -> ShuffledOrder:
    return ShuffledOrder(np.arange(samples), seed, shards=np.arange(samples) // per_shard, block_samples=block)


def mixed(weights: list[float], counts: list[int], seed: int = 0) -> MixedOrder:
    """Sources one after another under one numbering."""
    starts, weights = np.cumsum([0, *counts[:-1]]), [float(weight) for weight in weights]
    parts = [ShuffledOrder(np.arange(a, a + n), seed + i) for i, (a, n) in enumerate(zip(starts, counts, strict=True))]
    return MixedOrder(parts, weights, seed)


ORDERS = {
    "shuffled": lambda: ShuffledOrder(SAMPLES, 3),
    "blocks": lambda: ShuffledOrder(SAMPLES, 3, shards=SHARDS, block_samples=12),
    "mixed": lambda: mixed([2, 0.3, 1], [7, 20, 11]),
    "repeated": lambda: RepeatedOrder(ShuffledOrder(SAMPLES, 3), 3),
    "lanes": lambda: LaneOrder(ShuffledOrder(SAMPLES, 3, shards=SHARDS, block_samples=12), 8, 4),
    "all at once": lambda: LaneOrder(RepeatedOrder(mixed([2, 0.5], [15, 22]), 2), 8, 4),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_id_depends_on_nothing_but_its_position(name):
    order, span = ORDERS[name](), np.arange(0, 260)
    assert isinstance(order, Order)
    whole = order.ids(span)
    assert np.array_equal(np.concatenate([ORDERS[name]().ids(span[i : i + 1]) for i in span]), whole)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.choice(260, 9, replace=False))
        assert np.array_equal(np.concatenate([order.ids(part) for part in np.split(span, cuts)]), whole)
        asked = rng.integers(0, 260, 300)  # in any order, some of them twice
        assert np.array_equal(order.ids(asked), whole[asked])
    assert set(whole.tolist()) <= set(order.samples.tolist())


@pytest.mark.parametrize("name", ORDERS)
def test_far_positions_are_reached_at_once_and_are_those_that_walking_reaches(name):
    walked, deep = ORDERS[name](), 40_000
    for start in range(0, deep, 1000):
        last = walked.ids(np.arange(start, start + 1000))
    assert np.array_equal(ORDERS[name]().ids(np.arange(deep - 1000, deep)), last)
    assert len(ORDERS[name]().ids(np.arange(10**12, 10**12 + 5))) == 5


# Blocks of shards.


@pytest.mark.parametrize("block", [1, 7, 10, 60, 399, 400, 10_000])
def test_every_epoch_of_blocks_is_a_permutation(block):
    order = blocks(block=block)
    epochs = order.ids(np.arange(3 * 400)).reshape(3, 400)
    assert all(np.array_equal(np.sort(epoch), np.arange(400)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("block", [20, 60, 100])
def test_the_samples_of_a_block_come_from_few_shards_and_are_shuffled_among_them(block):
    order = blocks(block=block)
    for epoch in range(4):
        ids = order.ids(np.arange(epoch * 400, (epoch + 1) * 400))
        seen: list[set[int]] = []
        assert (np.diff(ids // 10) != 0).mean() > 0.4, "not one shard after another"
        for start in range(0, 400, block):
            here = ids[start : start + block]
            seen.append(set((here // 10).tolist()))
            assert len(seen[-1]) == min(block, 400 - start) // 10
        assert sum(map(len, seen)) == 40, "no shard is needed in two blocks"


def test_shards_come_in_another_order_in_each_epoch_and_for_each_seed():
    def firsts(order: ShuffledOrder, epoch: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys((order.ids(np.arange(epoch * 400, (epoch + 1) * 400)) // 10).tolist()))

    orders = {firsts(blocks(block=10, seed=seed), epoch) for seed in (0, 1) for epoch in range(4)}
    assert len(orders) == 8
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_unequal_shards_that_are_not_numbered_from_zero_are_shuffled_in_blocks_too():
    shards = np.repeat([3, 8, 9, 40, 41], [1, 50, 2, 30, 17])
    order = ShuffledOrder(np.arange(200, 300), 0, shards=shards, block_samples=40)
    for epoch in range(6):
        ids = order.ids(np.arange(epoch * 100, epoch * 100 + 100))
        assert np.array_equal(np.sort(ids), np.arange(200, 300))
        spans = [np.flatnonzero(shards[ids - 200] == shard) for shard in (8, 40, 41)]
        assert all(span.max() - span.min() < 90 for span in spans), "a shard lies in one block"


def test_one_block_of_everything_is_the_order_without_blocks():
    for block in (400, 10_000):
        assert np.array_equal(
            blocks(block=block).ids(np.arange(900)), ShuffledOrder(np.arange(400), 3).ids(np.arange(900))
        )


# Mixtures.


@pytest.mark.parametrize("weight", [2, 1, 0.5, 0.3, 1.5])
@pytest.mark.parametrize("count", [10, 11, 40])
def test_a_weight_says_how_often_an_epoch_shows_each_sample_of_a_source(weight, count):
    order, epochs = mixed([weight, 1], [count, 20]), 10
    assert len(order) == round(weight * count) + 20
    for epoch in range(epochs):
        ids = order.ids(np.arange(epoch * len(order), (epoch + 1) * len(order)))
        shown = np.bincount(ids, minlength=count + 20)
        assert shown[:count].sum() == round(weight * count)
        assert set(shown[count:]) == {1}
    total = np.bincount(order.ids(np.arange(epochs * len(order))), minlength=count + 20)[:count]
    mean = epochs * round(weight * count) / count
    assert set(total) <= {np.floor(mean), np.ceil(mean)}, "each is shown as often as any other, or once more"


def test_the_sources_of_a_mixture_are_shuffled_together():
    order = mixed([1, 1], [300, 300])
    first = order.ids(np.arange(600)) < 300
    assert 100 < first[:300].sum() < 200
    assert np.array_equal(order.ids(np.arange(600)) < 300, first)
    assert not np.array_equal(order.ids(np.arange(600, 1200)) < 300, first)


def test_a_source_with_a_tiny_weight_still_has_a_position_in_every_epoch():
    order = mixed([1e-6, 1], [5, 20])
    assert len(order) == 21
    assert sorted(order.ids(np.arange(5 * 21))[order.ids(np.arange(5 * 21)) < 5].tolist()) == list(range(5))


# Repeats.


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_repeats_follow_each_other_and_every_sample_comes_as_often(repeats):
    order = RepeatedOrder(ShuffledOrder(SAMPLES, 3), repeats)
    assert len(order) == 37 and np.array_equal(order.samples, SAMPLES)
    ids = order.ids(np.arange(repeats * 37 * 2))
    for rounds in ids.reshape(2, 37, repeats):
        assert (rounds == rounds[:, :1]).all()
        assert np.array_equal(np.sort(rounds[:, 0]), SAMPLES)


# Lanes.


@pytest.mark.parametrize("count", [96, 103, 37, 8, 5, 1])
@pytest.mark.parametrize(("batch", "lanes"), [(8, 1), (8, 2), (8, 4), (8, 8), (12, 4), (64, 8)])
def test_lanes_exchange_positions_within_a_span_only(count, batch, lanes):
    base = ShuffledOrder(np.arange(count), 3)
    order, span = LaneOrder(base, batch, lanes), max(1, count // batch) * batch
    assert len(order) == count
    for k in range(4):
        there = np.arange(k * span, (k + 1) * span)
        assert np.array_equal(np.sort(order.ids(there)), np.sort(base.ids(there)))
    if count >= batch and count % batch == 0:
        assert np.array_equal(np.sort(order.ids(np.arange(count))), np.arange(count)), "an epoch"
    distinct = LaneOrder(_Positions(10**6), batch, lanes).ids(np.arange(5 * span))
    assert len(set(distinct.tolist())) == 5 * span


class _Positions:
    """The order whose ids are the positions."""

    def __init__(self, count: int) -> None:
        self.samples = np.arange(count)

    def __len__(self) -> int:
        return len(self.samples)

    def ids(self, positions):
        return np.array(positions)


def test_the_samples_of_a_step_are_the_same_for_every_world_that_divides_the_batch():
    order = LaneOrder(blocks(), 24, 8)
    for step in (0, 3, 17, 40):
        whole = order.ids(np.arange(step * 24, (step + 1) * 24))
        for world in (1, 2, 3, 4, 6, 8, 12, 24):
            share = 24 // world
            parts = [order.ids(step * 24 + np.arange(rank * share, (rank + 1) * share)) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), whole)


def test_a_node_that_reads_a_quarter_of_every_batch_touches_a_quarter_of_the_shards():
    count, batch = 100_000, 256
    shards = np.arange(count) // 500
    base = ShuffledOrder(np.arange(count), 0, shards=shards, block_samples=4000)
    steps, touched = np.arange(count // batch)[:, None] * batch, []
    for node in range(4):
        positions = (steps + np.arange(node * 64, (node + 1) * 64)).ravel()
        touched.append(len(np.unique(shards[LaneOrder(base, batch, 8).ids(positions)])))
        assert len(np.unique(shards[base.ids(positions)])) == 200, "without lanes it would be all of them"
    assert max(touched) <= 200 / 4 * 1.3


# What a node fetches.


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("remote", [frozenset(range(40)), frozenset(range(0, 40, 3)), frozenset()])
def test_a_plan_names_the_remote_shards_of_the_nodes_positions_in_their_order(nodes, remote):
    order, batch, shard_of = LaneOrder(blocks(), 32, 4), 32, np.arange(400) // 10
    steps, share = range(5, 21), 32 // nodes
    for node in range(nodes):
        ranks = range(2 * node, 2 * node + 2)  # two processes a machine, each with micro-batches of 4
        sizes = {"batch_size": batch, "micro_batch_size": 4, "world_size": 2 * nodes}
        plan = list(ShardPlan(order, shard_of, [Spans(steps, **sizes, rank=rank) for rank in ranks], remote))
        expected, number = [], 0
        for step in steps:
            for first in range(0, share // 2, 4):
                positions = [step * batch + rank * share // 2 + first + i for rank in ranks for i in range(4)]
                needed = [int(order.ids(np.array([p]))[0]) // 10 for p in positions]
                expected += [(number, shard) for shard in dict.fromkeys(needed) if shard in remote]
                number += 1
        assert plan == expected
        assert [batch for batch, _ in plan] == sorted(batch for batch, _ in plan)
        assert number == len(Spans(steps, **sizes, rank=0))


@pytest.mark.parametrize("count", [0, 1, 5, 50, 400])
def test_the_plan_of_an_evaluation_names_all_shards_although_one_process_has_a_batch_more(count):
    order, shard_of = FileOrder(np.arange(count)), np.arange(400) // 10
    parts = [EvalSpans(count, batch_size=7, rank=rank, world_size=3) for rank in range(3)]
    plan = list(ShardPlan(order, shard_of, parts, frozenset(range(40))))
    expected = {
        (number, int(shard)) for part in parts for number, span in enumerate(part) for shard in shard_of[slice(*span)]
    }
    assert set(plan) == expected and len(plan) == len(expected)
    assert {shard for _, shard in plan} == set(range(-(-count // 10)))


def test_a_plan_can_be_gone_through_again_and_needs_no_end():
    spans = Spans(range(10**9), batch_size=32, micro_batch_size=32, rank=0, world_size=1)
    plan = ShardPlan(blocks(), np.arange(400) // 10, [spans], frozenset(range(40)))
    first = [entry for entry, _ in zip(plan, range(50), strict=False)]
    assert [entry for entry, _ in zip(plan, range(50), strict=False)] == first


# What a configuration asks for.


def built(count: int = 400, *, batch_size: int = 16, remote: bool = False, num_sources: int = 2, **data) -> Order:
    """The first 100 samples are one source, the others a second one; 20 samples a shard."""
    return build_order(
        DataConfig(train="a::b", **data),
        np.arange(count),
        shards=np.arange(count) // 20,
        sources=(np.arange(count) >= 100).astype(int),
        num_sources=num_sources,
        seed=5,
        batch_size=batch_size,
        remote=remote,
    )


def test_local_shards_are_shuffled_as_a_whole():
    assert np.array_equal(built().ids(np.arange(1000)), ShuffledOrder(np.arange(400), 5).ids(np.arange(1000)))


def test_remote_shards_are_read_in_lanes_that_divide_the_batch():
    for batch, lanes in ((16, 8), (12, 4), (7, 1), (64, REMOTE_LANES)):
        order = built(batch_size=batch, remote=True)
        assert (order.lanes if isinstance(order, LaneOrder) else 1) == lanes
    assert not isinstance(built(batch_size=16, remote=True, lanes=1), LaneOrder)


@pytest.mark.parametrize(
    ("lanes", "batch", "use"), [(3, 16, "1, 2, 4"), (6, 16, "1, 2, 4, 8"), (32, 16, "2, 4, 8, 16"), (5, 7, "1, 7")]
)
def test_lanes_that_do_not_divide_the_batch_are_refused_with_numbers_that_do(lanes, batch, use):
    with pytest.raises(InputError, match=f"data.lanes {lanes} does not divide batch_size {batch}: use {use}$"):
        built(lanes=lanes, batch_size=batch)
    for number in use.split(", "):
        built(lanes=int(number), batch_size=batch)


@pytest.mark.parametrize(("repeats", "lanes", "left"), [(3, 1, 16), (32, 1, 16), (4, 8, 2), (2, 16, 1)])
def test_repeats_that_do_not_divide_a_lane_of_the_batch_are_refused(repeats, lanes, left):
    with pytest.raises(InputError, match=f"data.repeats {repeats} does not divide {left}, the images of a lane"):
        built(repeats=repeats, lanes=lanes)
    built(repeats=left, lanes=lanes)


def test_the_settings_of_an_order_are_its_own_numbers_whatever_null_stands_for():
    plain = {"lanes": 1, "block_samples": 400, "repeats": 1, "samples_of_sources": [400]}
    assert (
        settings_of(built()) == settings_of(built(block_samples=400)) == settings_of(built(block_samples=9999)) == plain
    )
    assert settings_of(built(remote=True)) == plain | {"lanes": 8}  # one block is one block, however large
    assert settings_of(built(remote=True, lanes=1)) == plain
    assert settings_of(built(lanes=2, repeats=4, block_samples=60)) == plain | {
        "lanes": 2, "repeats": 4, "block_samples": 60,
    }  # fmt: skip
    assert settings_of(built(repeats=2)) == plain | {"repeats": 2}
    weighted = settings_of(built(lanes=2, repeats=2, block_samples=50, train_weights=[1.0, 1.0]))
    assert weighted == {
        "lanes": 2,
        "block_samples": 50,
        "repeats": 2,
        "samples_of_sources": weighted["samples_of_sources"],
    }
    assert len(weighted["samples_of_sources"]) == 2
    other = settings_of(built(train_weights=[2.0, 1.0]))["samples_of_sources"]
    assert other != weighted["samples_of_sources"], "other weights are another order"
    assert settings_of(FileOrder(np.arange(5)))["repeats"] == 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_another_number_of_weights_than_sources_is_refused(weights):
    with pytest.raises(InputError, match=f"data.train_weights has {len(weights)} numbers for 2 sources"):
        built(train_weights=weights)


def test_a_weighted_source_without_samples_is_refused():
    with pytest.raises(InputError, match="source 2 of 2 has no samples"):
        built(count=90, train_weights=[1.0, 1.0])


def test_weights_blocks_repeats_and_lanes_go_together():
    order = built(train_weights=[2.0, 0.5], block_samples=50, repeats=2, lanes=4)
    assert len(order) == 2 * 100 + 150
    span = 350 // 16 * 16
    ids = order.ids(np.arange(4 * span))
    assert np.array_equal(ids[::2], ids[1::2]), "repeats lie within a lane"
    counts = np.bincount(ids, minlength=400)
    assert set(counts[:100]) <= {6, 8} and set(counts[100:]) <= {0, 2}, "4 epochs less a few positions"
    plain = built(train_weights=[2.0, 0.5], block_samples=50, repeats=2)
    for k in range(4):
        there = np.arange(k * span, (k + 1) * span)
        assert np.array_equal(np.sort(order.ids(there)), np.sort(plain.ids(there)))
    inner = built(train_weights=[2.0, 0.5], block_samples=50)
    assert np.array_equal(plain.ids(np.arange(700)), np.repeat(inner.ids(np.arange(350)), 2))
    of_first = inner.ids(np.arange(350))
    of_first = of_first[of_first < 100][:100]
    assert sorted(of_first.tolist()) == list(range(100))
    assert [len(set((of_first[i : i + 60] // 20).tolist())) for i in (0,)] == [3], "blocks of three shards"
