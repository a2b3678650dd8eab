"""How the visible tokens of a hierarchical encoder are laid out, so that windows cost only what is visible in them.

A mask hides whole units (32 pixels for Swin), so most windows are partly empty. Attention among what is left of a
window is exact when tokens attend to tokens of their own window only; so the windows of one image are packed, the
largest first, each into the first of a fixed number of groups that has room, and attention runs group by group under a
mask of "same window". The number and size of the groups are chosen once, by trying a sample of masks: shapes never
change from batch to batch, and a mask that does not fit (two to five in a hundred) is drawn again.

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
    images = np.arange(len(sizes))
    sizes = sizes.astype(np.int16)  # small numbers: the search below is bound by memory
    used = np.zeros((len(sizes), groups), np.int16)
    starts = np.zeros(sizes.shape, np.int32)
    fits = np.ones(len(sizes), bool)
    order = np.argsort(-sizes, axis=1, kind="stable")  # of int16, a radix sort
    for window in order.T[: int((sizes > 0).sum(axis=1).max())]:
        size = sizes[images, window]
        room = used + size[:, None] <= group_size
        group = room.argmax(axis=1)
        fits &= room[images, group]
        starts[images, window] = np.where(size > 0, group * group_size + used[images, group], 0)
        used[images, group] += size
    return starts, fits


def choose_shape(sizes: Int[np.ndarray, "B C"], window_area: int, misfits: float) -> tuple[int, int]:
    """Returns the number and size of groups of least cost that hold all but a share `misfits` of the images.

    A slot costs its share of the linear layers, and as much again when its group has 400 slots: the products of
    attention are to a block's linear layers as group_size / (6 * width), the first stages are some 100 wide, and scores
    also move through memory. Sizes are multiples of 8, which the fused kernels of GPUs want of a mask.
    """
    tokens = int(sizes.sum(axis=1).max())
    largest = int(sizes.max())
    best: tuple[float, int, int] | None = None
    for group_size in range(-(-largest // 8) * 8, max(3 * window_area, largest + 8), 8):
        most = -(-2 * tokens // group_size) + 1
        groups = next(
            (g for g in range(-(-tokens // group_size), most) if _misfits(sizes, g, group_size) <= misfits), most
        )
        cost = groups * group_size * (1 + group_size / 400)
        if best is None or cost < best[0]:
            best = cost, groups, group_size
    assert best is not None
    return best[1:]


def _misfits(sizes: np.ndarray, groups: int, group_size: int) -> float:
    return 1 - float(pack_windows(sizes, groups, group_size)[1].mean())


@dataclass(frozen=True)
class WindowPacker:
    """Lays out the visible tokens of every image for each layout of an encoder, in shapes that never change."""

    layouts: tuple[WindowLayout, ...]
    shapes: tuple[tuple[int, int] | None, ...]

    @classmethod
    def for_masks(
        cls, layouts: tuple[WindowLayout, ...], visible: Bool[np.ndarray, "B N"], *, misfits: float
    ) -> "WindowPacker":
        """Returns a packer whose shapes hold all but a share `misfits` of these masks, layout by layout."""
        shapes: list[tuple[int, int] | None] = []
        for layout in layouts:
            area = layout.window[0] * layout.window[1]
            tokens = int(visible[0].sum()) * layout.tokens_per_unit
            few = tokens <= MANY_WINDOWS * area
            shapes.append(None if few else choose_shape(_sizes(layout, visible), area, misfits))
        return cls(layouts, tuple(shapes))

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
