"""Layout of visible tokens: the order of merging and the windows against timm's, the packing against plain loops."""

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition
from torch import nn

from quarterlight.ssl.masking import MaskSampler
from quarterlight.ssl.packing import WindowLayout, WindowPacker, choose_shape, pack_windows, unit_order

# grid in units, levels, window, shift
LAYOUTS = {
    "square": ((3, 3), 2, (4, 4), (0, 0)),
    "square, shifted": ((3, 3), 2, (4, 4), (2, 2)),
    "odd window": ((7, 7), 1, (7, 7), (0, 0)),
    "odd window, shifted": ((7, 7), 1, (7, 7), (3, 3)),
    "windows across units": ((3, 6), 2, (6, 6), (3, 3)),
    "units of one token": ((7, 14), 0, (7, 7), (3, 3)),
    "non-square window": ((2, 4), 3, (4, 8), (0, 0)),
    "non-square window, shifted": ((2, 4), 3, (4, 8), (2, 4)),
    "shifted along one side": ((2, 4), 1, (4, 4), (0, 2)),
    "shifted along the other side": ((4, 2), 1, (4, 4), (2, 0)),
    "one window, shifted": ((2, 2), 1, (4, 4), (2, 2)),
}


def layout_and_block(name: str) -> tuple[WindowLayout, SwinTransformerBlock]:
    """Returns a layout, and timm's block that it is of."""
    grid, levels, window, shift = LAYOUTS[name]
    block = SwinTransformerBlock(
        4, (grid[0] << levels, grid[1] << levels), num_heads=1, window_size=window, shift_size=shift,
        always_partition=True,
    )  # fmt: skip
    assert tuple(block.window_size) == window and tuple(block.shift_size) == shift
    return WindowLayout(grid, levels, window, shift), block


