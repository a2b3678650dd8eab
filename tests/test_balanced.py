"""Every class equally often, as a pure function of seed, epoch and position."""

from collections import Counter

import numpy as np
import pytest

from quarterlight.ssl.balanced import BalancedOrder
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.order import build_order, settings_of
from quarterlight.ssl.spans import Spans

LABELS = np.repeat([3, 0, 7, 5], [50, 1, 4, 17])
IDS = np.arange(100, 100 + len(LABELS))


def order(seed: int = 0) -> BalancedOrder:
    return BalancedOrder(IDS, LABELS, seed)


def label_of(ids: np.ndarray) -> np.ndarray:
    return LABELS[ids - 100]


def test_every_epoch_has_as_many_positions_of_each_class_in_another_order():
    balanced, epochs = order(), []
    assert len(balanced) == 4 * 18  # 72 samples
    for epoch in range(5):
        epochs.append(balanced.ids(np.arange(epoch * 72, (epoch + 1) * 72)))
        assert Counter(label_of(epochs[-1]).tolist()) == dict.fromkeys((0, 3, 5, 7), 18)
    assert len({tuple(ids) for ids in epochs}) == 5
    assert len({tuple(label_of(ids)) for ids in epochs}) == 5


def test_no_sample_comes_again_before_the_others_of_its_class():
    balanced = order(1)
    for label, count in ((3, 50), (0, 1), (7, 4), (5, 17)):
        drawn: list[int] = []
        for epoch in range(100):  # inside an epoch classes are mixed, so the order of a class is asked for by itself
            parts = balanced._drawn(epoch * 18, (epoch + 1) * 18)
            drawn += IDS[parts[[0, 3, 5, 7].index(label)]].tolist()
        assert {int(label_of(np.array([i]))[0]) for i in drawn} == {label}
        rounds = [drawn[i : i + count] for i in range(0, len(drawn) - count + 1, count)]
        assert all(len(set(ids)) == count for ids in rounds)
        assert count < 4 or len({tuple(ids) for ids in rounds}) > 10  # each in an order of its own


def test_what_an_epoch_shows_is_what_the_classes_have_drawn():
    balanced = order(2)
    for epoch in (0, 3):
        shown = balanced.ids(np.arange(epoch * 72, (epoch + 1) * 72))
        drawn = np.concatenate([IDS[part] for part in balanced._drawn(epoch * 18, (epoch + 1) * 18)])
        assert sorted(shown) == sorted(drawn)


def test_any_positions_of_it_are_the_same_however_and_wherever_they_are_asked_for():
    whole = order().ids(np.arange(720))
    for batch, world in ((12, 1), (12, 2), (12, 4), (8, 2)):
        for first in (0, 3):
            seen: dict[int, int] = {}
            for rank in range(world):
                spans = Spans(range(first, 20), batch_size=batch, micro_batch_size=1, rank=rank, world_size=world)
                mine = order()  # a process of its own
                for start, stop in spans:
                    seen |= dict(zip(range(start, stop), mine.ids(np.arange(start, stop)).tolist(), strict=True))
            assert seen == {p: whole[p] for p in range(first * batch, 20 * batch)}
    assert not np.array_equal(order(1).ids(np.arange(72)), whole[:72])


def test_with_classes_alike_every_sample_comes_once_an_epoch():
    balanced = BalancedOrder(np.arange(60), np.arange(60) % 4, 0)
    for epoch in range(3):
        assert sorted(balanced.ids(np.arange(epoch * 60, (epoch + 1) * 60))) == list(range(60))


def test_a_long_tail_is_quick():
    labels = np.repeat(np.arange(2000), np.maximum(1, 5000 // np.arange(1, 2001)))
    balanced = BalancedOrder(np.arange(len(labels)), labels, 0)
    ids = balanced.ids(np.arange(7 * len(balanced), 8 * len(balanced)))
    assert set(np.bincount(labels[ids])) == {balanced.per_class}


def built(remote: bool = False, **data):
    places = np.zeros_like(IDS)
    config = DataConfig(train="t", **data)
    more = {"shards": places, "sources": places, "num_sources": 1, "seed": 0, "batch_size": 12, "remote": remote}
    return build_order(config, IDS, **more, balanced=LABELS)


def test_repeats_and_lanes_go_on_top():
    assert isinstance(built(), BalancedOrder)
    twice = built(repeats=2).ids(np.arange(8))
    assert (twice[::2] == twice[1::2]).all()
    assert settings_of(built(repeats=2, lanes=2))["samples_of_sources"] == [72]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"remote": True}, "copy them to a local disk, or give class_weights balanced"),
        ({"block_samples": 10}, "data.balanced and data.block_samples"),
        ({"train_weights": [1.0]}, "data.balanced and data.train_weights"),
    ],
)
def test_what_it_cannot_be_combined_with_is_said(how: dict, said: str):
    with pytest.raises(InputError, match=said):
        built(**how)
