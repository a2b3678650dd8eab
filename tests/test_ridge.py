"""Ridge regression in closed form against scikit-learn's, and leaving one out against doing so."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from quarterlight.ssl.ridge import fit_ridge

RANDOM = np.random.default_rng(0)
CLASSES = 4
CENTERS = RANDOM.normal(size=(CLASSES, 9))


def blobs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = RANDOM.integers(0, CLASSES, count)
    features = (CENTERS[labels] + 1.5 * RANDOM.normal(size=(count, 9))) * np.logspace(-2, 2, 9) + 7
    return torch.from_numpy(features), torch.from_numpy(labels)


TRAIN, VAL = blobs(80), blobs(200)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 30.0])
def test_scores_are_those_of_scikit_learn(penalty: float):
    ours = fit_ridge(*TRAIN, num_classes=CLASSES, penalties=(penalty,))
    model = make_pipeline(StandardScaler(), RidgeClassifier(penalty * len(TRAIN[1]))).fit(*(x.numpy() for x in TRAIN))
    scores = 2 * (VAL[0] @ ours.weight + ours.bias) - 1  # scikit-learn's targets are -1 and 1
    np.testing.assert_allclose(scores.numpy(), model.decision_function(VAL[0].numpy()), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(ours.predict(VAL[0]).numpy(), model.predict(VAL[0].numpy()))


@pytest.mark.parametrize("penalty", [1e-4, 1e-1, 10.0])
def test_leaving_one_out_is_what_fitting_without_it_gives(penalty: float):
    x = StandardScaler().fit_transform(TRAIN[0].numpy())
    y = TRAIN[1].numpy()
    ours = fit_ridge(torch.from_numpy(x), TRAIN[1], num_classes=CLASSES, penalties=(penalty,))
    right = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        right.append(RidgeClassifier(penalty * len(y)).fit(x[rest], y[rest]).predict(x[[i]])[0] == y[i])
    assert ours.left_out_top1 == pytest.approx(100 * np.mean(right), abs=1e-9)


def test_the_best_penalty_is_chosen():
    penalties = (1e-4, 1e-2, 1.0, 30.0)
    each = [fit_ridge(*TRAIN, num_classes=CLASSES, penalties=(penalty,)) for penalty in penalties]
    chosen = fit_ridge(*TRAIN, num_classes=CLASSES, penalties=penalties)
    assert chosen.left_out_top1 == max(ridge.left_out_top1 for ridge in each)


def test_features_that_never_change_and_fewer_images_than_features_do_no_harm():
    features = torch.cat([torch.randn(6, 20, dtype=torch.float64), torch.full((6, 2), 3.0, dtype=torch.float64)], dim=1)
    ridge = fit_ridge(features, torch.tensor([0, 1, 2, 0, 1, 2]), num_classes=5)
    assert torch.isfinite(ridge.weight).all() and int(ridge.predict(features).max()) < 3
