"""The attention kernel for where a model runs, and Swin's relative-position bias for tokens in any arrangement."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def prefers_matmul(device_type: str, dtype: torch.dtype) -> bool:
    """Returns whether plain matmul, softmax, matmul is the faster attention: on a CPU in bf16.

    There it makes a whole ViT-B pretraining step 1.26 times as fast as torch's fused kernel; in float32 the fused one
    wins by some 5 %, and on a GPU always.
    """
    return device_type == "cpu" and dtype == torch.bfloat16


def attend(
    q: Float[Tensor, "*B H L E"],
    k: Float[Tensor, "*B H S E"],
    v: Float[Tensor, "*B H S E"],
    bias: Float[Tensor, "*B H L S"] | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*B H L E"]:
    """Returns softmax(q k^T * scale + bias) v by the faster kernel; `scale` None is 1 / sqrt(E), -inf forbids."""
    bias = None if bias is None else bias.to(q.dtype)  # in bf16 too: what is kept of the scores halves or better
    if not prefers_matmul(q.device.type, q.dtype):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype) @ v


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Picks the attention kernel of every timm block in `model` for where it will run."""
    fused = not prefers_matmul(device.type, torch.bfloat16 if precision == "bf16" else torch.float32)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]  # a plain attribute of timm's attention


def relative_bias(
    table: Float[Tensor, "R H"],
    pairs: Int[Tensor, "G L L"],
    places: Int[Tensor, "G L"],
    relative_position_index: Int[Tensor, "A A"],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "G H L L"]:
    """Returns the bias of every pair of tokens, -inf where `pairs` is R: the two are not of one window.

    `table` holds a row for each relative position, `pairs` the row of each pair, `places` where a token stands in its
    window of A places, and `relative_position_index` timm's row for two places. The bias is of type `dtype`, None: of
    the table's; the table's gradient is summed in its own precision.

    On an accelerator the gradient of a gather would add millions of pairs into a few thousand cells by atomics, slow
    and in random order; there the same bias is written as one-hot matrix products. On a CPU a gather is twice as fast.
    """
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        return bias_by_products(table, pairs, places, relative_position_index).to(dtype or table.dtype)
    bias: Any = _GatheredBias.apply(table, pairs, dtype or table.dtype)
    return bias.transpose(0, 1)


def bias_by_products(
    table: Float[Tensor, "R H"],
    pairs: Int[Tensor, "G L L"],
    places: Int[Tensor, "G L"],
    relative_position_index: Int[Tensor, "A A"],
) -> Float[Tensor, "G H L L"]:
    """`relative_bias` as E B E^T with one-hot places E and B the bias of two places.

    The sums over pairs are then products both ways, in an order that does not change. (What is left to indexing is the
    gradient of B's A * A rows, which torch sorts, and a compiler may add by atomics.)
    """
    (groups, length), area, heads = places.shape, len(relative_position_index), table.shape[1]
    with torch.autocast(table.device.type, enabled=False):  # products with ones are exact only in full precision
        one_hot = (places[:, :, None] == torch.arange(area, device=places.device)).to(table.dtype)  # [G, L, A]
        of_places = table[relative_position_index.flatten()].view(area, area, heads)
        rows = one_hot.flatten(0, 1) @ of_places.transpose(1, 2).reshape(area, heads * area)  # [G*L, H*A]
        bias = rows.view(groups, length * heads, area) @ one_hot.transpose(1, 2)  # [G, L*H, L]
    bias = bias.view(groups, length, heads, length).transpose(1, 2)
    return bias.masked_fill((pairs == len(table))[:, None], float("-inf"))


class _GatheredBias(torch.autograd.Function):
    """bias[h, g, i, j] = table[pairs[g, i, j], h], -inf for row R; its gradient counts rows head by head."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.num_rows, ctx.dtype = len(table), table.dtype
        padded = F.pad(table.detach().t(), (0, 1), value=float("-inf"))  # [H, R + 1]
        # Gathered, then rounded: four times as fast as gathering numbers of 16 bits.
        return padded.index_select(1, pairs.flatten()).to(dtype).view(len(padded), *pairs.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (pairs,), (grad,) = ctx.saved_tensors, grads
        allowed = (pairs.flatten() != ctx.num_rows).nonzero().squeeze(1)  # a quarter or so; the others have no gradient
        cells = pairs.flatten()[allowed]
        heads = grad.to(ctx.dtype).flatten(1).index_select(1, allowed)
        sums = [torch.bincount(cells, weights=head, minlength=ctx.num_rows) for head in heads]
        return torch.stack(sums).t().to(ctx.dtype), None, None
