"""A linear classifier in closed form: ridge regression to one-hot labels, its penalty chosen by leaving one out."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the number of features fitted to


class Ridge(NamedTuple):
    """A linear classifier."""

    weight: Float[Tensor, "D classes"]
    bias: Float[Tensor, " classes"]
    penalty: float
    left_out_top1: float  # percent of the features it was fitted to, each predicted from all others

    def predict(self, features: Float[Tensor, "n D"]) -> Int[Tensor, " n"]:
        """Returns the classes of features."""
        return (features.to(self.weight) @ self.weight + self.bias).argmax(dim=1)


def standardized(
    features: Float[Tensor, "n D"],
) -> tuple[Float[Tensor, "n D"], Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Returns the features in float64 with mean 0 and variance 1, and the mean and scale that they had.

    A scale is 1 where a feature does not vary, as in scikit-learn's StandardScaler.
    """
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, unbiased=False)
    scale = torch.where(std > 1e-12, std, 1.0)
    return (x - mean) / scale, mean, scale


@torch.no_grad()
def fit_ridge(
    features: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    penalties: tuple[float, ...] = PENALTIES,
) -> Ridge:
    """Returns scikit-learn's `make_pipeline(StandardScaler(), RidgeClassifier(penalty * n))` with the best penalty.

    Best is the one whose classifiers, each fitted to all features but one, are right most often about that one: the
    residual of a feature that is left out follows from the one of the whole fit (Golub, Heath & Wahba 1979), so all of
    them cost one decomposition of a D x D matrix, and nothing is held out. In float64: O(n D (D + classes)).
    """
    x, mean, scale = standardized(features)
    targets = F.one_hot(labels, num_classes).double()
    prior = targets.mean(dim=0)
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
    eigenvalues = eigenvalues.clamp(min=0.0)
    rotated = x @ vectors  # [n, D]
    moments = rotated.T @ (targets - prior)  # [D, classes]
    best: Ridge | None = None
    for penalty in sorted(penalties, reverse=True):  # of equally good ones the strongest
        shrunk = 1 / (eigenvalues + penalty * len(x))
        fitted = rotated @ (shrunk[:, None] * moments)
        leverage = (rotated.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-9)[:, None]
        left_out = targets - (targets - prior - fitted) / (1 - leverage)
        right = 100 * float((left_out.argmax(dim=1) == labels).double().mean())
        if best is None or right > best.left_out_top1:
            weight = vectors @ (shrunk[:, None] * moments) / scale[:, None]
            best = Ridge(weight, prior - mean @ weight, penalty, right)
    assert best is not None
    return best
