"""Where the blocks of an encoder look: softmax weights, their mean distance in pixels, their product over blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor
from torch.nn import functional as F

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.swin import SwinEncoder


def blocks_of(encoder: Encoder) -> list[Any]:
    """Returns timm's blocks from input to output, those of a Swin stage after stage."""
    if isinstance(encoder, SwinEncoder):
        return [block for stage in encoder.timm.layers for block in stage.blocks]
    return list(encoder.timm.blocks)


def block_names(encoder: Encoder) -> list[str]:
    """Returns a name for each block: "block 1", or "stage 1, block 1" for a Swin."""
    if isinstance(encoder, SwinEncoder):
        stages = enumerate(encoder.timm.layers, 1)
        return [f"stage {s}, block {b}" for s, stage in stages for b in range(1, len(stage.blocks) + 1)]
    return [f"block {b}" for b in range(1, len(encoder.timm.blocks) + 1)]


@torch.no_grad()
def attention_weights(
    encoder: Encoder, images: Float[Tensor, "B C H W"], reduce: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Returns the softmax weights of every block for normalized images, from input to output; or `reduce` of each.

    Of a ViT [B, heads, T, T] over prefix and patch tokens; of a Swin [B * windows, heads, A, A], windows as timm
    partitions the (shifted) grid. All of them at once may not fit into memory, `reduce` is called block by block. They
    are those of timm's own unfused path: the model computes them, and a hook takes them on their way to the dropout.

    Raises InputError for blocks that attend in another way.
    """
    found: list[Tensor] = []
    with _unfused(encoder) as dropouts:
        handles = [
            dropout.register_forward_hook(
                lambda module, given, out: found.append(given[0] if reduce is None else reduce(given[0]))
            )
            for dropout in dropouts
        ]
        try:
            encoder(images)
        finally:
            for handle in handles:
                handle.remove()
    if len(found) != len(dropouts):
        raise InputError(f"the attention of {type(blocks_of(encoder)[0]).__name__} cannot be read")
    return found


@contextmanager
def _unfused(encoder: Encoder) -> Iterator[list[Any]]:
    """Makes timm compute attention in steps that hooks can see, in evaluation mode; yields each block's dropout."""
    modules = [getattr(block, "attn", None) for block in blocks_of(encoder)]
    if not all(hasattr(attn, "attn_drop") for attn in modules):
        raise InputError(f"the attention of {type(blocks_of(encoder)[0]).__name__} cannot be read")
    before = [getattr(attn, "fused_attn", None) for attn in modules]  # the second Swin has one way only
    was_training = encoder.training
    encoder.eval()
    for attn in modules:
        attn.fused_attn = False  # type: ignore[union-attr]
    try:
        yield [attn.attn_drop for attn in modules]  # type: ignore[union-attr]
    finally:
        encoder.train(was_training)
        for attn, fused in zip(modules, before, strict=True):
            if fused is None:
                del attn.fused_attn  # type: ignore[union-attr]
            else:
                attn.fused_attn = fused  # type: ignore[union-attr]


def mean_distance(weights: Float[Tensor, "B H T T"], places: Float[Tensor, "T 2"]) -> Float[Tensor, " H"]:
    """Returns the mean distance between a query and what it attends to, weighted by attention, for each head.

    `places` are (y, x) in pixels, so the distance is in pixels (ViT, Dosovitskiy et al. 2021, appendix D.7, figure 11).
    Weights of a query are scaled to sum to one over the keys given, such as all patches without the class token.
    """
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    distances = torch.cdist(places, places).to(weights)
    return (weights * distances).sum(dim=-1).mean(dim=(0, 2))


def mean_attention_distance(encoder: Encoder, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, " _"]]:
    """Returns `mean_distance` in pixels of every head, block by block; of a Swin within its windows."""
    blocks = iter(blocks_of(encoder))
    if isinstance(encoder, SwinEncoder):
        sides = (encoder.img_size[0] // block.input_resolution[0] for block in blocks_of(encoder))  # of a token

        def reduce(weights: Tensor) -> Tensor:
            return mean_distance(weights, grid_places(tuple(next(blocks).window_size), next(sides), weights))

    else:
        first = encoder.num_prefix_tokens

        def reduce(weights: Tensor) -> Tensor:
            places = grid_places(encoder.grid, encoder.unit_size, weights)
            return mean_distance(weights[:, :, first:, first:], places)

    return attention_weights(encoder, images, reduce)


def grid_places(grid: tuple[int, ...], side: int, like: Tensor) -> Float[Tensor, "T 2"]:
    """Returns (y, x) in pixels of the cells of a grid, row by row, `side` pixels apart."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) * side for n in grid[:2])
    return torch.cartesian_prod(rows, columns).view(-1, 2)


@torch.no_grad()
def rollout(
    encoder: Encoder, images: Float[Tensor, "B C H W"], start: Float[Tensor, "B Q T"] | None = None
) -> Float[Tensor, "B Q T0"]:
    """Returns how much of each input token the output tokens `start` are made of (Abnar & Zuidema 2020, section 4.1).

    Attention averaged over heads, half of it replaced by the identity for the residual path, multiplied over blocks.
    `start` holds weights over the last tokens, whose rows sum to 1: a one-hot row asks what one token looks at. None
    is the class token, or the mean of all tokens where there is none (Q = 1). Rows of the result sum to 1; its tokens
    are prefix and patches (ViT), or all patches of 4 x 4 pixels, say (Swin). Differs from the paper: in a Swin, which
    it does not treat, a merged token is an equal part of each of its four.
    """
    layers = attention_weights(encoder, images, lambda weights: weights.mean(dim=1))
    if start is None:
        tokens = encoder.num_units + encoder.num_prefix_tokens
        start = layers[0].new_zeros(len(images), 1, tokens)
        if getattr(encoder.timm, "cls_token", None) is not None:
            start[:, :, 0] = 1.0
        else:
            start[:, :, encoder.num_prefix_tokens :] = 1.0 / encoder.num_units
    rows = start.to(layers[0])
    if isinstance(encoder, SwinEncoder):
        return _through_windows(encoder, layers, rows)
    for weights in reversed(layers):
        rows = 0.5 * rows + 0.5 * rows @ weights
    return rows


def _through_windows(
    encoder: SwinEncoder, layers: list[Tensor], rows: Float[Tensor, "B Q T"]
) -> Float[Tensor, "B Q T0"]:
    """`rollout` for windows: `layers` hold [windows, A, A], as many and as large as each block has them."""
    x = rows.unflatten(2, encoder.grid).permute(0, 2, 3, 1)  # [B, h, w, Q]: as timm has channels
    height, width = encoder.grid
    for block, weights in zip(reversed(blocks_of(encoder)), reversed(layers), strict=True):
        if tuple(block.input_resolution) != (height, width):  # before the merging of this stage
            x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) / 4
            height, width = x.shape[1:3]
        window, shift = tuple(block.window_size), tuple(block.shift_size)
        windows = window_partition(x.roll((-shift[0], -shift[1]), dims=(1, 2)), window).flatten(1, 2)  # [W, A, Q]
        looked = (weights.transpose(1, 2) @ windows).unflatten(1, window)
        x = 0.5 * x + 0.5 * window_reverse(looked, window, height, width).roll(shift, dims=(1, 2))
    return x.permute(0, 3, 1, 2).flatten(2)


def on_image(
    encoder: Encoder, rows: Float[Tensor, "B Q T0"], size: tuple[int, int] | None = None
) -> Float[Tensor, "B Q H W"]:
    """Returns what `rollout` gives to the patches as a map of the image's size, bilinearly enlarged; or of `size`."""
    patches = rows[:, :, encoder.num_prefix_tokens :]
    high = round((patches.shape[2] * encoder.grid[0] / encoder.grid[1]) ** 0.5)
    grid = patches.unflatten(2, (high, patches.shape[2] // high))
    return F.interpolate(grid, size or encoder.img_size, mode="bilinear", align_corners=False)
