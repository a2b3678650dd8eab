"""timm's plain vision transformers as encoders of visible patches."""

from typing import Literal

import torch
from jaxtyping import Float
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .encoder import Encoder
from .errors import InputError
from .masking import Masking, gather_units
from .patches import check_grid, pair
from .pos_embed import sincos_pos_embed


class ViTEncoder(Encoder):
    """A timm VisionTransformer that can run on the kept patches only.

    A unit is a patch. Raises InputError for a model that cannot drop patches after adding positions.
    """

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        height, width = self._unit_sides(vit)
        if height != width:
            raise InputError(f"its patches are {height} x {width} pixels; only square ones are supported")
        check_grid(pair(vit.patch_embed.img_size), height)
        self.timm = vit
        self.grid = (int(vit.patch_embed.grid_size[0]), int(vit.patch_embed.grid_size[1]))
        self.unit_size = height
        self.embed_dim = self.mask_token_dim = vit.embed_dim
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.stage_dims = [(vit.embed_dim, 1)]
        if not isinstance(vit.patch_drop, nn.Identity | None):
            raise InputError("patch_drop_rate drops patches at random, as masks do: leave it out and set mask.ratio")
        for unused in (vit.fc_norm, vit.attn_pool, vit.head):  # tokens do not pass them; DDP waits for every gradient
            if unused is not None:
                unused.requires_grad_(False)

    def _unit_sides(self, vit: VisionTransformer | Eva) -> tuple[int, int]:
        """Returns height and width of a patch in pixels; raises InputError for a stem that is no patch embedding."""
        if not isinstance(vit.patch_embed, PatchEmbed):
            raise InputError(f"its stem ({type(vit.patch_embed).__name__}) is not supported: use a plain vit_*")
        height, width = vit.patch_embed.patch_size
        return int(height), int(width)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        masking: Masking | None = None,
        mask_token: Float[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "B PK D"]:
        """Returns prefix tokens, then patch tokens: the kept ones in the order of `ids_keep`, or all in grid order."""
        vit = self.timm
        self._check_size(images, masking)
        x = vit.patch_embed(images)  # [B, N, D], or [B, h, w, D] where the image size is dynamic
        if masking is not None and mask_token is not None:
            hidden = masking.is_masked.view(-1, *x.shape[1:-1], 1)
            x = torch.where(hidden, mask_token.to(x.dtype), x)
        return self._encode(x, masking if mask_token is None else None)

    def _encode(self, x: Float[Tensor, "B *hw D"], masking: Masking | None) -> Float[Tensor, "B PK D"]:
        """Returns the tokens that come of embedded patches, or of the kept ones among them."""
        vit = self.timm
        x = vit._pos_embed(x)  # the one place where timm adds positions and prefix tokens
        if masking is not None:
            x = self._kept(x, masking)
        return vit.norm(vit.blocks(vit.norm_pre(x)))

    def _kept(self, x: Float[Tensor, "B PN D"], masking: Masking) -> Float[Tensor, "B PK D"]:
        prefix, patches = x.split([self.num_prefix_tokens, self.num_units], dim=1)
        return torch.cat([prefix, gather_units(patches, masking.ids_keep)], dim=1)

    @property
    def sharded_blocks(self) -> set[type[nn.Module]]:
        """timm's blocks."""
        return {type(block) for block in self.timm.blocks}

    @property
    def no_weight_decay(self) -> set[str]:
        """The positions, where they are trained. As in MAE the class token is decayed."""
        return {"pos_embed"}

    def train_positions(self, trained: bool) -> None:
        """Includes the positions in training, or not. Raises InputError if there are none to train."""
        if self.timm.pos_embed is not None:
            self.timm.pos_embed.requires_grad_(trained)
        elif trained:
            raise InputError("train_positions: the encoder has no absolute positions")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes as MAE does: linear layers Xavier uniform, class token 0.02, sine-cosine positions.

        The patch embedding is treated as the linear layer it is; its bias keeps torch's default, as MAE's does.
        """
        vit = self.timm
        init_linear(vit)
        if isinstance(vit.patch_embed.proj, nn.Conv2d):
            nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if vit.pos_embed is not None:
            self.set_positions("sincos")

    @torch.no_grad()
    def set_positions(self, kind: Literal["sincos", "learned"]) -> None:
        """Starts the positions anew: fixed waves as MAE's, or a normal of 0.02 to learn from (the ViT paper's).

        Raises InputError for a model without positions.
        """
        vit = self.timm
        if vit.pos_embed is None:
            raise InputError(f"positions {kind}: the encoder was made without absolute positions")
        if kind == "learned":
            nn.init.trunc_normal_(vit.pos_embed, std=0.02)
        else:
            prefix = 0 if vit.no_embed_class else self.num_prefix_tokens
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
