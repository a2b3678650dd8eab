"""The order of samples: a pure function of (seed, position), the same for any number of ranks and workers.

Position p of a run belongs to epoch p // num_samples; a batch may straddle two epochs, so no sample is ever dropped.
"""

import numpy as np
from jaxtyping import Int

from .errors import InputError
from .randoms import hashes


class ShuffledOrder:
    """Every epoch visits every sample once, in an order of its own.

    The permutation sorts hashes rather than calling numpy's shuffle, whose stream may change between versions: a
    resumed run must find the same order. 1.3 M samples take 0.2 s once an epoch, and so does resuming anywhere.
    """

    def __init__(self, samples: Int[np.ndarray, " n"], seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def ids(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns the sample ids at positions start, ..., stop - 1."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, len(self))
            end = min(len(self), first + stop - start)
            parts.append(self._shuffled(epoch)[first:end])
            start += end - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            keys = hashes(self.seed, f"order of epoch {epoch}", np.arange(len(self)), 1)[:, 0]
            self._epoch = (epoch, self.samples[np.argsort(keys, kind="stable")])
        return self._epoch[1]


class FileOrder:
    """The order in which samples lie in the shards, once: for evaluation."""

    def __init__(self, samples: Int[np.ndarray, " n"]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def ids(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Returns the sample ids at positions start, ..., stop - 1."""
        return self.samples[start:stop].copy()  # the loader writes replacements into it


def labelled_subset(labels: Int[np.ndarray, " n"], samples_per_class: int | None, seed: int) -> Int[np.ndarray, " m"]:
    """Returns the ids of `samples_per_class` samples of each class, drawn by `seed`; null: all samples.

    Raises InputError when there are no labels, or when a class has fewer.
    """
    if samples_per_class is None:
        return np.arange(len(labels))
    if samples_per_class < 1:
        raise InputError(f"samples_per_class is {samples_per_class}: give at least 1, or null for all samples")
    if not (labels >= 0).any():
        raise InputError("samples_per_class is given, but no sample has a label (no .cls or .json in the shards)")
    rank = hashes(seed, "labelled subset", np.arange(len(labels)), 1)[:, 0]
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        (members,) = np.nonzero(labels == label)
        if len(members) < samples_per_class:
            raise InputError(f"samples_per_class is {samples_per_class}, but class {label} has {len(members)} samples")
        chosen.append(members[np.argsort(rank[members], kind="stable")[:samples_per_class]])
    return np.sort(np.concatenate(chosen))
