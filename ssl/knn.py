"""Nearest neighbors among frozen features, exact, in blocks; and classification by their votes."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 4096  # with the bank's: 1 GB of similarities at once on an accelerator
BANK_BLOCK = 65536
VOTE_BLOCK = 4096  # queries that vote at once: with 21,000 classes 350 MB
CPU_BLOCK = 8192  # of the bank: similarities that stay near the processor


@runtime_checkable
class Stored(Protocol):
    """Features that lie elsewhere, such as in a file, and are read a block at a time."""

    def __len__(self) -> int: ...

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[Tensor, "n D"]]]:
        """Yields (place of the first feature, features) for `rows` of them at a time."""
        ...


class Nearest(NamedTuple):
    """The neighbors of each query, nearest first."""

    similarity: Float[Tensor, "q k"]  # cosine, from -1 to 1; -inf where there are fewer
    places: Int[Tensor, "q k"]  # in the bank; -1 where there are fewer


@torch.no_grad()
def nearest(
    bank: Float[Tensor, "n D"] | Stored,
    queries: Float[Tensor, "q D"] | Stored,
    neighbors: int,
    *,
    itself: Int[Tensor, " q"] | None = None,
    device: torch.device | None = None,
    query_block: int = QUERY_BLOCK,
    bank_block: int | None = None,
) -> Nearest:
    """Returns the `neighbors` (or all n) nearest features of each query by cosine similarity in float32.

    `itself` is each query's own place in the bank, which is left out. Features with NaN are nobody's neighbors; a
    query with NaN has none.

    It is exact, and never holds more than query_block x bank_block similarities: blocks of both sides move to `device`
    (None: where the queries are), and of each block of the bank only the nearest are kept and merged. So the memory of
    a bank of ImageNet-1k (1.28 M) does not depend on the number of queries, and `bank` may stay in host memory, in
    float16 as well, or in a file. What is found lies where the queries are, for stored ones in host memory. Of equally
    near features those of an earlier block come first; which of one block come first, or in at all, is not defined.
    """
    home = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    device = home if device is None else device
    bank_block = bank_block or (CPU_BLOCK if device.type == "cpu" else BANK_BLOCK)
    count = max(0, min(neighbors, len(bank) - (itself is not None)))
    found = [(torch.empty(0, count, device=home), torch.empty(0, count, dtype=torch.long, device=home))]
    for first, some in _blocks(queries, query_block):
        part = F.normalize(some.to(device).float(), dim=1)
        own = None if itself is None else itself[first : first + len(part)].to(device)
        best = torch.empty(len(part), 0, device=device)
        at = torch.empty(len(part), 0, dtype=torch.long, device=device)
        for start, rows in _blocks(bank, bank_block):
            block = F.normalize(rows.to(device).float(), dim=1)
            similarity = part @ block.T
            similarity[:, block.isnan().any(dim=1)] = -torch.inf
            if own is not None:
                here = ((own >= start) & (own < start + len(block))).nonzero().squeeze(1)
                similarity[here, own[here] - start] = -torch.inf
            near, where = similarity.topk(min(count, len(block)), dim=1)
            best, at = torch.cat([best, near], dim=1), torch.cat([at, where + start], dim=1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, at = best[:, :count], at.gather(1, order[:, :count])
        best = best.masked_fill(best.isnan(), -torch.inf)  # of a query with NaN
        found.append((best.to(home), at.masked_fill(best == -torch.inf, -1).to(home)))
    similarity, places = (torch.cat(x) for x in zip(*found, strict=True))
    return Nearest(similarity, places)


def _blocks(features: Tensor | Stored, rows: int) -> Iterator[tuple[int, Tensor]]:
    if not isinstance(features, Tensor):
        yield from features.blocks(rows)
        return
    for start in range(0, len(features), rows):
        yield start, features[start : start + rows]


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
