"""Crops of small images as matrix products, against PIL's and torch's antialiased bicubic filters."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from quarterlight.ssl import resample
from quarterlight.ssl.augment import CenterCrop, RandomCrop, random_crop_box
from quarterlight.ssl.decode import ImageFile
from quarterlight.ssl.randoms import uniforms
from quarterlight.ssl.resample import TABLE_BYTES, UNIT, crop_maps, crop_number, fits_tables, resize_crops

SIDE = 12
CROPS = [(start, length) for start in range(SIDE) for length in range(1, SIDE - start + 1)]


def photos(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth random pictures with some noise."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
        found.append(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)[..., :channels])
    return np.stack(found)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("size", [8, 12, 20])
def test_every_crop_of_a_side_is_resized_as_pil_does(size):
    lines, maps = photos(1, 16, SIDE)[0, :, :, 0], crop_maps(SIDE, size).double().numpy() / UNIT
    assert maps.shape == (len(CROPS), size, SIDE)
    ours, theirs = [], []
    for number, (start, length) in enumerate(CROPS):
        ours.append(np.clip(np.round(lines @ maps[number].T), 0, 255))
        crop = Image.fromarray(np.ascontiguousarray(lines[:, start : start + length]))
        theirs.append(np.array(crop.resize((size, 16), Image.Resampling.BICUBIC), float))
        assert np.abs(ours[-1] - theirs[-1]).max() <= 1, (start, length)
    assert psnr(np.stack(ours), np.stack(theirs)) >= 50


@pytest.mark.parametrize("size", [1, 8, 12, 20])
def test_every_crop_of_a_side_is_resized_as_torch_does_in_float64(size):
    lines, maps = torch.rand(5, SIDE, dtype=torch.float64), crop_maps(SIDE, size).double() / UNIT
    for number, (start, length) in enumerate(CROPS):
        crop = lines[None, None, :, start : start + length]
        theirs = torch.nn.functional.interpolate(crop, (5, size), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(lines @ maps[number].T, theirs[0, 0], rtol=0, atol=8 / UNIT)


@pytest.mark.parametrize(("side", "size"), [(1, 1), (1, 5), (7, 1), (12, 8), (32, 32), (28, 64), (64, 16)])
def test_maps_take_all_of_a_crop_and_nothing_outside_it(side, size):
    maps = crop_maps(side, size)
    assert maps.shape == (side * (side + 1) // 2, size, side) and maps.dtype == torch.float32
    assert (maps.sum(2) == UNIT).all() and torch.equal(maps, maps.round())
    crops = [(start, start + length) for start in range(side) for length in range(1, side - start + 1)]
    outside = torch.tensor([[not start <= pixel < stop for pixel in range(side)] for start, stop in crops])
    assert not (maps != 0).any(1)[outside].any()


@pytest.mark.parametrize("side", [1, 2, 12, 33])
def test_crops_are_numbered_by_start_and_then_by_length(side):
    crops = np.array([(start, length) for start in range(side) for length in range(1, side - start + 1)])
    assert np.array_equal(crop_number(crops[:, 0], crops[:, 1], side), np.arange(len(crops)))


def test_the_whole_side_to_its_own_size_is_left_as_it_is():
    whole = crop_maps(9, 9)[int(crop_number(np.array([0]), np.array([9]), 9)[0])]
    assert torch.equal(whole, torch.eye(9) * UNIT)


# Whole images.

CASES = {
    "square": (32, 32, 3, (32, 32)),
    "grey": (28, 28, 1, (28, 28)),
    "to a smaller size": (32, 32, 3, (24, 24)),
    "to a larger size": (20, 20, 3, (40, 40)),
    "high": (40, 18, 3, (32, 16)),
    "wide, grey": (18, 40, 1, (16, 48)),
    "digits": (8, 8, 1, (8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_crops_and_flips_are_those_of_one_image_at_a_time(case):
    height, width, channels, size = CASES[case]
    images = photos(60, height, width, channels)
    crop = RandomCrop(size, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    u = uniforms(1, "augment", np.arange(60), crop.num_draws)
    together = crop.of_small(torch.from_numpy(images), u)
    assert together.shape == (60, *size, channels) and together.dtype == torch.uint8
    alone = torch.stack([crop(ImageFile.of_pixels(x), row) for x, row in zip(images, u, strict=True)])
    off = (together.int() - alone.int()).abs()
    assert (off <= 1).float().mean() > 0.998
    assert off.max() <= 2
    assert psnr(together.numpy(), alone.numpy()) >= 50
    boxes = [random_crop_box(height, width, row[2:], crop.scale, crop.ratio) for row in u]
    assert 10 < sum(row[0] < 0.5 for row in u) < 50 and len(set(boxes)) > 20


@pytest.mark.parametrize("case", CASES)
def test_crops_are_those_of_pil(case):
    height, width, channels, size = CASES[case]
    images, worst = photos(20, height, width, channels), math.inf
    rng = np.random.default_rng(0)
    h, w = rng.integers(1, height + 1, 20), rng.integers(1, width + 1, 20)
    boxes = np.stack([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w], 1)
    flipped = np.arange(20) % 2 == 1
    ours = resize_crops(torch.from_numpy(images), boxes, flipped, size).numpy()
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        part = np.ascontiguousarray(images[i, top : top + h, left : left + w])
        picture = Image.fromarray(part[..., 0] if channels == 1 else part)
        theirs = np.array(picture.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, channels)
        theirs = theirs[:, ::-1] if flipped[i] else theirs
        assert np.abs(ours[i].astype(int) - theirs).max() <= 2
        worst = min(worst, psnr(ours[i], theirs))
    assert worst >= 48


def test_the_whole_image_to_its_own_size_is_left_as_it_is_or_mirrored():
    images = torch.from_numpy(photos(6, 16, 24))
    boxes = np.tile(np.array([0, 0, 16, 24]), (6, 1))
    flipped = np.array([False, True] * 3)
    crops = resize_crops(images, boxes, flipped, (16, 24))
    assert torch.equal(crops[::2], images[::2])
    assert torch.equal(crops[1::2], images[1::2].flip(2))


def test_a_crop_does_not_depend_on_the_others_in_its_batch():
    images = torch.from_numpy(photos(32, 32, 32))
    crop = RandomCrop((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    u = uniforms(1, "augment", np.arange(32), crop.num_draws)
    whole = crop.of_small(images, u)
    for size in (1, 3, 16):
        parts = [crop.of_small(images[i : i + size], u[i : i + size]) for i in range(0, 32, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_center_crops_of_many_are_those_of_one():
    images = photos(9, 32, 40)
    for size, share in (((32, 32), 1.0), ((32, 40), 1.0), ((24, 24), 0.875), ((48, 48), 0.9)):
        crop = CenterCrop(size, share)
        together = crop.of_small(torch.from_numpy(images), np.zeros((9, 0)))
        assert torch.equal(together, torch.stack([crop(ImageFile.of_pixels(x), np.zeros(0)) for x in images]))


# Tables that would be too large.


@pytest.mark.parametrize(
    ("sides", "sizes", "fits"),
    [
        ((32, 32), (32, 32), True),
        ((28, 28), (224, 224), True),
        ((64, 64), (64, 64), True),
        ((64, 64), (224, 224), False),
        ((8, 64), (224, 224), False),
        ((64, 8), (224, 224), False),
        ((64, 64), (448, 448), False),
    ],
)
def test_only_small_tables_are_kept(sides, sizes, fits):
    assert fits_tables(sides, sizes) is fits
    largest = max(n * (n + 1) // 2 * n * size * 4 for n, size in zip(sides, sizes, strict=True))
    assert (largest <= TABLE_BYTES) is fits


def test_small_images_to_a_large_size_are_cropped_one_at_a_time_without_a_table(monkeypatch):
    def refused(side: int, size: int) -> torch.Tensor:
        raise AssertionError(f"a table of {side} to {size}")

    monkeypatch.setattr(resample, "crop_maps", refused)
    images = photos(5, 64, 64)
    crop = RandomCrop((224, 224), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    u = uniforms(1, "augment", np.arange(5), crop.num_draws)
    expected = torch.stack([crop(ImageFile.of_pixels(x), row) for x, row in zip(images, u, strict=True)])
    assert torch.equal(crop.of_small(torch.from_numpy(images), u), expected)


def test_a_table_is_as_large_as_it_is_counted():
    assert crop_maps(12, 20).nbytes == 12 * 13 // 2 * 12 * 20 * 4


def test_pixels_depend_on_no_other_image_of_the_batch_and_on_no_thread():
    images = torch.from_numpy(photos(40, 32, 32))
    u = uniforms(2, "augment", np.arange(40), RandomCrop.num_draws)
    crop = RandomCrop((32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    together = crop.of_small(images, u)
    for count in (1, 3, 8):
        parts = [crop.of_small(images[i : i + count], u[i : i + count]) for i in range(0, 40, count)]
        assert torch.equal(torch.cat(parts), together)
    exact = resample.resize_crops  # sums of whole numbers below 2^24: float64 gives the same
    boxes = np.array([random_crop_box(32, 32, row[2:], crop.scale, crop.ratio) for row in u])
    largest = crop_maps(32, 32).abs().sum(2).max() * 255
    assert largest + UNIT < 2**24
    assert torch.equal(exact(images, boxes, u[:, 0] < 0.5, (32, 32)), together)
