"""Pictures of reconstructions: masked, reconstructed, original; and how they sharpen while a run goes on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replace_file
from .mae import MaskedAutoencoder, Reconstruction
from .patches import patchify, unpatchify
from .targets import NormPixTarget

GREY = 0.5  # of [0, 1], where a patch is hidden
CONTRAST = 0.15  # of [0, 1]: a standard deviation, where the contrast of the original is not to be used
PER_ROW, GAP = 4, 2  # images in a row of a picture; pixels between them
FILM_IMAGES, FILM_STEPS = 8, 6  # rows of a filmstrip, and columns between what is masked and the original
STEP_NAME = re.compile(r"step-(\d{8})\.png")


class Panels(NamedTuple):
    """What there is to see of a reconstruction, in [0, 1]."""

    original: Float[Tensor, "B C H W"]
    masked: Float[Tensor, "B C H W"]  # hidden units grey
    prediction: Float[Tensor, "B C H W"]  # of all units; those for visible ones are trained by nothing
    pasted: Float[Tensor, "B C H W"]  # predictions where hidden, the original's pixels elsewhere


def panels(
    autoencoder: MaskedAutoencoder,
    images: Float[Tensor, "B C H W"],
    result: Reconstruction,
    *,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
    contrast_only: bool = False,
) -> Panels:
    """Returns the reconstruction of normalized `images`, whose prediction must be of all units, as pixels in [0, 1].

    With the norm_pix target mean and contrast of a patch come from the original, which flatters: see
    `NormPixTarget.to_pixels`. With `contrast_only` such a prediction is shown as it is, around grey, a standard
    deviation being CONTRAST. Visible units of `pasted` are those of `original` exactly.
    """
    encoder, in_chans = autoencoder.encoder, images.shape[1]
    hidden = result.is_masked[:, :, None]
    channels = (mean.repeat(encoder.unit_size**2), std.repeat(encoder.unit_size**2))  # [P*P*C], channel fastest
    patches = patchify(images, encoder.unit_size) * channels[1] + channels[0]
    if contrast_only and isinstance(autoencoder.target, NormPixTarget):
        predicted = GREY + CONTRAST * result.prediction.to(images.dtype)
    else:
        predicted = autoencoder.target.to_pixels(result.prediction, images) * channels[1] + channels[0]
    grey = torch.full_like(patches, GREY)
    shown = [patches, torch.where(hidden, grey, patches), predicted, torch.where(hidden, predicted, patches)]
    return Panels(*(unpatchify(x.float(), encoder.unit_size, encoder.grid, in_chans).clamp(0, 1) for x in shown))


def reconstruction_picture(
    autoencoder: MaskedAutoencoder,
    images: Float[Tensor, "B C H W"],
    result: Reconstruction,
    *,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one picture with, for each image, masked | reconstructed (visible patches kept) | original.

    With the norm_pix target mean and contrast of a patch come from the original: see `panels`.
    """
    shown = panels(autoencoder, images, result, mean=mean, std=std)
    columns = [torch.nn.functional.pad(x, (0, GAP), value=1.0) for x in (shown.masked, shown.pasted, shown.original)]
    triple = torch.cat(columns, dim=3)
    triple = torch.nn.functional.pad(triple, (0, 2 * GAP, 0, GAP), value=1.0)  # [B, C, H + gap, 3 (W + gap) + 2 gap]
    triple = triple[: len(triple) // PER_ROW * PER_ROW or len(triple)]
    rows = [torch.cat(list(row), dim=2) for row in triple.split(min(PER_ROW, len(triple)))]
    picture = torch.cat(rows, dim=1).expand(3, -1, -1)  # grey becomes color
    return (picture.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)


def step_picture(folder: Path, step: int) -> Path:
    """Returns where the picture after `step` steps is kept."""
    return folder / f"step-{step:08d}.png"


def filmstrip(folder: Path, size: tuple[int, int], last_step: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns one picture of what the pictures in `folder`, of images of `size` (height, width), show over time.

    A row an image: masked | filled in after some steps, evenly chosen up to `last_step` | original. They are read from
    the files, so a run that was continued has all of its time. None where fewer than two pictures fit together.
    """
    found = sorted((int(m[1]), path) for path in folder.glob("step-*.png") if (m := STEP_NAME.fullmatch(path.name)))
    found = [(step, path) for step, path in found if step <= last_step]
    chosen = sorted(set(np.linspace(0, len(found) - 1, min(FILM_STEPS, len(found))).round().astype(int).tolist()))
    read = [(found[i][0], _triples(found[i][1], size)) for i in chosen]
    whole = [(step, triples) for step, triples in read if triples is not None]
    cut = [(step, triples) for step, triples in whole if triples.shape == whole[-1][1].shape]
    if len(cut) < 2:
        return None
    newest = cut[-1][1]
    columns = [newest[:, 0], *(triples[:, 1] for _, triples in cut), newest[:, 2]]
    return _labelled(np.stack(columns, axis=1)[:FILM_IMAGES], ["masked", *(f"step {s}" for s, _ in cut), "original"])


def _triples(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "n 3 H W 3"] | None:
    """Returns the images of a picture that `reconstruction_picture` drew; None where it is none of that size."""
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except OSError:  # cut short, or no image: not worth ending a run for
        return None
    height, width = size
    high, wide = height + GAP, 3 * (width + GAP) + 2 * GAP  # of a triple
    for per_row in range(PER_ROW, 0, -1):
        factor = _factor(per_row * wide)
        if pixels.shape[1] == per_row * wide * factor and pixels.shape[0] % (high * factor) == 0:
            plain = pixels[::factor, ::factor]
            cells = plain.reshape(-1, high, per_row, wide, 3).swapaxes(1, 2).reshape(-1, high, wide, 3)
            return np.stack([cells[:, :height, i * (width + GAP) :][:, :, :width] for i in range(3)], axis=1)
    return None


def _labelled(cells: UInt8[np.ndarray, "n k H W 3"], labels: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the images in rows, enlarged to some 100 pixels at least, with a heading above each column."""
    n, k, height, width, _ = cells.shape
    factor = max(1, -(-100 // width))
    cells = cells.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width, gap, head = height * factor, width * factor, 2 * GAP, 22
    page = Image.new("RGB", (k * (width + gap), head + n * (height + gap)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for j, label in enumerate(labels):
        draw.text((j * (width + gap) + width // 2, head // 2), label, fill="black", font=font, anchor="mm")
        for i in range(n):
            page.paste(Image.fromarray(cells[i, j]), (j * (width + gap), head + i * (height + gap)))
    return np.asarray(page)


def _factor(width: int, min_width: int = 800) -> int:
    return max(1, -(-min_width // width))


def save_png(path: Path, pixels: UInt8[np.ndarray, "H W 3"], *, min_width: int = 800) -> None:
    """Writes a PNG, enlarged by a whole factor until it is `min_width` pixels wide."""
    factor = _factor(pixels.shape[1], min_width)
    image = Image.fromarray(pixels).resize(
        (pixels.shape[1] * factor, pixels.shape[0] * factor), Image.Resampling.NEAREST
    )
    replace_file(path, lambda partial: image.save(partial, format="PNG"))
