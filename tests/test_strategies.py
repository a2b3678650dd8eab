"""Which units stay visible: exact counts, one mask a position, and the shapes that each strategy promises."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.masking import MaskSampler, num_keep, random_masking
from quarterlight.ssl.strategies import visible_units

STRATEGIES = ("random", "block", "grid")
GRIDS = ((14, 14), (7, 7), (16, 16), (5, 9), (2, 2), (1, 1), (1, 12))
RATIOS = (0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95)


def drawn(strategy: str, grid: tuple[int, int], ratio: float, count: int, *, seed: int = 0) -> np.ndarray:
    """Returns hidden [count, units high, units wide]."""
    kept = num_keep(grid[0] * grid[1], ratio)
    visible = visible_units(strategy, grid, kept, seed=seed, purpose="mask", positions=np.arange(count))
    return ~visible.reshape(count, *grid)


def edge_length(hidden: np.ndarray) -> np.ndarray:
    """Returns the number of neighbors of which one is hidden and one visible, for each image."""
    return (hidden[:, 1:] != hidden[:, :-1]).sum(axis=(1, 2)) + (hidden[:, :, 1:] != hidden[:, :, :-1]).sum(axis=(1, 2))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exactly_as_many_units_are_visible_as_asked(strategy, grid):
    units = grid[0] * grid[1]
    counts = {max(1, int(units * (1 - ratio))) for ratio in RATIOS} | {1, units}
    for kept in sorted(counts):
        visible = visible_units(strategy, grid, kept, seed=3, purpose="mask", positions=np.arange(20))
        assert visible.shape == (20, units) and visible.dtype == bool
        assert visible.sum(axis=1).tolist() == [kept] * 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_is_a_function_of_seed_purpose_and_position_alone(strategy):
    def masks(positions: list[int], seed: int = 5, purpose: str = "mask") -> np.ndarray:
        return visible_units(strategy, (8, 8), 16, seed=seed, purpose=purpose, positions=np.array(positions))

    whole = masks(list(range(100)))
    assert np.array_equal(whole[40:60], masks(list(range(40, 60))))
    assert np.array_equal(whole[[7, 93, 7]], masks([7, 93, 7]))
    assert all(np.array_equal(whole[i : i + 1], masks([i])) for i in (0, 50, 99))
    for other in (masks(list(range(100)), seed=6), masks(list(range(100)), purpose="mask, redraw 1")):
        assert (other != whole).any(axis=1).mean() > (0.5 if strategy == "grid" else 0.9)  # the grid has few offsets
    assert len(np.unique(whole, axis=0)) == (4 if strategy == "grid" else 100)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_random_hides_every_unit_and_every_pair_of_units_equally_often(ratio):
    count, units = 20000, 25
    hidden = drawn("random", (5, 5), ratio, count).reshape(count, units).astype(np.float64)
    masked = units - num_keep(units, ratio)
    alone, both = masked / units, masked * (masked - 1) / (units * (units - 1))
    assert np.abs(hidden.mean(axis=0) - alone).max() < 5 * math.sqrt(alone * (1 - alone) / count)
    pairs = (hidden.T @ hidden / count)[~np.eye(units, dtype=bool)]
    assert np.abs(pairs - both).max() < 5 * math.sqrt(both * (1 - both) / count)


def test_random_masks_are_those_of_sorted_noise():
    masking = MaskSampler((6, 6), 0.75).sample(1, np.arange(50))
    kept = masking.ids_keep.shape[1]
    visible = visible_units("random", (6, 6), kept, seed=1, purpose="mask", positions=np.arange(50))
    assert np.array_equal(visible, ~masking.is_masked.numpy())


def beit(generator: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """BEiT's blocks, from the paper (algorithm 1): hides rectangles until `count` units are hidden.

    A rectangle's area is uniform in [16, what remains], its aspect log-uniform in [0.3, 1 / 0.3]. Where the last one
    would hide too many, some of its units stay visible, here those furthest to the right in the lowest rows.
    """
    hidden = np.zeros(grid, bool)
    while (remaining := count - int(hidden.sum())) > 0:
        area = generator.uniform(16, max(16, remaining))
        aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        height, width = min(max(height, 1), grid[0]), min(max(width, 1), grid[1])
        top, left = generator.integers(0, grid[0] - height + 1), generator.integers(0, grid[1] - width + 1)
        block = np.zeros(grid, bool)
        block[top : top + height, left : left + width] = True
        added = np.argwhere(block & ~hidden)[:remaining]
        hidden[tuple(added.T)] = True
    return hidden


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_block_masks_are_statistically_those_of_beit(ratio):
    count = 1500
    ours = drawn("block", (14, 14), ratio, count)
    generator = np.random.default_rng(0)
    theirs = np.stack([beit(generator, (14, 14), 196 - num_keep(196, ratio)) for _ in range(count)])
    spread = np.hypot(edge_length(ours).std(), edge_length(theirs).std()) / math.sqrt(count)
    assert abs(edge_length(ours).mean() - edge_length(theirs).mean()) < 5 * spread  # about 1.2 of 40
    share = (ours.mean(axis=0), theirs.mean(axis=0))
    assert np.abs(share[0] - share[1]).max() < 5 * math.sqrt(2 * 0.25 / count)
    pieces = [np.mean([ndimage.label(x)[1] for x in masks]) for masks in (ours, theirs)]
    assert pieces[0] == pytest.approx(pieces[1], rel=0.1)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("grid", [(14, 14), (12, 20)], ids=str)
def test_block_masks_have_far_fewer_edges_than_random_ones(grid, ratio):
    block, random = (edge_length(drawn(strategy, grid, ratio, 300)).mean() for strategy in ("block", "random"))
    units = grid[0] * grid[1]
    share = 1 - num_keep(units, ratio) / units
    neighbors = 2 * units - sum(grid)
    assert random == pytest.approx(neighbors * 2 * share * (1 - share) * units / (units - 1), rel=0.02)
    assert block < 0.35 * random


def test_block_masks_at_a_low_ratio_consist_of_rectangles():
    hidden, random = drawn("block", (14, 14), 0.3, 300), drawn("random", (14, 14), 0.3, 300)
    square = np.ones((3, 3), bool)
    opened = [[ndimage.binary_opening(x, square).sum() / x.sum() for x in masks] for masks in (hidden, random)]
    assert np.mean(opened[0]) > 0.85 and np.mean(opened[1]) < 0.01  # the share that lies in hidden squares of 3 x 3
    assert np.mean([ndimage.label(x)[1] for x in hidden]) < 3
    assert np.mean([ndimage.label(x)[1] for x in random]) > 15


def test_one_block_of_sixteen_units_is_a_rectangle_with_its_last_row_cut():
    kept, shapes = 196 - 16, []
    visible = visible_units("block", (14, 14), kept, seed=0, purpose="mask", positions=np.arange(400))
    for hidden in ~visible.reshape(-1, 14, 14):
        box = hidden[ndimage.find_objects(hidden.astype(int))[0]]
        row_by_row = box.ravel()[:16].all() and box.shape[0] == -(-16 // box.shape[1])
        if row_by_row:  # else the first rectangle was rounded to 14 or 15 units, and a second one was begun
            shapes.append(box.shape)
    alone = [shape for shape in shapes if shape in {(3, 6), (4, 4), (6, 3)}]  # what 16 units round to within 1 / 0.3
    assert len(alone) > 0.35 * 400 and len(set(alone)) == 3
    assert len(shapes) - len(alone) < 0.05 * 400  # two blocks side by side


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_block_masks_reach_every_place_alike_on_opposite_sides(ratio):
    share = drawn("block", (14, 14), ratio, 3000).mean(axis=0)
    assert share.mean() == pytest.approx(1 - num_keep(196, ratio) / 196)
    assert share.min() > 0.01 and share.max() < 0.995
    assert np.abs(share - share[:, ::-1]).max() < 0.07
    assert np.abs(share - share[::-1]).max() < 0.09  # the last block is cut from its top
    middle, corner = share[6:8, 6:8].mean(), share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert middle > corner  # as with BEiT: rectangles lie inside the image


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (2, 2), (6, 10)], ids=str)
def test_grid_at_three_quarters_keeps_one_unit_of_every_two_by_two_at_a_random_offset(grid):
    count = 2000
    visible = ~drawn("grid", grid, 0.75, count)
    cells = visible.reshape(count, grid[0] // 2, 2, grid[1] // 2, 2)
    assert (cells.sum(axis=(2, 4)) == 1).all()
    assert (cells == cells[:, :1, :, :1]).all()  # the same one in every cell of an image
    share = cells[:, 0, :, 0].mean(axis=0)
    assert np.abs(share - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / count)


@pytest.mark.parametrize(("ratio", "side"), [(0.75, 2), (0.9375, 4), (0.984375, 8), (0.5, 2)])
def test_grid_leaves_equally_many_units_in_every_cell(ratio, side):
    visible = ~drawn("grid", (16, 16), ratio, 200)
    cells = visible.reshape(200, 16 // side, side, 16 // side, side).sum(axis=(2, 4))
    assert (cells == round(side**2 * (1 - ratio))).all()
    if ratio == 0.5:  # Bayer's checkerboard
        assert (visible[:, 1:] != visible[:, :-1]).all() and (visible[:, :, 1:] != visible[:, :, :-1]).all()


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
def test_grid_at_other_ratios_is_even_and_hides_every_unit_equally_often(ratio):
    hidden = drawn("grid", (16, 16), ratio, 3000)
    quarters = hidden.reshape(3000, 2, 8, 2, 8).sum(axis=(2, 4))
    random = drawn("random", (16, 16), ratio, 3000).reshape(3000, 2, 8, 2, 8).sum(axis=(2, 4))
    assert quarters.std() < 0.3 * random.std()
    share = hidden.mean(axis=0)
    assert np.abs(share - share.mean()).max() < 0.06


def encoder(img_size: int | tuple[int, int] = 224) -> Encoder:
    return build_encoder("vit_tiny_patch16_224", img_size=img_size, embed_dim=12, depth=1, num_heads=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_unit_of_two_patches_hides_squares_of_two_by_two_patches(strategy):
    sampler = encoder().mask_sampler(0.75, strategy=strategy, mask_unit=32)
    assert sampler.num_keep == num_keep(49, 0.75) * 4 == 48
    masking = sampler.sample(0, np.arange(200))
    assert masking.ids_keep.shape == (200, 48) and masking.ids_masked.shape == (200, 148)
    cells = masking.is_masked.view(200, 7, 2, 7, 2)
    assert (cells == cells[:, :, :1, :, :1]).all()
    visible = visible_units(strategy, (7, 7), 12, seed=0, purpose="mask", positions=np.arange(200))
    assert torch.equal(~cells[:, :, 0, :, 0].flatten(1), torch.from_numpy(visible))


def test_a_mask_unit_of_the_encoders_own_is_the_default():
    plain, given = (encoder().mask_sampler(0.75, mask_unit=unit).sample(0, np.arange(20)) for unit in (None, 16))
    assert torch.equal(plain.ids_keep, given.ids_keep) and torch.equal(plain.ids_restore, given.ids_restore)
    assert plain.ids_keep.shape == (20, 49)


@pytest.mark.parametrize(
    ("img_size", "unit", "said"),
    [
        (224, 24, "mask.unit 24 is not a multiple of the encoder's 16 pixels: use 16 or 32$"),
        (224, 8, "mask.unit 8 is not a multiple of the encoder's 16 pixels: use 16$"),
        (224, 48, "mask.unit 48 does not divide the image of 224 x 224 pixels: use one of 16, 32, 112$"),
        ((96, 160), 48, "mask.unit 48 does not divide the image of 96 x 160 pixels: use one of 16, 32$"),
        (224, 448, "mask.unit 448 does not divide the image .*: use one of 16, 32, 112$"),
    ],
)
def test_mask_units_that_do_not_fit_are_refused_with_those_that_do(img_size, unit, said):
    with pytest.raises(InputError, match=said):
        encoder(img_size).mask_sampler(0.75, mask_unit=unit)
    for size in said.rpartition("use ")[2].removeprefix("one of ").rstrip("$").replace(" or ", ", ").split(", "):
        if int(size) < 100:  # what the message names works
            assert encoder(img_size).mask_sampler(0.5, mask_unit=int(size)).num_keep > 0


def test_a_ratio_that_hides_every_mask_unit_is_refused():
    with pytest.raises(InputError, match="hides all 4 units"):
        encoder(64).mask_sampler(0.9, mask_unit=32)


def test_a_grid_that_mask_units_do_not_tile_is_refused():
    with pytest.raises(InputError, match="5 units high"):
        MaskSampler((5, 4), 0.5, block=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("block", [1, 2])
def test_the_first_part_of_the_masked_units_is_a_uniform_part_of_them(strategy, block):
    count, grid = 4000, (8, 8)
    masking = MaskSampler(grid, 0.75, strategy, block).sample(0, np.arange(count))
    ids = masking.ids_masked
    first = ids.shape[1] // 3
    chosen = torch.zeros(count, 64, dtype=torch.bool).scatter_(1, ids[:, :first], True)
    assert not (chosen & ~masking.is_masked).any() and (chosen.sum(dim=1) == first).all()
    hidden = masking.is_masked.sum(dim=0)
    share = chosen.sum(dim=0) / hidden  # of the masks that hide a unit, how many choose it
    expected = first / ids.shape[1]
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / hidden).sqrt()).all()
    if block == 2:  # units of one square are chosen independently of each other
        cells = chosen.view(count, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).flatten(0, 2)  # [count * 16, 4]
        together = (cells[:, 0] & cells[:, 3]).float().sum() / hidden.sum() * 4
        wanted = expected * (first - 1) / (ids.shape[1] - 1)
        assert float(together) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kept_units_too_come_in_random_order(strategy):
    masking = MaskSampler((4, 4), 0.5, strategy).sample(0, np.arange(8000))
    first = torch.zeros(8000, 16).scatter_(1, masking.ids_keep[:, :1], 1.0).sum(dim=0)
    visible = (~masking.is_masked).sum(dim=0)
    assert ((first / visible - 1 / 8).abs() < 5 * (1 / 8 * 7 / 8 / visible).sqrt()).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("ratio", "block"), [(0.75, 1), (0.1, 1), (0.5, 2), (0.9, 2)])
def test_masked_ids_are_the_rest_of_the_shuffle(strategy, ratio, block):
    masking = MaskSampler((8, 10), ratio, strategy, block).sample(2, np.arange(30))
    kept = masking.ids_keep.shape[1]
    shuffle = masking.ids_restore.argsort(dim=1)
    assert torch.equal(masking.ids_masked, shuffle[:, kept:]) and torch.equal(masking.ids_keep, shuffle[:, :kept])
    for ids, is_masked in zip(masking.ids_masked, masking.is_masked, strict=True):
        assert sorted(ids.tolist()) == is_masked.nonzero().flatten().tolist()


def test_masked_ids_of_noise_and_of_nothing_masked():
    masking = random_masking(2, 5, 0.6, noise=torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]]))
    assert masking.ids_masked.tolist() == [[0, 4, 2], [2, 3, 4]]
    assert random_masking(2, 9, 0.0).ids_masked.shape == (2, 0)


@pytest.mark.parametrize(("mask_unit", "said"), [(None, "use larger images$"), (32, "or a smaller mask.unit")])
def test_an_image_of_one_unit_is_refused(mask_unit, said):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=16 if mask_unit else 32, depth=1)
    with pytest.raises(InputError, match=f"32 x 32 pixels is one unit.*{said}"):
        encoder.mask_sampler(0.75, mask_unit=mask_unit)
