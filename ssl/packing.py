"""How the visible tokens of a hierarchical encoder are laid out, so that windows cost only what is visible in them.

A mask hides whole units (32 pixels for Swin), so most windows are partly empty. Attention among what is left of a
window is exact when tokens attend to tokens of their own window only; so the windows of one image are packed, the
largest first, each into the first of a fixed number of groups that has room, and attention runs group by group under a
mask of "same window". The number and size of the groups are chosen once, by trying a sample of masks: shapes never
change from batch to batch, and a mask that does not fit (up to five in a hundred) is drawn again.

What is computed here is one number a window: the slot at which its tokens begin. The rest follows on the device.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

MANY_WINDOWS = 2  # visible tokens of up to this many full windows form one group, in their own order


def unit_order(levels: int) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Returns row and column of the T = 4**levels tokens of a unit in the order in which patches merge.

    Four tokens in a row are the 2 x 2 that timm's PatchMerging joins, in its order (rows fastest), and so on upwards:
    merging visible tokens is then a reshape, on every level.
    """
    index = np.arange(4**levels)
    row, column = np.zeros_like(index), np.zeros_like(index)
    for level in range(levels):
        row |= (index >> (2 * level) & 1) << level
        column |= (index >> (2 * level + 1) & 1) << level
    return row, column


