"""Every class equally often, however many samples it has: an order for skewed sets."""

import numpy as np
from jaxtyping import Int

from .epochs import ByEpoch, permutation
from .randoms import hashes


class BalancedOrder(ByEpoch):
    """An epoch takes samples / classes positions of every class (rounded), all shuffled together.

    Each class goes through its own samples without a gap, in a new order each time: a large one shows a part of them
    in an epoch, a small one all of them several times. On average this is torch's WeightedRandomSampler with weights
    1 / (samples of the class), but no sample comes again before the others of its class have come.
    """

    def __init__(self, samples: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], seed: int) -> None:
        """Takes the label of each of `samples`."""
        self.samples = samples
        self.seed = seed
        _, self._class, self._sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self.per_class = max(1, round(len(samples) / len(self._sizes)))

    def __len__(self) -> int:
        return self.per_class * len(self._sizes)

    def _epoch_ids(self, epoch: int) -> np.ndarray:
        drawn = np.concatenate(self._drawn(epoch * self.per_class, (epoch + 1) * self.per_class))
        return self.samples[drawn[permutation(self.seed, f"mixture of epoch {epoch}", len(self))]]

    def _drawn(self, start: int, stop: int) -> list[np.ndarray]:
        """Returns what each class shows at its places start, ..., stop - 1, as numbers of `samples`.

        A class of n samples is in its round p // n at its place p; a round is all of its samples in the order of their
        hashes. All rounds that are touched are hashed and sorted at once: they hold at most three epochs.
        """
        first, last = start // self._sizes, (stop - 1) // self._sizes  # rounds, of each class
        rounds = (last - first + 1)[self._class]  # of each sample
        sample = np.repeat(np.arange(len(self.samples)), rounds)
        begin = np.cumsum(rounds) - rounds
        number = first[self._class[sample]] + np.arange(len(sample)) - begin[sample]
        keys = hashes(self.seed, "order of a class", number * len(self.samples) + sample, 1)[:, 0]
        classes = self._class[sample]
        sample = sample[np.lexsort((keys, number, classes))]  # class by class, round by round
        ends = np.cumsum(np.bincount(classes))
        skipped = start - first * self._sizes  # places of the first round that lie before `start`
        begins = ends - np.diff(ends, prepend=0) + skipped
        return [sample[begin : begin + stop - start] for begin in begins]
