"""Batches that data workers write into shared memory which the main process keeps: no new memory for every batch.

A tensor sent by a worker is a new piece of shared memory each time, and its first touch costs 100-150 us for an image
of 224 x 224 pixels in page faults. Here the images of batch t lie in slot t modulo the number of slots, and only the
rest of the batch is sent.
"""

import itertools
import os
import pickle
import weakref
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from .errors import InputError

SHARED_MEMORY = "/dev/shm"

_numbers = itertools.count()
_rings: "weakref.WeakValueDictionary[int, Ring]" = weakref.WeakValueDictionary()  # of this process


class Ring:
    """`slots` batches of uint8 images in shared memory, for one loader."""

    def __init__(self, slots: int, batch_size: int, shape: tuple[int, int, int]) -> None:
        """Raises InputError when there is not as much shared memory."""
        size = slots * batch_size * int(np.prod(shape))
        free = _free_bytes()
        if free is not None and size > free:
            raise InputError(
                f"the data workers need {size / 1e6:.0f} MB of shared memory ({slots} batches of {batch_size} images), "
                f"and {SHARED_MEMORY} has {free / 1e6:.0f} MB: lower num_workers or micro_batch_size, or give the "
                "container more (docker run --shm-size)"
            )
        self.slots = slots
        self.images = torch.empty(slots, batch_size, *shape, dtype=torch.uint8).share_memory_()
        self.number = next(_numbers)
        _rings[self.number] = self

    def slot(self, number: int, count: int) -> UInt8[Tensor, "B H W C"]:
        """Returns where the `count` images of batch `number` go."""
        return self.images[number % self.slots, :count]


class InRing:
    """A batch (a named tuple with `images` in a ring) on its way out of a worker: it arrives as the batch itself."""

    def __init__(self, ring: Ring, number: int, batch: Any) -> None:
        self.ring, self.number, self.batch = ring, number, batch

    def __reduce__(self) -> tuple[Any, ...]:
        count = len(self.batch.images)
        rest = pickle.dumps(_as_arrays(self.batch._replace(images=None)), protocol=5)  # tensors would cost a file each
        return _arrived, (self.ring.number, self.number, count, rest)


def _arrived(ring: int, number: int, count: int, rest: bytes) -> Any:
    return _as_tensors(pickle.loads(rest))._replace(images=_rings[ring].slot(number, count))


def _as_arrays(value: Any) -> Any:
    """Returns a named tuple with arrays in place of its tensors, those in named tuples inside it too."""
    if isinstance(value, Tensor):
        return value.numpy()
    return type(value)(*map(_as_arrays, value)) if hasattr(value, "_fields") else value


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return type(value)(*map(_as_tensors, value)) if hasattr(value, "_fields") else value


def _free_bytes() -> int | None:
    """Returns how much shared memory is free; None where it is not a file system."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
