import numpy as np
import pytest

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.order import FileOrder, ShuffledOrder, labelled_subset
from quarterlight.ssl.randoms import hashes

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
