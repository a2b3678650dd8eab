"""Logistic regression of few features, near enough to its minimum that predictions are those there."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from quarterlight.ssl.ridge import standardized
from quarterlight.ssl.watch import alive

MOST_STEPS = 2000


class Logistic(NamedTuple):
    """A linear classifier."""

    weight: Float[Tensor, "D classes"]
    bias: Float[Tensor, " classes"]

    def predict(self, features: Float[Tensor, "n D"]) -> Int[Tensor, " n"]:
        """Returns the classes of features."""
        return (features.to(self.weight) @ self.weight + self.bias).argmax(dim=1)


def fit_logistic(
    features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], *, num_classes: int, c: float = 1.0
) -> Logistic:
    """Returns scikit-learn's `make_pipeline(StandardScaler(), LogisticRegression(C=c))`, by L-BFGS in float64.

    It minimizes c * (sum of cross-entropies) + |weight|^2 / 2 over standardized features; the bias is free. Of classes
    that no label names nothing is ever predicted.
    """
    x, mean, scale = standardized(features)
    weight = torch.zeros(x.shape[1], num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    given = {"max_iter": MOST_STEPS, "max_eval": 2 * MOST_STEPS, "history_size": 20, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight, bias], tolerance_grad=1e-6, tolerance_change=1e-10, **given)
    absent = torch.ones(num_classes, dtype=torch.bool, device=x.device)
    absent[labels] = False

    def loss() -> Tensor:
        alive()
        optimizer.zero_grad()
        logits = (x @ weight + bias).masked_fill(absent, -torch.inf)
        value = F.cross_entropy(logits, labels) + weight.square().sum() / (2 * c * len(x))
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        scaled = weight / scale[:, None]
        return Logistic(scaled, (bias - mean @ scaled).masked_fill(absent, -torch.inf))
