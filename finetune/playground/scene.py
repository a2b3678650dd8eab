"""What a masked autoencoder makes of one image under any mask, and where one of its patches looks."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from torch import Tensor

from quarterlight.finetune.pictures.attention import attention_weights, block_names, rollout
from quarterlight.finetune.pictures.autoencoders import load_subject
from quarterlight.finetune.pictures.figure import CannotDraw
from quarterlight.finetune.pictures.reconstructions import Reconstructor
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.config import EncoderConfig
from quarterlight.ssl.decode import ImageFile
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.masking import Masking
from quarterlight.ssl.pictures import panels
from quarterlight.ssl.strategies import Strategy
from quarterlight.ssl.swin import SwinEncoder
from quarterlight.ssl.targets import NormPixTarget

SIDE = 448  # pixels that an image is shown with, at least: enlarged by a whole factor
PAINTED = 0.1  # share of a unit that must be painted over for it to be hidden
MARK = (0, 220, 255)  # a color that the map of attention does not have, around the patch that was clicked
ROLLED_OUT, ALL_HEADS = "rolled out over all blocks", "mean of all heads"


class Filled(NamedTuple):
    """What is shown of one reconstruction."""

    masked: UInt8[np.ndarray, "h w 3"]
    pasted: UInt8[np.ndarray, "h w 3"]  # hidden units as predicted, visible ones as they are
    prediction: UInt8[np.ndarray, "h w 3"]
    said: str


class Scene:
    """An autoencoder, and the size and grid in which it sees images."""

    def __init__(self, init: str) -> None:
        """Loads it. Raises InputError for what is no pretraining run, or predicts nothing that can be shown."""
        subject = load_subject(init, EncoderConfig(), untrained=False, seed=0)
        if subject.autoencoder is None:
            raise InputError(subject.no_decoder)
        self.report, self.mask = subject.report, subject.mask
        self.autoencoder, self.encoder = subject.autoencoder, subject.encoder
        self.in_chans: Literal[1, 3] = 1 if subject.spec.args.get("in_chans", 3) == 1 else 3
        self.crop = CenterCrop(self.encoder.img_size, subject.crop_pct)
        self.normalize = Normalize(subject.spec.mean, subject.spec.std)
        blank = self.normalize(torch.zeros(1, *self.encoder.img_size, self.in_chans, dtype=torch.uint8))
        self.honesty: dict[bool, str] = {}  # by contrast_only: what of the original is in a picture
        try:
            for only in (False, True):
                about = Reconstructor(self.autoencoder, self.normalize, blank, self.mask, contrast_only=only, seed=0)
                # of an option of launch/visualize.py, which here is a box to tick
                self.honesty[only] = about.honesty.replace("norm_pix_statistics none", "the contrast alone")
        except CannotDraw as error:
            raise InputError(f"init {init}: {error}") from error

    @property
    def predicts_contrast(self) -> bool:
        """Whether mean and contrast of a patch are not predicted, but taken from the original or left out."""
        return isinstance(self.autoencoder.target, NormPixTarget)

    @property
    def factor(self) -> int:
        """How many times an image is enlarged to be shown."""
        return max(1, -(-SIDE // min(self.encoder.img_size)))

    @property
    def layers(self) -> list[str]:
        """What attention can be looked at: of a Swin only rolled out, since a block sees windows."""
        return [ROLLED_OUT] if isinstance(self.encoder, SwinEncoder) else [ROLLED_OUT, *block_names(self.encoder)]

    @property
    def heads(self) -> list[str]:
        """Whose attention can be looked at, where it is that of a block."""
        if isinstance(self.encoder, SwinEncoder):
            return [ALL_HEADS]
        return [ALL_HEADS, *(f"head {i + 1}" for i in range(self.encoder.timm.blocks[0].attn.num_heads))]

    def cropped(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W C"]:
        """Returns the part of any image that the encoder sees, at its size and with its channels."""
        if self.in_chans == 1:
            pixels = np.asarray((pixels @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8))[:, :, None]
        return self.crop(ImageFile.of_pixels(np.ascontiguousarray(pixels)), np.empty(0)).numpy()

    def shown(self, pixels: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns what the encoder sees as it is shown: in color, and enlarged."""
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(self.factor, axis=0).repeat(self.factor, axis=1)

    def sampled(self, strategy: Strategy, ratio: float, seed: int) -> Bool[np.ndarray, "high wide"]:
        """Returns a mask (True = hidden) as pretraining would draw it. Raises InputError when it would hide all."""
        sampler = self.encoder.mask_sampler(ratio, strategy=strategy, mask_unit=self.mask.unit, encode_masked=True)
        return sampler.sample(seed, np.zeros(1, np.int64)).is_masked[0].numpy().reshape(self.encoder.grid)

    def painted(self, alpha: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "high wide"]:
        """Returns a mask (True = hidden) of the units that are painted over; `alpha` > 0 is paint, at any size."""
        paint = torch.from_numpy(alpha > 0).float()[None, None]
        return (torch.nn.functional.adaptive_avg_pool2d(paint, self.encoder.grid)[0, 0] >= PAINTED).numpy()

    @torch.no_grad()
    def fill(
        self, pixels: UInt8[np.ndarray, "H W C"], is_masked: Bool[np.ndarray, "high wide"], contrast_only: bool = False
    ) -> Filled:
        """Returns the reconstruction of an image under a mask; `contrast_only` as `ssl.pictures.panels` has it.

        Raises InputError when the mask hides all, since an encoder needs something to see.
        """
        count, units = int(is_masked.sum()), is_masked.size
        if count == units:
            raise InputError("everything is hidden: leave at least one patch visible")
        if count == 0:
            seen = self.shown(pixels)
            return Filled(seen, seen, seen, "Nothing is hidden, so there is nothing to fill in.")
        images = self.normalize(torch.from_numpy(pixels)[None])
        result = self.autoencoder(images, _masking(torch.from_numpy(is_masked).reshape(1, -1)))
        mean, std = self.normalize.mean, self.normalize.std
        found = panels(self.autoencoder, images, result, mean=mean, std=std, contrast_only=contrast_only)
        masked, pasted, prediction = (self._visible(x) for x in (found.masked, found.pasted, found.prediction))
        size = self.encoder.unit_size
        said = f"{count} of {units} patches of {size} x {size} pixels are hidden ({100 * count / units:.0f} %), "
        return Filled(
            masked, pasted, prediction, f"{said}loss on them {float(result.loss):.4f}. {self.honesty[contrast_only]}"
        )

    @torch.no_grad()
    def attention(
        self, pixels: UInt8[np.ndarray, "H W C"], place: tuple[int, int], layer: str, head: str
    ) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        """Returns where the patch at `place` (x, y of the shown image) looks when nothing is hidden, and a sentence.

        Bright is the largest share besides its own, which would outshine all others. Raises InputError for an encoder
        whose attention cannot be read.
        """
        (high, wide), side = self.encoder.grid, self.encoder.unit_size * self.factor
        row, column = min(max(0, place[1] // side), high - 1), min(max(0, place[0] // side), wide - 1)
        shares = self._shares(pixels, row * wide + column, layer, head)
        cells = shares.shape[0] // high  # in a side of the patch: of a Swin several
        own = np.s_[row * cells : (row + 1) * cells, column * cells : (column + 1) * cells]
        others = shares.copy()
        others[own] = 0.0
        heat = colormaps["magma"](shares / max(float(others.max()), 1e-12))[:, :, :3]  # above 1: the brightest color
        grey = self.shown(pixels).mean(axis=2, keepdims=True) / 255
        enlarged = heat.repeat(side // cells, axis=0).repeat(side // cells, axis=1)
        picture = (255 * (0.3 * grey + 0.7 * enlarged)).round().astype(np.uint8)
        _mark(picture[row * side : (row + 1) * side, column * side : (column + 1) * side])
        how = layer if layer == ROLLED_OUT else f"{layer}, {head}"
        itself, best = 100 * float(shares[own].sum()), 100 * float(others.max())
        said = f"Row {row + 1}, column {column + 1}, {how}: {itself:.1f} % of its attention stays with itself"
        return picture, f"{said}, and the brightest place has {best:.1f} %."

    def _shares(
        self, pixels: UInt8[np.ndarray, "H W C"], unit: int, layer: str, head: str
    ) -> Float[np.ndarray, "high wide"]:
        """Returns the share of every unit (of a Swin: of every first patch) in what `unit` takes up."""
        encoder, first = self.encoder, self.encoder.num_prefix_tokens
        images = self.normalize(torch.from_numpy(pixels)[None])
        if layer == ROLLED_OUT:
            start = torch.zeros(1, 1, first + encoder.num_units)
            start[0, 0, first + unit] = 1.0
            shares = rollout(encoder, images, start)[0, 0, first:]
        else:
            block, heads = self.layers.index(layer) - 1, self.heads
            of = lambda x: x.mean(dim=1) if head == ALL_HEADS else x[:, heads.index(head) - 1]  # noqa: E731
            shares = attention_weights(encoder, images, of)[block][0, first + unit, first:]
        high = round((len(shares) * encoder.grid[0] / encoder.grid[1]) ** 0.5)
        return shares.reshape(high, -1).double().numpy()

    def _visible(self, images: Float[Tensor, "1 C H W"]) -> UInt8[np.ndarray, "h w 3"]:
        return self.shown((images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _masking(is_masked: Bool[Tensor, "1 N"]) -> Masking:
    """Returns a mask as an encoder takes it: visible units in grid order, and windows left to the encoder."""
    ids_shuffle = is_masked.int().argsort(dim=1, stable=True)
    return Masking(ids_shuffle[:, : int((~is_masked).sum())], ids_shuffle.argsort(dim=1), is_masked)


def _mark(patch: UInt8[np.ndarray, "h w 3"]) -> None:
    """Draws a frame inside a part of a picture."""
    edge = max(2, len(patch) // 16)
    inside = patch[edge:-edge, edge:-edge].copy()
    patch[:] = MARK
    patch[edge:-edge, edge:-edge] = inside
