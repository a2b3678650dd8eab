"""What pretraining and fine-tuning ask of an encoder, whichever timm model it wraps."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from .errors import InputError
from .masking import Masking, MaskSampler
from .strategies import Strategy


class Encoder(nn.Module):
    """An unmodified timm model that can run on the visible units of an image only.

    Attributes: `timm` (the model, whose state dict is what is released), `grid` (units high, wide), `unit_size` (side
    of a unit in pixels: what is hidden or visible as a whole, and predicted as a whole), `embed_dim` (width of the
    tokens that come out, one for each unit), `num_prefix_tokens` (class and register tokens, first in the output),
    `mask_token_dim` (width of the tokens that go in), `stage_dims` (width and tokens in a unit of every stage; a single
    one for a plain transformer).
    """

    timm: Any  # a timm model; torch types what hangs on a module as Tensor | Module
    grid: tuple[int, int]
    unit_size: int
    embed_dim: int
    num_prefix_tokens: int
    mask_token_dim: int
    stage_dims: list[tuple[int, int]]

    @property
    def num_units(self) -> int:
        """Number of units N."""
        return self.grid[0] * self.grid[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.unit_size, self.grid[1] * self.unit_size

    @property
    def sharded_blocks(self) -> set[type[nn.Module]]:
        """Classes of blocks that are always called as modules, so that hooks on each can gather its parameters (FSDP).

        None where the parts of a block are run one by one.
        """
        return set()

    @property
    def no_weight_decay(self) -> set[str]:
        """Names below `timm` of parameters that are not decayed in pretraining, beside biases and norms."""
        return set()

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        masking: Masking | None = None,
        mask_token: Float[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "B PK D"]:
        """Returns prefix tokens, then the tokens of the units.

        Without `masking` all units, in grid order: timm's `forward_features`; nothing is hidden then, and `mask_token`
        has no place to stand in. With it the kept ones in the order of
        `ids_keep`, computed from visible pixels only. With `mask_token` as well, all units in grid order, hidden
        patches replaced by that token behind the patch embedding (SimMIM, Xie et al. 2022).
        """
        raise TypeError("an encoder wraps a model: use build_encoder")

    def _check_size(self, images: Float[Tensor, "B C H W"], masking: Masking | None) -> None:
        """Raises InputError unless images have the encoder's size, or none of them is masked and any size will do."""
        if masking is None and not self.timm.patch_embed.strict_img_size:
            return
        if tuple(images.shape[2:]) != self.img_size:
            (height, width), (high, wide) = images.shape[2:], self.img_size
            raise InputError(
                f"images of {height} x {width} pixels given to an encoder for {high} x {wide}: crop or resize them, or "
                f"build it with img_size=({height}, {width})"
            )

    def stages(self, images: Float[Tensor, "B C H W"], masking: Masking) -> list[Float[Tensor, "B _ _"]]:
        """Returns the tokens of the kept units after every stage, those of a unit together; the last as `forward`."""
        raise TypeError(f"a {type(self.timm).__name__} has no stages")

    def mask_sampler(
        self,
        mask_ratio: float,
        *,
        strategy: Strategy = "random",
        mask_unit: int | None = None,
        encode_masked: bool = False,
    ) -> MaskSampler:
        """Returns what draws masks for this encoder, in squares of `mask_unit` pixels (None: its own units).

        `encode_masked` says that the encoder will see mask tokens instead of leaving hidden units out: then there is
        nothing to lay out, and no mask is refused for it.

        Raises InputError when the units of the masks do not consist of whole units of the encoder, or do not tile the
        image.
        """
        unit = self.unit_size
        mask_unit = mask_unit or unit
        if mask_unit % unit:
            lower, upper = mask_unit // unit * unit, -(-mask_unit // unit) * unit
            sizes = f"{lower} or {upper}" if lower else str(upper)
            raise InputError(f"mask.unit {mask_unit} is not a multiple of the encoder's {unit} pixels: use {sizes}")
        if any(side % mask_unit for side in self.img_size):
            height, width = self.img_size
            sizes = [u for u in range(unit, min(height, width), unit) if not height % u and not width % u]
            raise InputError(
                f"mask.unit {mask_unit} does not divide the image of {height} x {width} pixels: use one of "
                f"{', '.join(map(str, sizes))}"
            )
        if self.img_size == (mask_unit, mask_unit):
            raise InputError(
                f"an image of {mask_unit} x {mask_unit} pixels is one unit, hidden as a whole or not: use larger images"
                + (" or a smaller mask.unit" if mask_unit > unit else "")
            )
        plain = MaskSampler(self.grid, mask_ratio, strategy, mask_unit // unit)
        return plain if encode_masked else self._packed(plain)

    def _packed(self, plain: MaskSampler) -> MaskSampler:
        """Returns a sampler whose masks come with what the encoder needs to leave hidden units out; here nothing."""
        return plain

    def sample_masking(
        self,
        batch: int,
        mask_ratio: float = 0.75,
        *,
        strategy: Strategy = "random",
        mask_unit: int | None = None,
        seed: int = 0,
    ) -> Masking:
        """Returns the masks of positions 0, ..., batch - 1, as the loader's workers draw them."""
        sampler = self.mask_sampler(mask_ratio, strategy=strategy, mask_unit=mask_unit)
        return sampler.sample(seed, np.arange(batch))

    def init_weights(self) -> None:
        """Gives the encoder the initial weights of its pretraining; here timm's own, which it was made with."""

    def set_positions(self, kind: Literal["sincos", "learned"]) -> None:
        """Starts absolute positions anew. Raises InputError for a model that has none."""
        raise InputError(
            f"positions {kind}: a {type(self.timm).__name__} has no absolute positions; leave positions null"
        )

    def train_positions(self, trained: bool) -> None:
        """Includes absolute positions in training, or not. Raises InputError if there are none to train."""
        if trained:
            raise InputError(f"train_positions: a {type(self.timm).__name__} has no absolute positions")
