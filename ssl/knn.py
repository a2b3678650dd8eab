"""Nearest neighbors among frozen features, exact, in blocks; and classification by their votes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 4096  # with the bank's: 1 GB of similarities at once on an accelerator
BANK_BLOCK = 65536
VOTE_BLOCK = 4096  # queries that vote at once: with 21,000 classes 350 MB
CPU_BLOCK = 8192  # of the bank: similarities that stay near the processor


@torch.no_grad()
def nearest(
    bank: Float[Tensor, "n D"],
    queries: Float[Tensor, "q D"],
    neighbors: int,
    *,
    device: torch.device | None = None,
    query_block: int = QUERY_BLOCK,
    bank_block: int | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Returns cosine similarity and place in `bank` of the `neighbors` (or all n) nearest features, nearest first.

    It is exact, and never holds more than query_block x bank_block similarities: blocks of both sides move to `device`
    (None: where the queries are), and of each block of the bank only the nearest are kept and merged. So the memory of
    a bank of ImageNet-1k (1.28 M) does not depend on the number of queries, and `bank` may stay in host memory, in
    float16 as well. Which of several equally near features come first, or in at all, is not defined.
    """
    device = queries.device if device is None else device
    bank_block = bank_block or (CPU_BLOCK if device.type == "cpu" else BANK_BLOCK)
    count = min(neighbors, len(bank))
    similarity = torch.empty(len(queries), count)
    places = torch.empty(len(queries), count, dtype=torch.long)
    for first in range(0, len(queries), query_block):
        part = F.normalize(queries[first : first + query_block].to(device).float(), dim=1)
        best = torch.empty(len(part), 0, device=device)
        at = torch.empty(len(part), 0, dtype=torch.long, device=device)
        for start in range(0, len(bank), bank_block):
            block = F.normalize(bank[start : start + bank_block].to(device).float(), dim=1)
            near, where = (part @ block.T).topk(min(count, len(block)), dim=1)
            best, at = torch.cat([best, near], dim=1), torch.cat([at, where + start], dim=1)
            best, chosen = best.topk(min(count, best.shape[1]), dim=1)
            at = at.gather(1, chosen)
        similarity[first : first + query_block] = best.cpu()
        places[first : first + query_block] = at.cpu()
    return similarity.to(queries.device), places.to(queries.device)


def vote(
    similarity: Float[Tensor, "q k"], labels: Int[Tensor, "q k"], *, num_classes: int, temperature: float
) -> Int[Tensor, " q"]:
    """Returns the class with the largest vote; among equal ones the smallest.

    A vote weighs exp(similarity / temperature), as in DINO (Caron et al. 2021, appendix F.1) after Wu et al. 2018.
    """
    # Relative to the nearest: changes no ranking, and cannot underflow to 0.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    winners = [labels[:0, 0]]
    for some, of_some in zip(labels.split(VOTE_BLOCK), weight.split(VOTE_BLOCK), strict=True):
        votes = torch.zeros(len(some), num_classes, device=labels.device)
        winners.append(votes.scatter_add_(1, some, of_some).argmax(dim=1))
    return torch.cat(winners)


def knn_predictions(
    train: Float[Tensor, "n D"],
    train_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "q D"],
    *,
    neighbors: int,
    num_classes: int,
    temperature: float,
    query_block: int = QUERY_BLOCK,
    bank_block: int | None = None,
) -> Int[Tensor, " q"]:
    """Returns the class that the `neighbors` nearest training features vote for."""
    similarity, places = nearest(train, queries, neighbors, query_block=query_block, bank_block=bank_block)
    return vote(similarity, train_labels[places], num_classes=num_classes, temperature=temperature)
