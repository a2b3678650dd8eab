"""Orders that are known an epoch at a time: a permutation of all positions, sorted once and kept for a while."""

import abc

import numpy as np
from jaxtyping import Int

from .randoms import hashes

EPOCHS_KEPT = 2  # a batch in lanes goes through parts of two epochs at once, until both end
HASHED_AT_ONCE = 1 << 16  # samples: so that what hashing needs meanwhile stays in the processor's cache


class ByEpoch(abc.ABC):
    """An order that is known an epoch at a time; the last EPOCHS_KEPT that were asked for are kept."""

    _kept: tuple[tuple[int, np.ndarray], ...] = ()  # epoch and its ids, the one asked for last first

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _epoch_ids(self, epoch: int) -> np.ndarray: ...

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def ids(self, positions: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
        """Returns the sample ids at these positions."""
        epochs, offsets = np.divmod(positions, len(self))
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._ids_of(epoch)[offsets[here]]
        return out

    def _ids_of(self, epoch: int) -> np.ndarray:
        found = next((ids for known, ids in self._kept if known == epoch), None)
        others = tuple(pair for pair in self._kept if pair[0] != epoch)
        self._kept = others[: EPOCHS_KEPT - 1]  # before another is made, for the memory
        if found is None:
            found = self._epoch_ids(epoch)
            found = found.astype(np.int32) if found.max(initial=0) < 2**31 else found
        self._kept = ((epoch, found), *self._kept)
        return found


def permutation(seed: int, purpose: str, count: int) -> Int[np.ndarray, " n"]:
    """Returns 0, ..., count - 1 in the order of their hashes, which are all different: hashing is invertible."""
    keys = np.empty(count, np.uint64)
    for start in range(0, count, HASHED_AT_ONCE):
        positions = np.arange(start, min(count, start + HASHED_AT_ONCE))
        keys[positions] = hashes(seed, purpose, positions, 1)[:, 0]
    return np.argsort(keys)
