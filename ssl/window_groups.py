"""Visible tokens of a batch arranged in groups of windows, on the device and without waiting for it.

The workers computed where each window starts (packing.py); slots, places and pairs of tokens follow from it here.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .packing import WindowLayout


class Groups(NamedTuple):
    """How the visible tokens of a batch are arranged for one layout, G groups of L slots in all."""

    slots: Int[Tensor, " n"] | None  # slot of every token; None: tokens in their own order are the groups
    source: Int[Tensor, " rows"] | None  # token in every slot; slots that stay empty repeat token 0
    places: Int[Tensor, "G L"]  # place in the window
    pairs: Int[Tensor, "G L L"]  # row of the bias table, or R where two slots are not of one window


class LayoutTables(nn.Module):
    """A `WindowLayout` on the device, and what turns kept units into groups there, without waiting."""

    window_of: Tensor
    place_of: Tensor
    counts: Tensor
    rank_of: Tensor

    def __init__(self, layout: WindowLayout) -> None:
        super().__init__()
        self.window = layout.window
        for name in ("window_of", "place_of", "counts", "rank_of"):
            self.register_buffer(name, torch.from_numpy(getattr(layout, name)), persistent=False)

    def arrange(
        self, ids_keep: Int[Tensor, "B K"], starts: Int[Tensor, "B C"], shape: tuple[int, int] | None
    ) -> Groups:
        """Returns the groups of a batch, in the given number and size, or one for each image."""
        (b, k), unit, device = ids_keep.shape, ids_keep.flatten(), ids_keep.device
        windows = self.window_of.index_select(0, unit).view(b, -1)  # [B, K*T]
        places = self.place_of.index_select(0, unit).view(b, -1)
        n = windows.shape[1]
        slots = source = None
        if shape is not None:
            per_image = shape[0] * shape[1]
            counts = self.counts.index_select(0, unit).view(b, k, -1)
            earlier = counts.cumsum(dim=1, dtype=torch.int32) - counts  # [B, K, C] tokens of units before, by window
            rank = earlier.gather(2, windows.view(b, k, -1)) + self.rank_of.index_select(0, unit).view(b, k, -1)
            image = torch.arange(b, device=device)[:, None]
            slots = (starts.gather(1, windows) + rank.view(b, n) + image * per_image).flatten()
            rows = b * per_image
            source = slots.new_zeros(rows).index_copy_(0, slots, torch.arange(b * n, device=device))
            windows = windows.new_full((rows,), -1).index_copy_(0, slots, windows.flatten())
            places = places.new_zeros(rows).index_copy_(0, slots, places.flatten())
        length = n if shape is None else shape[1]
        windows, places = windows.int().view(-1, length), places.int().view(-1, length)
        high, wide = self.window
        code = places // wide * (2 * wide - 1) + places % wide
        pairs = code[:, :, None] - code[:, None, :] + (high - 1) * (2 * wide - 1) + wide - 1
        same = windows[:, :, None] == windows[:, None, :]  # empty slots see each other: a softmax needs some key
        return Groups(slots, source, places, torch.where(same, pairs, (2 * high - 1) * (2 * wide - 1)))


def rearranged(x: Float[Tensor, "B S E"], now: Groups | None, wanted: Groups | None) -> Float[Tensor, "B S2 E"]:
    """Returns the tokens moved from one arrangement to another; None is their own order."""
    before = now.slots if now is not None else None
    after = wanted.slots if wanted is not None else None
    if before is after:
        return x
    source = wanted.source if wanted is not None else None
    if source is not None and before is not None:
        source = before.index_select(0, source)
    moved: Any = _MovedRows.apply(x.flatten(0, 1), source, before, after)
    return moved.view(len(x), -1, x.shape[2])


class _MovedRows(torch.autograd.Function):
    """y = x[source], or x[before] (None). Every token has one row in x (`before`) and one in y (`after`).

    So the gradient is two row copies. That of plain indexing would add rows one by one, on a GPU by atomics. Rows of
    empty slots get none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor | None, before: Tensor | None, after: Tensor | None) -> Tensor:
        ctx.save_for_backward(before, after)
        ctx.num_rows = len(x)
        rows = before if source is None else source  # once in the arguments: the compiler refuses one tensor twice
        assert rows is not None
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (before, after), (grad,) = ctx.saved_tensors, grads
        if after is not None:
            grad = grad.index_select(0, after)
        if before is not None:
            grad = grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy_(0, before, grad)
        return grad, None, None, None