def tokens_of_units(layout: WindowLayout) -> np.ndarray:
    """Returns the row-major number of every token [N, T] of every unit."""
    side = 2**layout.levels
    row, column = unit_order(layout.levels)
    numbers = np.arange(layout.grid[0] * side * layout.grid[1] * side)
    units = numbers.reshape(layout.grid[0], side, layout.grid[1], side).transpose(0, 2, 1, 3).reshape(-1, side, side)
    return units[:, row, column]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_patches_in_unit_order_merge_as_timms_do(levels):
    side, width = 2**levels, 3
    features = torch.randn(2, side, side, width)
    row, column = unit_order(levels)
    tokens = features[:, row, column]  # [B, T, E]
    for _ in range(levels):
        merging = PatchMerging(width, out_dim=5)
        nn.init.normal_(merging.norm.weight)
        features, joined = merging(features), tokens.reshape(len(tokens), -1, 4 * width)
        tokens = merging.reduction(merging.norm(joined))
        width = 5
        row, column = unit_order(features.shape[1].bit_length() - 1)
        torch.testing.assert_close(tokens, features[:, row, column], atol=1e-6, rtol=0)
    assert tokens.shape == (2, 1, 5)


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4])
def test_unit_order_names_every_token_once(levels):
    row, column = unit_order(levels)
    side = 2**levels
    assert sorted(row * side + column) == list(range(side * side))


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_tokens_are_of_one_window_where_timm_lets_them_attend_to_each_other(name):
    layout, block = layout_and_block(name)
    numbers = tokens_of_units(layout)
    height, width = (side << layout.levels for side in layout.grid)
    in_grid = torch.arange(height * width).view(1, height, width, 1)
    rolled = in_grid.roll((-layout.shift[0], -layout.shift[1]), dims=(1, 2))
    windows = window_partition(rolled, layout.window).flatten(1)  # [windows, A] numbers of tokens
    allowed = np.zeros((height * width, height * width), bool)
    places = np.zeros(height * width, np.int64)
    for i, window in enumerate(windows.numpy()):
        mask = np.zeros((len(window),) * 2) if block.attn_mask is None else block.attn_mask[i].numpy()
        allowed[np.ix_(window, window)] = mask == 0
        places[window] = np.arange(len(window))
    together = layout.window_of.ravel()[:, None] == layout.window_of.ravel()
    assert np.array_equal(together, allowed[np.ix_(numbers.ravel(), numbers.ravel())])
    assert np.array_equal(layout.place_of, places[numbers])
    assert sorted(set(layout.window_of.ravel())) == list(range(layout.window_of.max() + 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_and_ranks_number_the_tokens_of_a_unit_in_each_window(name):
    layout, _ = layout_and_block(name)
    assert layout.tokens_per_unit == layout.window_of.shape[1] == 4**layout.levels
    assert layout.counts.shape == (layout.grid[0] * layout.grid[1], layout.window_of.max() + 1)
    for unit, windows in enumerate(layout.window_of.tolist()):
        assert [windows.count(window) for window in range(layout.counts.shape[1])] == layout.counts[unit].tolist()
        assert [windows[:i].count(window) for i, window in enumerate(windows)] == layout.rank_of[unit].tolist()


def test_layouts_of_the_same_numbers_are_the_same():
    first, second = (WindowLayout((2, 4), 1, (4, 4), (0, 2)) for _ in range(2))
    assert first == second and len({first, second}) == 1
    assert first != WindowLayout((2, 4), 1, (4, 4), (2, 0))


def packed_by_loops(sizes: list[int], group_size: int) -> list[tuple[int, int]]:
    """First fit, the largest first, with as many groups as it takes. Returns (group, slot in it) of every window."""
    used: list[int] = []
    found = [(0, 0)] * len(sizes)
    for window in sorted(range(len(sizes)), key=lambda window: -sizes[window]):
        if sizes[window] == 0:
            continue
        for group in range(len(used) + 1):
            if group == len(used):
                used.append(0)
            if used[group] + sizes[window] <= group_size:
                break
        found[window] = group, used[group]
        used[group] += sizes[window]
    return found


@pytest.mark.parametrize(("largest", "groups", "group_size"), [(16, 9, 16), (16, 5, 32), (49, 7, 72), (7, 1, 64)])
def test_windows_are_packed_first_fit_with_the_largest_first(largest, groups, group_size):
    random = np.random.default_rng(0)
    sizes = random.integers(0, largest + 1, (300, 24)) * (random.random((300, 24)) < 0.75)
    sizes[0] = 0
    starts, fits = pack_windows(sizes, groups, group_size)
    outcomes = set()
    for b in range(len(sizes)):
        wanted = packed_by_loops(sizes[b].tolist(), group_size)
        assert fits[b] == (1 + max(group for group, _ in wanted) <= groups)
        outcomes.add(bool(fits[b]))
        if not fits[b]:
            continue
        assert starts[b].tolist() == [group * group_size + slot for group, slot in wanted]
        taken = np.zeros(groups * group_size, int)
        for start, size in zip(starts[b], sizes[b], strict=True):
            taken[start : start + size] += 1
            assert size == 0 or start // group_size == (start + size - 1) // group_size
        assert taken.max(initial=0) <= 1 and taken.sum() == sizes[b].sum()
    assert fits[0] and outcomes == {True, False}


def test_packing_does_not_depend_on_the_other_images():
    random = np.random.default_rng(1)
    sizes = random.integers(0, 20, (50, 16)) * (random.random((50, 16)) < 0.5)
    starts, fits = pack_windows(sizes, 3, 32)
    for b in range(50):
        alone, fit = pack_windows(sizes[b : b + 1], 3, 32)
        assert np.array_equal(alone[0], starts[b]) and fit[0] == fits[b]


def test_a_window_larger_than_a_group_never_fits():
    starts, fits = pack_windows(np.array([[9, 1], [8, 1]]), 4, 8)
    assert fits.tolist() == [False, True] and starts[1].tolist() == [0, 8]


@pytest.mark.parametrize("misfits", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("largest", [4, 49, 144])
def test_chosen_shapes_hold_all_but_the_allowed_share_of_the_masks(largest, misfits):
    random = np.random.default_rng(2)
    sizes = random.integers(0, largest + 1, (200, 20)) * (random.random((200, 20)) < 0.4)
    groups, group_size = choose_shape(sizes, largest, misfits)
    assert group_size % 8 == 0 and group_size >= sizes.max()
    share = 1 - pack_windows(sizes, groups, group_size)[1].mean()
    assert share <= misfits + 1e-12
    if groups > 1:  # one group fewer would not do
        tokens = sizes.sum(axis=1).max()
        fewer = 1 - pack_windows(sizes, groups - 1, group_size)[1].mean()
        assert fewer > misfits or (groups - 1) * group_size < tokens


@pytest.mark.parametrize("misfits", [0.0, 0.05])
@pytest.mark.parametrize("largest", [4, 49])
def test_the_chosen_shape_is_the_cheapest_of_all(largest, misfits):
    random = np.random.default_rng(3)
    sizes = random.integers(0, largest + 1, (40, 20)) * (random.random((40, 20)) < 0.4)
    tokens, costs = sizes.sum(axis=1).max(), {}
    for group_size in range(-(-sizes.max() // 8) * 8, max(3 * largest, sizes.max() + 8), 8):
        needed = sorted(1 + max(group for group, _ in packed_by_loops(image.tolist(), group_size)) for image in sizes)
        groups = max(-(-tokens // group_size), needed[-1 - int(misfits * 40)])
        costs[groups, group_size] = groups * group_size * (1 + group_size / 400)
    assert choose_shape(sizes, largest, misfits) == min(costs, key=lambda shape: costs[shape])


def masks(grid: tuple[int, int], ratio: float, count: int, seed: int = 0) -> np.ndarray:
    return ~MaskSampler(grid, ratio).sample(seed, np.arange(count)).is_masked.numpy()


def test_nothing_is_padded_for_windows_of_eight_in_256_pixels_at_three_quarters():
    visible = masks((8, 8), 0.75, 300)
    layouts = tuple(WindowLayout((8, 8), levels, (8, 8), (s, s)) for levels in (3, 2, 1) for s in (0, 4))
    layouts += (WindowLayout((8, 8), 0, (8, 8), (0, 0)),)
    packer = WindowPacker.for_masks(layouts, visible, misfits=0.02)
    assert packer.shapes == ((16, 64), (16, 64), (4, 64), (4, 64), None, None, None)


def test_layouts_share_the_masks_that_may_miss():
    visible, one = masks((7, 7), 0.5, 300), WindowLayout((7, 7), 3, (7, 7), (3, 3))
    others = tuple(WindowLayout((7, 7), 3, (7, 7), (shift, 0)) for shift in (1, 2, 4, 5))
    for layouts in ((one,), (one, *others)):
        packer = WindowPacker.for_masks(layouts, visible, misfits=0.2)
        assert 1 - packer.pack(visible)[1].mean() <= 0.2 + 1e-12
        alone = choose_shape(np.rint(visible @ one.counts).astype(int), 49, 0.2 / len(layouts))
        assert packer.shapes[0] == alone


def test_a_packer_says_which_masks_fit_every_layout_and_where_windows_start():
    layouts = tuple(WindowLayout((7, 7), levels, (7, 7), shift) for levels in (3, 2, 1) for shift in ((0, 0), (3, 3)))
    packer = WindowPacker.for_masks(layouts, masks((7, 7), 0.75, 300), misfits=0.1)
    packed = [(layout, shape) for layout, shape in zip(layouts, packer.shapes, strict=True) if shape is not None]
    assert len(packed) == 4 and packer.shapes[4:] == (None, None)  # 12 units of 4 tokens are few
    visible = masks((7, 7), 0.75, 300, seed=1)
    starts, fits = packer.pack(visible)
    assert 0.7 < fits.mean() < 1
    first, wanted = 0, np.ones(300, bool)
    for layout, shape in packed:
        sizes = np.stack([layout.counts[image].sum(axis=0) for image in visible])
        its_starts, its_fits = pack_windows(sizes, *shape)
        count = layout.counts.shape[1]
        assert np.array_equal(starts[:, first : first + count], its_starts)
        first, wanted = first + count, wanted & its_fits
    assert first == starts.shape[1] and np.array_equal(fits, wanted)
