"""Which units of each image the encoder sees: a random quarter, by default."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import InputError
from .randoms import uniforms


class Masking(NamedTuple):
    """One mask for each image of a batch, K of N units kept."""

    ids_keep: Int[Tensor, "B K"]  # grid indices of the kept units, in shuffle order
    ids_restore: Int[Tensor, "B N"]  # where grid unit n landed in the shuffle; gather with it to undo the shuffle
    is_masked: Bool[Tensor, "B N"]  # grid order; True = hidden from the encoder, scored by the loss

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Masking":
        """Returns the same masking on `device`."""
        return Masking(*(x.to(device, non_blocking=non_blocking) for x in self))


def num_keep(num_units: int, mask_ratio: float) -> int:
    """Returns K = int(N * (1 - mask_ratio)), MAE's rounding: 49 of 196 at 0.75.

    Raises InputError unless 0 <= mask_ratio < 1 and at least one unit is kept.
    """
    if not 0 <= mask_ratio < 1:
        raise InputError(f"mask ratio {mask_ratio} is not in [0, 1): it is the share of units that is hidden")
    kept = int(num_units * (1 - mask_ratio))
    if kept == 0:
        raise InputError(
            f"mask ratio {mask_ratio} hides all {num_units} units: use at most {(num_units - 1) / num_units:.3f}"
        )
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

    num_units: int
    mask_ratio: float
    strategy: Literal["random"] = "random"

    def __post_init__(self) -> None:
        _ = self.num_keep  # refuse a bad ratio here, not in a worker

    @property
    def num_keep(self) -> int:
        """Number of units kept, K."""
        return num_keep(self.num_units, self.mask_ratio)

    def sample(self, seed: int, positions: Int[np.ndarray, " B"]) -> Masking:
        """Returns one mask for each position."""
        noise = torch.from_numpy(uniforms(seed, "mask", positions, self.num_units))
        return random_masking(len(positions), self.num_units, self.mask_ratio, noise=noise)
