"""Pictures of what a masked autoencoder fills in: at its own mask, at other ratios, under other kinds of masks."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from quarterlight.ssl.config import MaskConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import MaskedAutoencoder
from quarterlight.ssl.masking import Masking
from quarterlight.ssl.pictures import CONTRAST, Panels, panels
from quarterlight.ssl.strategies import Strategy
from quarterlight.ssl.targets import HOGTarget, NormPixTarget, PCATarget

from .figure import CannotDraw, Picture, as_color, montage_height, new_picture, show_montage

COMPARED = 2  # images of which several reconstructions are shown

Row = list[Float[np.ndarray, "h w 3"] | None]


class Reconstructor:
    """Reconstructs some normalized images under masks of any kind, always the same ones for the same seed."""

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        normalize: nn.Module,
        images: Float[Tensor, "B C H W"],
        mask: MaskConfig,
        *,
        contrast_only: bool,
        seed: int,
    ) -> None:
        if isinstance(autoencoder.target, HOGTarget):
            raise CannotDraw("the target hog predicts histograms of gradients, from which no image follows")
        self.autoencoder, self.images, self.mask, self.seed = autoencoder, images, mask, seed
        self.mean, self.std = normalize.mean, normalize.std
        self.contrast_only = contrast_only and isinstance(autoencoder.target, NormPixTarget)

    def masks(self, ratio: float, strategy: Strategy, count: int) -> Masking:
        """Returns masks for the first `count` images. Raises InputError when they would hide all or none."""
        encoder = self.autoencoder.encoder
        sampler = encoder.mask_sampler(
            ratio,
            strategy=strategy,
            mask_unit=self.mask.unit,
            encode_masked=self.autoencoder.mask_token is not None,
        )
        if sampler.num_keep == encoder.num_units:
            raise InputError(f"mask.ratio {ratio} hides none of {encoder.num_units} units")
        return sampler.sample(self.seed, np.arange(count)).to(self.images.device)

    @torch.no_grad()
    def __call__(self, ratio: float, strategy: Strategy, count: int) -> tuple[Panels, float]:
        """Returns the panels of the first `count` images, and the loss on their hidden units."""
        images = self.images[:count]
        result = self.autoencoder(images, self.masks(ratio, strategy, count))
        shown = panels(self.autoencoder, images, result, mean=self.mean, std=self.std, contrast_only=self.contrast_only)
        return shown, float(result.loss)

    @property
    def honesty(self) -> str:
        """A sentence on what of the original is in the picture beside visible patches."""
        target = self.autoencoder.target
        if self.contrast_only:
            return (
                "The network predicts patches up to their mean and contrast; shown is that alone, around grey, nothing "
                f"of the original in it (a standard deviation is {CONTRAST:g} of the range)."
            )
        if isinstance(target, NormPixTarget):
            return (
                "The network predicts patches up to their mean and contrast, and these two are taken from the original "
                "for every patch, hidden ones too: the picture flatters it (norm_pix_statistics none does not)."
            )
        components = f" (of {target.num_values} principal components)" if isinstance(target, PCATarget) else ""
        return f"The network predicts pixels{components}, and nothing but visible patches is taken from the original."


def draw_reconstructions(reconstruct: Reconstructor) -> tuple[Picture, dict[str, float]]:
    """Draws original, masked, reconstruction and paste-over under the masks of the run, and returns the loss.

    Raises CannotDraw when such masks hide all or nothing.
    """
    mask, encoder = reconstruct.mask, reconstruct.autoencoder.encoder
    try:
        shown, loss = reconstruct(mask.ratio, mask.strategy, len(reconstruct.images))
    except InputError as error:
        raise CannotDraw(str(error)) from error
    quads = [list(quad) for quad in zip(*map(_color, shown), strict=True)]
    half = -(-len(quads) // 2)
    rows: list[Row] = [quads[i] + (quads[i + half] if i + half < len(quads) else [None] * 4) for i in range(half)]
    rows = rows if len(quads) > 1 else [quads[0]]
    height, width = encoder.img_size
    picture = new_picture(
        "reconstructions",
        f"Reconstructions with {100 * mask.ratio:g} % hidden ({mask.strategy} masks of "
        f"{mask.unit or encoder.unit_size} pixels)",
        "Original, what the encoder sees, the network's prediction for all patches (it was never trained on visible "
        f"ones), and the same with the visible patches pasted over. {reconstruct.honesty} Loss {loss:.3f}.",
        height=montage_height(len(rows), len(rows[0]), height / width) + 0.2,
    )
    headings = ["original", "masked", "reconstruction", "pasted over"] * (len(rows[0]) // 4)
    show_montage(picture.figure.subplots(), rows, columns=headings)
    return picture, {"reconstruction_loss": loss}


def draw_ratios(reconstruct: Reconstructor, ratios: tuple[float, ...]) -> tuple[Picture, dict[str, float]]:
    """Draws reconstructions at several mask ratios (MAE, figure 4), and returns the loss at each."""
    strategy = reconstruct.mask.strategy
    return _compared(
        reconstruct,
        {f"{100 * ratio:g} % hidden": (ratio, strategy) for ratio in ratios},
        name="ratios",
        title="Reconstructions with more and more hidden",
        about=f"Every {strategy} mask hides what the one left of it hides, and more."
        if strategy == "random" and list(ratios) == sorted(ratios)
        else f"Masks are of kind {strategy}.",
    )


def draw_strategies(reconstruct: Reconstructor) -> tuple[Picture, dict[str, float]]:
    """Draws reconstructions under random, block and grid masks (MAE, figure 6), and returns the loss under each."""
    ratio = reconstruct.mask.ratio
    kinds: tuple[Strategy, ...] = ("random", "block", "grid")
    return _compared(
        reconstruct,
        {kind: (ratio, kind) for kind in kinds},
        name="strategies",
        title=f"Reconstructions under random, block and grid masks, {100 * ratio:g} % hidden",
        about=f"Grid is the easiest, block the hardest; it was trained under {reconstruct.mask.strategy} masks.",
    )


def _compared(
    reconstruct: Reconstructor, columns: dict[str, tuple[float, Strategy]], *, name: str, title: str, about: str
) -> tuple[Picture, dict[str, float]]:
    found: dict[str, Panels] = {}
    losses: dict[str, float] = {}
    refused = []
    count = min(COMPARED, len(reconstruct.images))
    for heading, (ratio, strategy) in columns.items():
        try:
            found[heading], losses[heading] = reconstruct(ratio, strategy, count)
        except InputError as error:  # few units: it would hide all
            refused.append(str(error))
    if not found:
        raise CannotDraw(refused[0])
    originals = _color(next(iter(found.values())).original)
    shown = {heading: [_color(x) for x in panel[1:]] for heading, panel in found.items()}
    rows: list[Row] = [
        [originals[i] if part == 0 else None, *(parts[part][i] for parts in shown.values())]
        for i in range(count)
        for part in range(3)
    ]
    height, width = reconstruct.autoencoder.encoder.img_size
    losses_said = ", ".join(f"{heading} {loss:.3f}" for heading, loss in losses.items())
    picture = new_picture(
        name,
        title,
        f"{about} {reconstruct.honesty} Loss on hidden patches of these images: {losses_said}."
        + (f" Left out: {'; '.join(refused)}." if refused else ""),
        height=montage_height(len(rows), 1 + len(found), height / width, labelled=True) + 0.2,
    )
    labels = ["masked", "reconstruction", "pasted over"] * count
    show_montage(picture.figure.subplots(), rows, columns=["original", *found], labels=labels)
    return picture, {f"{name}_loss": losses}  # type: ignore[dict-item]


def _color(images: Float[Tensor, "B C H W"]) -> Float[np.ndarray, "B H W 3"]:
    return as_color(images.cpu().numpy())
