"""From positions in a run to images, labels and masks: read, decoded, cropped, and replaced where they cannot be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .addresses import shown
from .augment import CenterCrop, RandomCrop
from .decode import ImageFile, UnreadableImage
from .errors import InputError
from .index import ShardIndex
from .masking import Masking, MaskSampler
from .order import Order, settings_of
from .randoms import hashes, uniforms
from .small_images import SmallImages

REPLACEMENT_TRIES = 100

_Wanted = tuple[int, int]  # a sample, and the epoch


class BadSample(NamedTuple):
    """A sample that could not be read, and why."""

    shard: str
    key: str
    reason: str


class Batch(NamedTuple):
    """What one process gets for one forward pass."""

    images: UInt8[Tensor, "B H W C"]
    labels: Int[Tensor, " B"]  # class numbers, or -1 where there is none
    masking: Masking | None
    keys: list[str]
    bad: list[BadSample]  # samples that were to be here and were replaced

    def to(self, device: torch.device) -> "Batch":
        """Returns the same batch with its tensors on `device`."""
        masking = self.masking and self.masking.to(device, non_blocking=True)
        images, labels = (x.to(device, non_blocking=True) for x in (self.images, self.labels))
        return self._replace(images=images, labels=labels, masking=masking)


@dataclass
class Samples:
    """Turns a span of positions into a Batch."""

    index: ShardIndex
    order: Order
    transform: RandomCrop | CenterCrop
    seed: int
    in_chans: Literal[1, 3] = 3
    masks: MaskSampler | None = None
    small: SmallImages | None = None  # None: images are decoded as they are read
    place: Tensor | None = None  # where the sample is noted that is being read

    @property
    def repeats(self) -> int:
        """Positions in a row that show the same sample."""
        return settings_of(self.order)["repeats"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images in a batch."""
        return (*self.transform.size, self.in_chans)

    def batch(self, start: int, stop: int, out: UInt8[Tensor, "B H W C"] | None = None) -> Batch:
        """Returns the samples at positions start, ..., stop - 1, their images written to `out` where it is given."""
        positions = np.arange(start, stop)
        ids = self.order.ids(positions)
        draws = uniforms(self.seed, "augment", positions, self.transform.num_draws)
        images = torch.empty(len(ids), *self.shape, dtype=torch.uint8) if out is None else out
        bad: list[BadSample] = []
        first = positions // self.repeats * self.repeats  # so that an epoch's end parts no crops of one image
        wanted = list(zip(ids.tolist(), (first // len(self.order)).tolist(), strict=True))
        if self.small is not None:
            self._fill_small(self.small, images, ids, wanted, draws, bad)
        else:
            self._fill(images, ids, wanted, draws, bad)
        self.index.close_evicted()
        labels = torch.from_numpy(self.index.label[ids])
        masking = self.masks and self.masks.sample(self.seed, positions)
        return Batch(images, labels, masking, [self.index.key(i) for i in ids.tolist()], bad)

    def _fill(
        self, images: Tensor, ids: np.ndarray, wanted: list[_Wanted], draws: np.ndarray, bad: list[BadSample]
    ) -> None:
        """Reads, decodes and augments; where a sample cannot be, its id becomes that of the one in its place."""
        before, given, image, candidates = None, -1, None, iter(())
        failed: list[BadSample] = []
        for i, which in enumerate(wanted):
            if which != before:  # crops of one image that follow each other decode it once
                before, image, candidates, failed = which, None, self._candidates(*which), []
            while image is not None or (given := next(candidates, -1)) >= 0:
                try:
                    if image is None:
                        self._note(given)
                        image = ImageFile(self.index.read(given), self.in_chans)
                    images[i] = self.transform(image, draws[i])
                    ids[i] = given
                    break
                except (UnreadableImage, OSError) as error:
                    failed.append(self._bad(given, str(error)))
                    image = None
            else:  # the share of bad samples stops the run; a worker cannot say so
                images[i] = 0
            bad += failed  # once a position, however positions fall into batches

    def _fill_small(
        self,
        small: SmallImages,
        images: Tensor,
        ids: np.ndarray,
        wanted: list[_Wanted],
        draws: np.ndarray,
        bad: list[BadSample],
    ) -> None:
        for i, which in enumerate(wanted if small.unreadable else []):
            for candidate in self._candidates(*which):
                if candidate not in small.unreadable:
                    ids[i] = candidate
                    break
                bad.append(self._bad(candidate, small.unreadable[candidate]))
        self._note(int(ids[0]))
        images[:] = self.transform.of_small(small.read(ids), draws)

    def _note(self, sample: int) -> None:
        if self.place is not None:
            self.place.fill_(sample)

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        """Yields the sample, and then those that take its place in this epoch, one after another.

        They do not depend on the position within the epoch, so that repeated crops show one image all the same.
        """
        yield sample
        ids = self.order.samples
        for other in hashes(self.seed, f"replacement in epoch {epoch}", np.array([sample]), REPLACEMENT_TRIES)[0]:
            yield int(ids[int(other) % len(ids)])

    def _bad(self, sample: int, reason: str) -> BadSample:
        return BadSample(shown(self.index.paths[int(self.index.shard[sample])]), self.index.key(sample), reason)


def refuse_bad(bad: list[BadSample]) -> None:
    """Raises InputError when samples to evaluate on could not be read: a figure must count every image."""
    if bad:
        raise InputError(
            f"{bad[0].shard}: sample {bad[0].key} cannot be read ({bad[0].reason}), and an evaluation must count every "
            "image: launch/shards.py repair leaves it out"
        )


def refuse_unlabelled(labels: Int[np.ndarray, " n"], where: str, defects: Sequence[str] = ()) -> None:
    """Raises InputError when a sample has no label, with what is known to be wrong with the shards."""
    if missing := int((labels < 0).sum()):
        raise InputError(
            f"{where}: {missing} of {len(labels)} samples have no label "
            f"({'; '.join(defects) or 'no .cls or .json with a class number in the shard'}); "
            "write the shards from class folders, or with a class number in every .cls"
        )
