"""Nearest neighbors against scikit-learn's."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from quarterlight.ssl.knn import knn_predictions, nearest

GENERATOR = torch.Generator().manual_seed(0)
CLASSES = 4
CENTERS = torch.randn(CLASSES, 12, generator=GENERATOR)


def blobs(count: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (count,), generator=GENERATOR)
    features = CENTERS[labels] + spread * torch.randn(count, 12, generator=GENERATOR)
    return features * torch.rand(count, 1, generator=GENERATOR).add(0.1), labels


TRAIN, LABELS = blobs(300)
QUERIES, TRUTH = blobs(101)


def scikit(neighbors: int, temperature: float) -> np.ndarray:
    model = KNeighborsClassifier(
        neighbors, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    return model.fit(TRAIN.double().numpy(), LABELS.numpy()).predict(QUERIES.double().numpy())


def ours(neighbors: int = 10, temperature: float = 0.07, **given: object) -> Tensor:
    options = {"neighbors": neighbors, "num_classes": CLASSES, "temperature": temperature} | given
    return knn_predictions(TRAIN, LABELS, QUERIES, **options)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1e3])
@pytest.mark.parametrize("neighbors", [1, 10, 20, 300])
def test_predictions_are_those_of_scikit_learn(neighbors: int, temperature: float):
    np.testing.assert_array_equal(ours(neighbors, temperature).numpy(), scikit(neighbors, temperature))


def test_the_test_data_is_neither_trivial_nor_hopeless():
    assert 0.5 < float((ours() == TRUTH).float().mean()) < 0.99


def test_the_length_of_a_feature_does_not_matter():
    scaled = knn_predictions(TRAIN * 7, LABELS, QUERIES * 0.01, neighbors=10, num_classes=CLASSES, temperature=0.07)
    assert torch.equal(scaled, ours())


@pytest.mark.parametrize("chunk", [1, 7, 101, 500])
def test_chunks_do_not_change_predictions(chunk: int):
    assert torch.equal(ours(query_block=chunk), ours())


def test_votes_are_counted_a_block_of_queries_at_a_time(monkeypatch: pytest.MonkeyPatch):
    wanted = ours()
    monkeypatch.setattr("quarterlight.ssl.knn.VOTE_BLOCK", 7)
    assert torch.equal(ours(), wanted)


def test_more_neighbors_than_features_are_all_features():
    assert torch.equal(ours(neighbors=10_000), ours(neighbors=300))


@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-4])
def test_at_a_low_temperature_the_nearest_neighbor_decides(temperature: float):
    nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(TRAIN.numpy(), LABELS.numpy())
    similarity = torch.nn.functional.normalize(QUERIES, dim=1) @ torch.nn.functional.normalize(TRAIN, dim=1).T
    first, second = similarity.topk(2, dim=1).values.T
    is_clear = (first - second) / temperature > 5
    assert int(is_clear.sum()) > 10
    expected = torch.from_numpy(nearest.predict(QUERIES.numpy()))
    assert torch.equal(ours(neighbors=2, temperature=temperature)[is_clear], expected[is_clear])


def test_far_queries_are_voted_on_too():
    found = knn_predictions(
        torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([2, 2]), torch.tensor([[-1.0, 0.05]]),
        neighbors=2, num_classes=3, temperature=0.01,
    )  # fmt: skip
    assert found.tolist() == [2]


def test_classes_that_no_feature_has_are_never_predicted():
    assert int(ours(num_classes=CLASSES + 3).max()) < CLASSES


@pytest.mark.parametrize(("query_block", "bank_block"), [(1, 1), (7, 13), (101, 299), (500, 64)])
@pytest.mark.parametrize("neighbors", [1, 20, 300])
def test_blocks_of_both_sides_find_the_neighbors_of_scikit_learn(neighbors: int, query_block: int, bank_block: int):
    search = NearestNeighbors(n_neighbors=neighbors, metric="cosine", algorithm="brute").fit(TRAIN.double().numpy())
    distance, wanted = search.kneighbors(QUERIES.double().numpy())
    similarity, places = nearest(TRAIN, QUERIES, neighbors, query_block=query_block, bank_block=bank_block)
    np.testing.assert_allclose(similarity.numpy(), 1 - distance, rtol=0, atol=1e-6)
    assert np.mean(places.numpy() == wanted) > 0.99  # float32 may exchange two that are as good as equally near
    assert all(len(set(row)) == neighbors for row in places.tolist())


def test_a_bank_in_half_precision_is_searched_in_full_precision():
    similarity, _ = nearest(TRAIN.half(), QUERIES, 20, bank_block=50)
    torch.testing.assert_close(similarity, nearest(TRAIN.half().float(), QUERIES, 20)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bank_block", [1, 3, 100])
def test_ties_are_decided_as_by_scikit_learn(bank_block: int):
    """Equal features count as often as they occur, and of classes with equal votes the smallest wins."""
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    for labels in ([2, 2, 1, 1, 0, 3], [3, 3, 0, 0, 3, 0], [1, 0, 1, 0, 2, 2]):
        model = KNeighborsClassifier(
            6, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(bank.numpy(), labels)
        given = {"neighbors": 6, "num_classes": 4, "temperature": 0.07, "bank_block": bank_block}
        found = knn_predictions(bank, torch.tensor(labels), queries, **given)
        np.testing.assert_array_equal(found.numpy(), model.predict(queries.numpy()))


class Stored:
    """Features that are read block by block, as from a file."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), rows):
            yield start, self.features[start : start + rows]


@pytest.mark.parametrize(("bank_block", "query_block"), [(7, 5), (1, 1), (1000, 1000)])
@pytest.mark.parametrize("given", [Stored, Tensor])
def test_neighbors_are_those_of_scikit_learn_in_blocks_of_any_size(given, bank_block, query_block):
    blocks = {"bank_block": bank_block, "query_block": query_block}
    bank, queries = TRAIN[:40], QUERIES[:13]
    found = nearest(given(bank), given(queries), 6, **blocks)
    model = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(bank.double().numpy())
    distance, places = model.kneighbors(queries.double().numpy())
    np.testing.assert_array_equal(found.places.numpy(), places)
    np.testing.assert_allclose(1 - found.similarity.numpy(), distance, atol=1e-5)
    others = nearest(given(bank), given(bank), 6, itself=torch.arange(40), **blocks)
    np.testing.assert_array_equal(others.places.numpy(), model.kneighbors(return_distance=False))
    some = torch.tensor([39, 3])
    np.testing.assert_array_equal(nearest(bank, bank[some], 6, itself=some, **blocks).places, others.places[some])


def test_features_with_nan_are_nobodys_neighbors_and_have_none():
    bank = torch.eye(4)
    bank[1] = torch.nan
    found = nearest(bank, bank, 3, itself=torch.arange(4))
    assert not (found.places[[0, 2, 3]] == 1).any() and found.places[1].tolist() == [-1, -1, -1]
    assert found.places[0].tolist()[2] == -1, "there are two others only"


def test_of_equally_near_features_those_of_an_earlier_block_come_first():
    assert nearest(torch.ones(6, 2), torch.ones(1, 2), 4, bank_block=1).places.tolist() == [[0, 1, 2, 3]]