@dataclass(frozen=True)
class WindowLayout:
    """One stage under one cyclic shift: which tokens may attend to each other, and their places in a window."""

    grid: tuple[int, int]  # units high, wide
    levels: int  # a unit has 2**levels tokens a side
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def tokens_per_unit(self) -> int:
        """Tokens in a unit, T."""
        return 4**self.levels

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Window number [N, T] and place in the window [N, T] of every token; see `window_of` and `place_of`."""
        side = 2**self.levels
        row, column = unit_order(self.levels)
        unit_row, unit_column = np.divmod(np.arange(self.grid[0] * self.grid[1]), self.grid[1])
        number = place = np.zeros((1, 1), np.int64)
        for units, count, inside, window, shift in zip(
            (unit_row, unit_column), self.grid, (row, column), self.window, self.shift, strict=True
        ):
            size = count * side
            at = (units[:, None] * side + inside - shift) % size  # [N, T], after the roll
            # The roll brings the two edges of the image into the last window; timm's mask keeps them apart.
            region = (at >= size - shift).astype(np.int64) if shift else np.zeros_like(at)
            number = (number * (size // window) + at // window) * 2 + region
            place = place * window + at % window
        return np.unique(number, return_inverse=True)[1].reshape(place.shape), place

    @property
    def window_of(self) -> Int[np.ndarray, "N T"]:
        """The window of every token of every unit; a window that the shift wraps around an edge counts as several."""
        return self._tables[0]

    @property
    def place_of(self) -> Int[np.ndarray, "N T"]:
        """The place of every token in its window, row-major."""
        return self._tables[1]

    @cached_property
    def counts(self) -> Int[np.ndarray, "N C"]:
        """How many tokens of each unit lie in each of the C windows."""
        counts = np.zeros((len(self.window_of), int(self.window_of.max()) + 1), np.int32)
        np.add.at(counts, (np.arange(len(counts))[:, None], self.window_of), 1)
        return counts

    @cached_property
    def rank_of(self) -> Int[np.ndarray, "N T"]:
        """How many earlier tokens of the same unit lie in the same window."""
        same = self.window_of[:, :, None] == self.window_of[:, None, :]  # [N, T, T]
        return np.tril(same, -1).sum(axis=2)


def pack_windows(
    sizes: Int[np.ndarray, "B C"], groups: int, group_size: int
) -> tuple[Int[np.ndarray, "B C"], Bool[np.ndarray, " B"]]:
    """Returns the slot at which each window starts, and for which images all windows found room.

    First fit, the largest window first, for all images at a time; a window never straddles two groups of `group_size`
    slots. An empty window starts at 0.
    """
    starts, needed = _first_fit(sizes, groups, group_size)
    return starts, needed <= groups


def _first_fit(
    sizes: Int[np.ndarray, "B C"], groups: int, group_size: int
) -> tuple[Int[np.ndarray, "B C"], Int[np.ndarray, " B"]]:
    """Returns the slot of each window and the number of groups used, more than `groups` where those do not suffice."""
    images = np.arange(len(sizes))
    sizes = sizes.astype(np.int16)  # small numbers: the search below is bound by memory
    order = np.argsort(-sizes, axis=1, kind="stable")  # of int16, a radix sort
    steps = np.ascontiguousarray(np.take_along_axis(sizes, order, axis=1).T[: int((sizes > 0).sum(axis=1).max())])
    free = np.full((len(sizes), groups), group_size, np.int16)
    found = np.ones(len(sizes), bool)
    slots = np.zeros(sizes.shape, np.int32)
    for i, size in enumerate(steps):
        room = free[:, : i + 1] >= size[:, None]  # as many groups as windows so far are in use at the most
        group = room.argmax(axis=1)
        left = free[images, group]
        found &= room[images, group]
        slots[:, i] = (group + 1) * group_size - left
        free[images, group] = left - size
    starts = np.zeros_like(slots)
    np.put_along_axis(starts, order, slots, axis=1)
    starts[sizes == 0] = 0
    return starts, np.where(found, (free < group_size).sum(axis=1), groups + 1)


def choose_shape(sizes: Int[np.ndarray, "B C"], window_area: int, misfits: float) -> tuple[int, int]:
    """Returns the number and size of groups of least cost that hold all but a share `misfits` of the images.

    A slot costs its share of the linear layers, and as much again when its group has 400 slots: the products of
    attention are to a block's linear layers as group_size / (6 * width), the first stages are some 100 wide, and scores
    also move through memory. Sizes are multiples of 8, which the fused kernels of GPUs want of a mask.
    """
    tokens = int(sizes.sum(axis=1).max())
    largest = int(sizes.max())
    may_miss = int(misfits * len(sizes) + 1e-9)
    best: tuple[float, int, int] | None = None
    for group_size in range(-(-largest // 8) * 8, max(3 * window_area, largest + 8), 8):
        least, price = -(-tokens // group_size), group_size * (1 + group_size / 400)
        if best is not None and least * price >= best[0]:
            continue  # not even without empty slots would it be cheaper
        # First fit does not look ahead: with fewer groups it does the same until it finds no room. And any two groups
        # that it fills hold more than the size of one, so twice as many as would just hold the tokens are enough.
        needed = _first_fit(sizes, -(-2 * tokens // group_size) + 1, group_size)[1]
        groups = max(least, int(np.sort(needed)[len(needed) - 1 - may_miss]))
        if best is None or groups * price < best[0]:
            best = groups * price, groups, group_size
    assert best is not None
    return best[1:]


@dataclass(frozen=True)
class WindowPacker:
    """Lays out the visible tokens of every image for each layout of an encoder, in shapes that never change."""

    layouts: tuple[WindowLayout, ...]
    shapes: tuple[tuple[int, int] | None, ...]

    @classmethod
    def for_masks(
        cls, layouts: tuple[WindowLayout, ...], visible: Bool[np.ndarray, "B N"], *, misfits: float
    ) -> "WindowPacker":
        """Returns a packer whose shapes hold all but at most a share `misfits` of these masks.

        Each layout that packs may miss its part of them: with as much for each, more would miss the more there are.
        """
        areas = [layout.window[0] * layout.window[1] for layout in layouts]
        kept = int(visible[0].sum())
        packed = [
            kept * layout.tokens_per_unit > MANY_WINDOWS * area for layout, area in zip(layouts, areas, strict=True)
        ]
        each = misfits / max(1, sum(packed))
        return cls(
            layouts,
            tuple(
                choose_shape(_sizes(layout, visible), area, each) if many else None
                for layout, area, many in zip(layouts, areas, packed, strict=True)
            ),
        )

    def pack(self, visible: Bool[np.ndarray, "B N"]) -> tuple[Int[np.ndarray, "B C"], Bool[np.ndarray, " B"]]:
        """Returns the starts of the windows of all packed layouts, and for which masks every layout has room."""
        starts, fits = [np.zeros((len(visible), 0), np.int32)], np.ones(len(visible), bool)
        for layout, shape in zip(self.layouts, self.shapes, strict=True):
            if shape is not None:
                start, fit = pack_windows(_sizes(layout, visible), *shape)
                starts.append(start)
                fits &= fit
        return np.concatenate(starts, axis=1), fits


def _sizes(layout: WindowLayout, visible: Bool[np.ndarray, "B N"]) -> Int[np.ndarray, "B C"]:
    """Returns the number of visible tokens in each window."""
    return np.rint(visible.astype(np.float32) @ layout.counts.astype(np.float32)).astype(np.int64)
