"""Nearest-neighbor classification of frozen features: no training, nothing to tune."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def knn_predictions(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    *,
    neighbors: int,
    num_classes: int,
    temperature: float,
    chunk: int = 1024,
) -> Int[Tensor, " q"]:
    """Returns the class with the largest vote among the `neighbors` nearest training features by cosine similarity.

    A vote weighs exp(similarity / temperature), as in DINO (Caron et al. 2021, appendix F.1) after Wu et al. 2018.
    """
    bank = F.normalize(train, dim=1)
    found = []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(neighbors, len(bank)), dim=1)  # [chunk, k]
        nearer = (
            similarity - similarity[:, :1]
        )  # relative to the nearest: changes no ranking, and cannot underflow to 0
        weight = (nearer / temperature).exp()
        votes = torch.zeros(len(part), num_classes, device=part.device)
        found.append(votes.scatter_add_(1, train_labels[nearest], weight).argmax(dim=1))
    return torch.cat(found)
