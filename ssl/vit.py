"""timm's plain vision transformers as encoders of visible patches."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .errors import InputError
from .masking import Masking, MaskSampler, gather_units
from .patches import check_grid, pair
from .pos_embed import sincos_pos_embed


class ViTEncoder(nn.Module):
    """An unmodified timm VisionTransformer that can run on the kept patches only.

    With nothing masked its output is timm's `forward_features`. Attributes: `grid` (patches high, wide), `unit_size`
    (patch side in pixels), `embed_dim`, `num_prefix_tokens` (class and register tokens, first in the output), `timm`
    (the model, whose state dict is what is released).

    Raises InputError for a model that cannot drop patches after adding positions.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        patch_embed = vit.patch_embed
        if not isinstance(patch_embed, PatchEmbed):
            stem = type(patch_embed).__name__
            raise InputError(
                f"its stem ({stem}) mixes neighboring patches, so hidden pixels would leak: use a plain vit_*"
            )
        if vit.pos_embed is None:
            raise InputError("it has no absolute positions, without which dropped patches lose their places")
        height, width = (int(side) for side in patch_embed.patch_size)
        if height != width:
            raise InputError(f"its patches are {height} x {width} pixels; only square ones are supported")
        check_grid(pair(patch_embed.img_size), height)
        self.timm = vit
        self.grid: tuple[int, int] = patch_embed.grid_size
        self.unit_size: int = height
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        for unused in (vit.fc_norm, vit.attn_pool, vit.head):  # tokens do not pass them; DDP waits for every gradient
            if unused is not None:
                unused.requires_grad_(False)

    @property
    def num_units(self) -> int:
        """Number of patches N."""
        return self.grid[0] * self.grid[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.unit_size, self.grid[1] * self.unit_size

    def forward(self, images: Float[Tensor, "B C H W"], masking: Masking | None = None) -> Float[Tensor, "B PK D"]:
        """Returns prefix tokens, then patch tokens: the kept ones in the order of `ids_keep`, or all in grid order."""
        vit = self.timm
        x = vit._pos_embed(vit.patch_embed(images))  # the one place where timm adds positions and prefix tokens
        if masking is not None:
            prefix, patches = x.split([self.num_prefix_tokens, self.num_units], dim=1)
            x = torch.cat([prefix, gather_units(patches, masking.ids_keep)], dim=1)  # [B, prefix + K, D]
        return vit.norm(vit.blocks(vit.norm_pre(x)))

    def sample_masking(
        self, batch: int, mask_ratio: float = 0.75, *, strategy: Literal["random"] = "random", seed: int = 0
    ) -> Masking:
        """Returns the masks of positions 0, ..., batch - 1, as the loader's workers draw them."""
        return MaskSampler(self.num_units, mask_ratio, strategy).sample(seed, np.arange(batch))

    def fix_positions(self) -> None:
        """Excludes the positions from training."""
        if self.timm.pos_embed is not None:
            self.timm.pos_embed.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes as MAE does: linear layers Xavier uniform, class token 0.02, fixed sine-cosine positions.

        The patch embedding is treated as the linear layer it is; its bias keeps torch's default, as MAE's does.
        """
        vit = self.timm
        init_linear(vit)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        prefix = 0 if vit.no_embed_class else self.num_prefix_tokens
        assert vit.pos_embed is not None  # the constructor refuses models without
        vit.pos_embed.copy_(sincos_pos_embed(self.embed_dim, self.grid, num_prefix_tokens=prefix))


def init_linear(module: nn.Module) -> None:
    """Initializes every linear layer Xavier uniform with bias 0 and every layer norm as the identity (MAE's)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
