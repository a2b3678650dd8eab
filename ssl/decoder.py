"""The light network that predicts hidden patches from the encoder's tokens."""

from functools import partial

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .config import DecoderConfig
from .errors import InputError
from .masking import Masking, gather_units
from .pos_embed import sincos_pos_embed
from .vit import init_linear


class TransformerDecoder(nn.Module):
    """MAE's decoder: mask tokens fill the hidden places, positions are added, and blocks attend over all places."""

    pos_embed: Tensor

    def __init__(
        self, config: DecoderConfig, *, encoder_dim: int, grid: tuple[int, int], num_prefix_tokens: int, out_dim: int
    ) -> None:
        super().__init__()
        if config.embed_dim % config.num_heads:
            raise InputError(
                f"decoder.embed_dim {config.embed_dim} is not a multiple of decoder.num_heads {config.num_heads}"
            )
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(encoder_dim, config.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        pos_embed = sincos_pos_embed(config.embed_dim, grid, num_prefix_tokens=num_prefix_tokens)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.blocks = nn.Sequential(
            *(
                Block(config.embed_dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]  # timm calls it as a class
                for _ in range(config.depth)
            )
        )
        self.norm = norm(config.embed_dim)
        self.pred = nn.Linear(config.embed_dim, out_dim)
        init_linear(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "B PK D"], masking: Masking) -> Float[Tensor, "B N P2C"]:
        """Returns the predicted pixels of every patch, in grid order; those of visible patches mean nothing."""
        x = self.embed(tokens)  # [B, prefix + K, decoder width]
        prefix, visible = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        b, n = masking.ids_restore.shape
        hidden = self.mask_token.to(x.dtype).expand(b, n - visible.shape[1], -1)
        patches = gather_units(torch.cat([visible, hidden], dim=1), masking.ids_restore)  # [B, N, decoder width]
        x = torch.cat([prefix, patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.pred(x[:, self.num_prefix_tokens :])
