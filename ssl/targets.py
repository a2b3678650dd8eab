"""What a masked autoencoder predicts of a hidden unit: its pixels, normalized or not, or coefficients of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .files import replace_file, write_tensors
from .masking import gather_units
from .patches import patch_statistics, patchify

TargetName = Literal["norm_pix", "pixels", "pca", "hog"]


class PixelTarget(nn.Module):
    """The pixels of a unit as (row, column, channel), as they are: V = P * P * C values."""

    def __init__(self, unit_size: int, in_chans: int) -> None:
        super().__init__()
        self.unit_size = unit_size
        self.num_values = unit_size**2 * in_chans

    def forward(self, images: Float[Tensor, "B C H W"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Returns the values to be predicted for the units `ids` of normalized images, in the images' precision."""
        return gather_units(patchify(images, self.unit_size), ids)

    def to_pixels(
        self, prediction: Float[Tensor, "B N V"], images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N P2C"]:
        """Returns predictions for all units as normalized pixels; what a target leaves out is taken from the images."""
        return prediction.to(images.dtype)


class NormPixTarget(PixelTarget):
    """The pixels normalized within each unit (MAE's, unbiased variance)."""

    def forward(self, images: Float[Tensor, "B C H W"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Returns (pixels - mean) / std of each unit."""
        patches = super().forward(images, ids)
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def to_pixels(
        self, prediction: Float[Tensor, "B N V"], images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N P2C"]:
        """Returns the predictions with mean and contrast of the original, so such a picture flatters the network."""
        mean, std = patch_statistics(patchify(images, self.unit_size))
        return prediction.to(images.dtype) * std + mean


class PCATarget(PixelTarget):
    """The largest principal components of a unit's pixels (MAE, table 1d: 96 of 768 of them)."""

    mean: Tensor
    components: Tensor

    def __init__(self, unit_size: int, in_chans: int, *, num_components: int) -> None:
        super().__init__(unit_size, in_chans)
        pixels, self.num_values = self.num_values, num_components
        if num_components > pixels:
            raise InputError(f"pca_components is {num_components}, and a unit has {pixels} values: give at most those")
        self.register_buffer("mean", torch.full((pixels,), torch.nan))  # until fitted: a loss then says so
        self.register_buffer("components", torch.full((num_components, pixels), torch.nan))

    def forward(self, images: Float[Tensor, "B C H W"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Returns the coefficients of each unit, not whitened: the first ones are the largest."""
        return (super().forward(images, ids) - self.mean) @ self.components.t()

    def to_pixels(
        self, prediction: Float[Tensor, "B N V"], images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N P2C"]:
        """Returns the pixels that the coefficients stand for."""
        return prediction.to(images.dtype) @ self.components + self.mean

    def fit(self, batches: Iterable[Float[Tensor, "B C H W"]]) -> None:
        """Sets the components to those of all units of the images, largest variance first."""
        pixels = self.mean.numel()
        count, total, products = 0, torch.zeros(pixels).double(), torch.zeros(pixels, pixels).double()
        for images in batches:
            x = patchify(images, self.unit_size).flatten(0, 1).double().cpu()
            count, total, products = count + len(x), total + x.sum(dim=0), products + x.t() @ x
        mean = total / count
        vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean)).eigenvectors  # smallest first
        self.mean.copy_(mean)
        self.components.copy_(vectors.t().flip(0)[: self.num_values])

    def save(self, path: Path) -> None:
        """Writes mean and components."""
        replace_file(path, lambda partial: write_tensors(partial, {"mean": self.mean, "components": self.components}))

    def load(self, path: Path) -> None:
        """Reads what `save` wrote. Raises InputError when it is of other units or another number of components."""
        try:
            tensors = load_file(path)
            self.load_state_dict(tensors)  # refuses other names and shapes; a copy would spread a single component
        except (SafetensorError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"{path} does not hold the components of this run ({why}): remove it") from error


class HOGTarget(PixelTarget):
    """Histograms of oriented gradients (Dalal & Triggs 2005), in the shape that MaskFeat predicts (Wei et al. 2022).

    A cell of 8 x 8 pixels (or a smaller unit) has a histogram of 9 unsigned orientations for each channel, weighted by
    the gradient and L2-normalized. Differs from MaskFeat: gradients are plain central differences, unsmoothed, and
    pixels of a cell weigh the same wherever they are.
    """

    BINS = 9
    CELL = 8

    def __init__(self, unit_size: int, in_chans: int) -> None:
        super().__init__(unit_size, in_chans)
        self.cell = min(self.CELL, unit_size)
        if unit_size % self.cell:
            raise InputError(
                f"target hog needs units of up to {self.CELL} pixels or of a multiple of them, not {unit_size}: "
                "take another target"
            )
        self.num_values = (unit_size // self.cell) ** 2 * in_chans * self.BINS

    def forward(self, images: Float[Tensor, "B C H W"], ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Returns the histograms of each unit's cells as (row, column, channel, orientation)."""
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        angle = torch.atan2(dx, dy) / torch.pi % 1.0  # [0, 1): opposite directions are one orientation
        orientation = (angle * self.BINS).long().clamp(max=self.BINS - 1)
        strength = torch.hypot(dx, dy)
        bins = [F.avg_pool2d(strength * (orientation == bin), self.cell) for bin in range(self.BINS)]
        cells = F.normalize(torch.stack(bins, dim=2), dim=2).flatten(1, 2)  # [B, C * bins, H / cell, W / cell]
        return gather_units(patchify(cells, self.unit_size // self.cell), ids)

    def to_pixels(
        self, prediction: Float[Tensor, "B N V"], images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B N P2C"]:
        """Returns gray: no image follows from its gradients' histograms."""
        return torch.zeros_like(patchify(images, self.unit_size))


def build_target(name: TargetName, *, unit_size: int, in_chans: int, pca_components: int = 96) -> Any:
    """Returns the target of that name. Principal components are yet to be fitted or loaded."""
    if name == "pca":
        return PCATarget(unit_size, in_chans, num_components=pca_components)
    return {"pixels": PixelTarget, "norm_pix": NormPixTarget, "hog": HOGTarget}[name](unit_size, in_chans)
