"""Which units of each image the encoder sees: a random quarter, by default."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import InputError
from .packing import WindowPacker
from .randoms import uniforms
from .strategies import Strategy, visible_units

REDRAWS = 100  # of one mask; each redraw fails about as rarely as the first draw, a few in a hundred


class Packing(NamedTuple):
    """Where a hierarchical encoder puts the visible tokens of each window (`packing.WindowPacker`)."""

    starts: Int[Tensor, "B C"]  # slot of the first token of each window, the windows of all layouts one after another
    shapes: tuple[tuple[int, int] | None, ...]  # groups and group size of each layout; None: one group, in token order
    redraws: Int[Tensor, " B"]  # how many masks were drawn for this position before, and did not fit


class Masking(NamedTuple):
    """One mask for each image of a batch, K of N units kept."""

    ids_keep: Int[Tensor, "B K"]  # grid indices of the kept units, in shuffle order
    ids_restore: Int[Tensor, "B N"]  # where grid unit n landed in the shuffle; gather with it to undo the shuffle
    is_masked: Bool[Tensor, "B N"]  # grid order; True = hidden from the encoder, scored by the loss
    packing: Packing | None = None  # for encoders with windows; None: computed by the encoder where it is needed

    @property
    def ids_masked(self) -> Int[Tensor, "B M"]:
        """Grid indices of the masked units, in shuffle order."""
        grid = torch.arange(self.ids_restore.shape[1], device=self.ids_restore.device).expand_as(self.ids_restore)
        ids_shuffle = torch.empty_like(self.ids_restore).scatter_(1, self.ids_restore, grid)
        return ids_shuffle[:, self.ids_keep.shape[1] :]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Masking":
        """Returns the same masking on `device`."""
        ids_keep, ids_restore, is_masked = (x.to(device, non_blocking=non_blocking) for x in self[:3])
        packing = self.packing
        if packing is not None:
            starts, redraws = (x.to(device, non_blocking=non_blocking) for x in (packing.starts, packing.redraws))
            shapes = tuple(
                shape and (shape[0], shape[1]) for shape in packing.shapes
            )  # some versions of torch pin lists of them
            packing = Packing(starts, shapes, redraws)
        return Masking(ids_keep, ids_restore, is_masked, packing)


def num_keep(num_units: int, mask_ratio: float) -> int:
    """Returns K = int(N * (1 - mask_ratio)), MAE's rounding: 49 of 196 at 0.75.

    In floating point, as there: 1 - 0.9 is less than a tenth, so a ratio of 0.9 keeps 1 of 20 units and not 2.

    Raises InputError unless 0 <= mask_ratio < 1 and at least one unit is kept.
    """
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask.ratio {mask_ratio} is not in [0, 1): it is the share of units that is hidden")
    kept = int(num_units * (1 - mask_ratio))
    if kept == 0:
        most = next(thousandths for thousandths in range(999, -1, -1) if int(num_units * (1 - thousandths / 1000)))
        raise InputError(f"mask.ratio {mask_ratio} hides all {num_units} units: use at most {most / 1000:.3f}")
    return kept


def random_masking(
    batch: int,
    num_units: int,
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "B N"] | None = None,
) -> Masking:
    """Returns a uniform random mask without replacement for each image, by sorting noise (MAE's `random_masking`).

    `noise` [B, N], when given, is what is sorted: the units with the smallest values are kept, smallest first.
    """
    kept = num_keep(num_units, mask_ratio)
    if noise is None:
        noise = torch.rand(batch, num_units, generator=generator)
    elif noise.shape != (batch, num_units):
        raise InputError(f"noise has shape {tuple(noise.shape)}, not ({batch}, {num_units})")
    return _masking_by(noise, kept)


def _masking_by(noise: Float[Tensor, "B N"], kept: int) -> Masking:
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :kept].contiguous(), ids_restore, ids_restore >= kept)


def gather_units(tokens: Float[Tensor, "B N D"], ids: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """Returns `tokens[b, ids[b, k]]`, as one row copy: several times cheaper than gather with an expanded index."""
    b, n, d = tokens.shape
    rows = ids + torch.arange(b, device=ids.device)[:, None] * n  # [B, K] into [B*N]
    return tokens.reshape(b * n, d).index_select(0, rows.flatten()).view(b, ids.shape[1], d)


@dataclass(frozen=True)
class MaskSampler:
    """Draws the mask of the sample at each position: a pure function of (seed, position)."""

    grid: tuple[int, int]  # units high, wide
    mask_ratio: float
    strategy: Strategy = "random"
    block: int = 1  # masks are drawn for squares of this many units a side
    packer: WindowPacker | None = None  # masks that it cannot lay out are drawn again

    def __post_init__(self) -> None:
        for side, name in zip(self.grid, ("high", "wide"), strict=True):
            if side % self.block:
                raise InputError(f"the grid is {side} units {name}, no multiple of the {self.block} of a mask's unit")
        _ = self.num_keep  # refuse a bad ratio here, not in a worker

    @property
    def num_units(self) -> int:
        """Number of units N."""
        return self.grid[0] * self.grid[1]

    @property
    def num_keep(self) -> int:
        """Number of units kept, K."""
        return num_keep(self.num_units // self.block**2, self.mask_ratio) * self.block**2

    def sample(self, seed: int, positions: Int[np.ndarray, " B"]) -> Masking:
        """Returns one mask for each position.

        Raises InputError when masks keep on not fitting the packer's shapes, which were chosen for other masks.
        """
        noise = self._noise(seed, positions, "mask")
        masking = _masking_by(torch.from_numpy(noise), self.num_keep)
        if self.packer is None:
            return masking
        starts, fits = self.packer.pack(~masking.is_masked.numpy())
        redraws = np.zeros(len(positions), np.int64)
        for attempt in range(1, REDRAWS + 1):
            if fits.all():
                break
            again = np.flatnonzero(~fits)
            redraws[again] += 1
            noise[again] = self._noise(seed, positions[again], f"mask, redraw {attempt}")
            masking = _masking_by(torch.from_numpy(noise), self.num_keep)
            starts[again], fits[again] = self.packer.pack(~masking.is_masked.numpy()[again])
        if not fits.all():
            raise InputError(
                f"{REDRAWS} masks (mask.strategy {self.strategy}, mask.ratio {self.mask_ratio}) for position "
                f"{positions[~fits][0]} did not fit the groups of the encoder's windows: take another ratio or strategy"
            )
        return masking._replace(
            packing=Packing(torch.from_numpy(starts), self.packer.shapes, torch.from_numpy(redraws))
        )

    def _noise(self, seed: int, positions: Int[np.ndarray, " B"], purpose: str) -> Float[np.ndarray, "B N"]:
        """Returns what to sort: visible units come before masked ones, each part in random order."""
        if self.strategy == "random" and self.block == 1:  # the order by which units are chosen is random enough
            return uniforms(seed, purpose, positions, self.num_units)
        height, width = (side // self.block for side in self.grid)
        kept = self.num_keep // self.block**2
        visible = visible_units(
            self.strategy, (height, width), kept, seed=seed, purpose=purpose, positions=positions
        ).reshape(-1, height, width)
        visible = visible.repeat(self.block, axis=1).repeat(self.block, axis=2).reshape(len(positions), -1)
        return uniforms(seed, f"{purpose} order", positions, self.num_units) + ~visible
