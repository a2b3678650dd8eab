"""The light networks that predict hidden units from the encoder's tokens; thrown away after pretraining."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attend
from .config import DecoderConfig
from .encoder import Encoder
from .errors import InputError
from .masking import Masking, gather_units
from .pos_embed import sincos_pos_embed
from .vit import init_linear

Norm = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """What the decoders share: embedding of the encoder's tokens, mask token, positions, final norm and prediction.

    With `encode_masked` tokens of all units come in, in grid order, and there is no mask token. With
    `config.multi_scale` tokens of every stage come in. Blocks are always called, never run part by part.
    """

    pos_embed: Tensor

    def __init__(self, config: DecoderConfig, encoder: Encoder, *, num_values: int, encode_masked: bool) -> None:
        super().__init__()
        if config.embed_dim % 4:
            raise InputError(f"decoder.embed_dim {config.embed_dim} is not a multiple of 4, as its positions need")
        if config.embed_dim % config.num_heads:
            raise InputError(
                f"decoder.embed_dim {config.embed_dim} is not a multiple of decoder.num_heads {config.num_heads}"
            )
        dim, prefix = config.embed_dim, encoder.num_prefix_tokens
        self.num_prefix_tokens = prefix
        self.multi_scale = config.multi_scale
        self.embed = MultiScaleEmbed(encoder, dim) if config.multi_scale else nn.Linear(encoder.embed_dim, dim)
        self.mask_token = None if encode_masked else nn.Parameter(torch.zeros(1, 1, dim))
        pos_embed = sincos_pos_embed(dim, encoder.grid, num_prefix_tokens=prefix)
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        self.norm = Norm(dim)
        self.pred = nn.Linear(dim, num_values)

    def init_weights(self) -> None:
        """Initializes as MAE does."""
        init_linear(self)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def visible(self, tokens: Tensor | list[Tensor], masking: Masking) -> Float[Tensor, "B PK D"]:
        """Returns the embedded tokens with the positions of prefix and kept units."""
        x = self.embed(tokens)
        return x + torch.cat([self._prefix_positions(x), self._positions(masking.ids_keep)], dim=1)

    def hidden(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Returns mask tokens with the positions of the units `ids`."""
        assert self.mask_token is not None
        return self.mask_token + self._positions(ids)

    def _positions(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        return self.pos_embed[0, self.num_prefix_tokens :].index_select(0, ids.flatten()).unflatten(0, ids.shape)

    def _prefix_positions(self, x: Float[Tensor, "B PK D"]) -> Float[Tensor, "B P D"]:
        return self.pos_embed[:, : self.num_prefix_tokens].expand(len(x), -1, -1)


class TransformerDecoder(Decoder):
    """MAE's decoder: mask tokens stand in the hidden places, and blocks attend over all places.

    Attention does not know an order, so tokens are never un-shuffled: they stand as prefix, visible, hidden, each with
    its position. Where only some units are to be predicted, the last block computes only those.
    """

    def __init__(self, config: DecoderConfig, encoder: Encoder, *, num_values: int, encode_masked: bool) -> None:
        super().__init__(config, encoder, num_values=num_values, encode_masked=encode_masked)
        self.blocks = nn.Sequential(
            *(
                TailBlock(config.embed_dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=Norm)  # type: ignore[arg-type]  # timm calls it as a class
                for _ in range(config.depth)
            )
        )
        self.init_weights()

    def forward(
        self, tokens: Tensor | list[Tensor], masking: Masking, ids: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Returns predictions for the masked units `ids`, or for all units in grid order (ids None).

        Hidden units that are not among `ids` take no part. Predictions for visible units are trained by nothing.
        """
        if self.mask_token is None:
            x = self.norm(self.blocks(self.embed(tokens) + self.pos_embed))[:, self.num_prefix_tokens :]
            return self.pred(x if ids is None else gather_units(x, ids))
        visible = self.visible(tokens, masking)
        x = torch.cat([visible, self.hidden(masking.ids_masked if ids is None else ids)], dim=1)
        if ids is not None:
            x = self.blocks[:-1](x)
            return self.pred(self.norm(self.blocks[-1](x, first=visible.shape[1])))
        x = self.norm(self.blocks(x))[:, self.num_prefix_tokens :]
        return self.pred(gather_units(x, masking.ids_restore))


class TailBlock(Block):
    """A plain timm Block that can compute the last tokens only, all of them as keys.

    It does so in `forward`, as what shards parameters or computes activations anew acts where a block is called.
    """

    def forward(
        self, x: Float[Tensor, "B L D"], attn_mask: Tensor | None = None, is_causal: bool = False, *, first: int = 0
    ) -> Float[Tensor, "B S D"]:
        """Returns the tokens from `first` on after the block; queries and MLP of the others are not computed."""
        if first == 0:
            return super().forward(x, attn_mask, is_causal)
        assert attn_mask is None and not is_causal
        attn: Any = self.attn
        dim = x.shape[2]
        normed = self.norm1(x)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        q = _heads(F.linear(normed[:, first:], weight[:dim], bias[:dim]), attn.num_heads)
        kv = F.linear(normed, weight[dim:], bias[dim:])
        k, v = (_heads(part, attn.num_heads) for part in kv.chunk(2, dim=2))
        tail = x[:, first:] + attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return tail + self.mlp(self.norm2(tail))


class CrossDecoder(Decoder):
    """Hidden units attend to the visible tokens and not to each other (CrossMAE, Fu et al. 2024, arXiv:2401.14391).

    So any share of them may be predicted, and the others cost nothing. Differs from CrossMAE: every block looks at the
    encoder's last tokens, where there each takes a learned mix of all the encoder's blocks; and visible tokens get the
    decoder's positions, which an encoder without absolute positions needs.
    """

    def __init__(self, config: DecoderConfig, encoder: Encoder, *, num_values: int, encode_masked: bool) -> None:
        if encode_masked:
            raise InputError("decoder.name cross cannot be had with encode_masked: use transformer or linear")
        super().__init__(config, encoder, num_values=num_values, encode_masked=False)
        self.context_norm = Norm(config.embed_dim)
        self.blocks = nn.ModuleList(
            CrossBlock(config.embed_dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.init_weights()

    def forward(
        self, tokens: Tensor | list[Tensor], masking: Masking, ids: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Returns predictions for the units `ids`, or for all units in grid order (ids None)."""
        context = self.context_norm(self.visible(tokens, masking))
        if ids is None:
            ids = torch.arange(masking.ids_restore.shape[1], device=context.device).expand_as(masking.ids_restore)
        x = self.hidden(ids)
        for block in self.blocks:
            x = block(x, context)
        return self.pred(self.norm(x))


class CrossBlock(nn.Module):
    """Attention from queries to a context, then an MLP, each behind a norm and added."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "B S D"], context: Float[Tensor, "B K D"]) -> Float[Tensor, "B S D"]:
        """Returns the queries after the block."""
        q = _heads(self.q(self.norm1(x)), self.num_heads)
        k, v = (_heads(part, self.num_heads) for part in self.kv(context).chunk(2, dim=2))
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LinearDecoder(nn.Module):
    """SimMIM's: one linear layer on the encoder's own tokens of hidden units (Xie et al. 2022, arXiv:2111.09886)."""

    def __init__(self, config: DecoderConfig, encoder: Encoder, *, num_values: int, encode_masked: bool) -> None:
        super().__init__()
        if not encode_masked:
            raise InputError("decoder.name linear predicts from tokens of hidden units: set encode_masked true")
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.multi_scale = False
        self.pred = nn.Linear(encoder.embed_dim, num_values)
        init_linear(self)

    def forward(
        self, tokens: Float[Tensor, "B PN D"], masking: Masking, ids: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S V"]:
        """Returns predictions for the units `ids`, or for all units in grid order (ids None)."""
        units = tokens[:, self.num_prefix_tokens :]
        return self.pred(units if ids is None else gather_units(units, ids))


class MultiScaleEmbed(nn.Module):
    """Every stage's tokens of a unit, normalized and side by side, through a linear layer of their own, summed.

    Hiera's multi-scale fusion (Ryali et al. 2023, arXiv:2306.00989, appendix), there with strided convolutions.
    """

    def __init__(self, encoder: Encoder, dim: int) -> None:
        super().__init__()
        if len(encoder.stage_dims) == 1:
            raise InputError("decoder.multi_scale needs an encoder with several stages, such as a swin_*")
        self.tokens_per_unit = [tokens for _, tokens in encoder.stage_dims]
        self.norms = nn.ModuleList(Norm(width) for width, _ in encoder.stage_dims[:-1])  # the last stage has its own
        self.linears = nn.ModuleList(nn.Linear(width * tokens, dim) for width, tokens in encoder.stage_dims)

    def forward(self, stages: list[Float[Tensor, "B _ _"]]) -> Float[Tensor, "B K D"]:
        """Returns one token a unit."""
        normed = [norm(x) for norm, x in zip(self.norms, stages[:-1], strict=True)] + [stages[-1]]
        units = [x.reshape(len(x), -1, t * x.shape[2]) for x, t in zip(normed, self.tokens_per_unit, strict=True)]
        return torch.stack([linear(x) for linear, x in zip(self.linears, units, strict=True)]).sum(dim=0)


def _heads(x: Float[Tensor, "B L D"], num_heads: int) -> Float[Tensor, "B H L E"]:
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def build_decoder(config: DecoderConfig, encoder: Encoder, *, num_values: int, encode_masked: bool) -> nn.Module:
    """Returns the decoder that `config` names, with MAE's initial weights, predicting `num_values` of each unit.

    Raises InputError for combinations that make no sense.
    """
    if config.multi_scale and (encode_masked or config.name == "linear"):
        raise InputError("decoder.multi_scale is for visible units: it cannot be had with encode_masked")
    kinds = {"transformer": TransformerDecoder, "cross": CrossDecoder, "linear": LinearDecoder}
    return kinds[config.name](config, encoder, num_values=num_values, encode_masked=encode_masked)
