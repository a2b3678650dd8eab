"""Pictures of reconstructions: masked, reconstructed, original."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from .files import replace_file
from .mae import MaskedAutoencoder, Reconstruction
from .patches import patchify, unpatchify

GREY = 0.5  # of [0, 1], where a patch is hidden


def reconstruction_picture(
    autoencoder: MaskedAutoencoder,
    images: Float[Tensor, "B C H W"],
    result: Reconstruction,
    *,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
    per_row: int = 4,
    gap: int = 2,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one picture with, for each image, masked | reconstructed (visible patches kept) | original.

    With the norm_pix target mean and contrast of a patch come from the original: see `NormPixTarget.to_pixels`.
    """
    encoder = autoencoder.encoder
    patches = patchify(images, encoder.unit_size)
    hidden = result.is_masked[:, :, None]
    filled = torch.where(hidden, autoencoder.target.to_pixels(result.prediction, images), patches)
    grey = ((GREY - mean) / std).to(images).repeat(encoder.unit_size**2)  # [P*P*C], channel fastest
    shown = [torch.where(hidden, grey, patches), filled, patches]
    in_chans = images.shape[1]
    columns = [unpatchify(x, encoder.unit_size, encoder.grid, in_chans) for x in shown]
    triple = torch.cat([torch.nn.functional.pad(x * _c(std) + _c(mean), (0, gap), value=1.0) for x in columns], dim=3)
    triple = torch.nn.functional.pad(triple, (0, 2 * gap, 0, gap), value=1.0).clamp(
        0, 1
    )  # [B, C, H + gap, 3 (W + gap) + 2 gap]
    triple = triple[: len(triple) // per_row * per_row or len(triple)]
    rows = [torch.cat(list(row), dim=2) for row in triple.split(min(per_row, len(triple)))]
    picture = torch.cat(rows, dim=1).expand(3, -1, -1)  # grey becomes color
    return (picture.permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)


def save_png(path: Path, pixels: UInt8[np.ndarray, "H W 3"], *, min_width: int = 800) -> None:
    """Writes a PNG, enlarged by a whole factor until it is `min_width` pixels wide."""
    factor = max(1, -(-min_width // pixels.shape[1]))
    image = Image.fromarray(pixels).resize(
        (pixels.shape[1] * factor, pixels.shape[0] * factor), Image.Resampling.NEAREST
    )
    replace_file(path, lambda partial: image.save(partial, format="PNG"))


def _c(values: Float[Tensor, " C"]) -> Float[Tensor, "C 1 1"]:
    return values[:, None, None]
