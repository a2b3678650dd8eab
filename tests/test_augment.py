import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import posterize
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from quarterlight.ssl.augment import (
    CROP_TRIES,
    CenterCrop,
    Normalize,
    RandomCrop,
    random_crop,
    random_crop_box,
    resize,
)
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.decode import Box, ImageFile
from quarterlight.ssl.randoms import uniforms

BOX_DRAWS = 2 * CROP_TRIES + 2


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth random pixels with some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    smooth = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    return pixels[:, :, :channels].copy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def draws(count: int, number: int, seed: int = 0) -> np.ndarray:
    return uniforms(seed, "augment", np.arange(count), number)


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((300, 400), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((64, 64), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((500, 90), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((40, 300), (0.5, 0.9), (1 / 2, 2.0)),
    ],
)
def test_boxes_are_distributed_as_those_of_torchvision(shape, scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(1, *shape)
    count = 1500
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    ours = [random_crop_box(*shape, u, scale, ratio) for u in draws(count, BOX_DRAWS)]
    columns = {
        "top": lambda b: b[0],
        "left": lambda b: b[1],
        "height": lambda b: b[2],
        "width": lambda b: b[3],
        "area": lambda b: b[2] * b[3],
        "aspect": lambda b: b[3] / b[2],
        "bottom margin": lambda b: shape[0] - b[0] - b[2],
        "right margin": lambda b: shape[1] - b[1] - b[3],
    }
    for name, column in columns.items():
        pvalue = stats.ks_2samp([column(b) for b in ours], [column(b) for b in theirs]).pvalue
        assert pvalue > 1e-3, name


def test_top_and_left_of_a_box_are_independent():
    boxes = np.array([random_crop_box(100, 100, u, (0.25, 0.25), (1.0, 1.0)) for u in draws(4000, BOX_DRAWS)])
    assert set(boxes[:, 0]) == set(boxes[:, 1]) == set(range(51))
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.06


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 2), (17, 19), (1000, 30), (30, 1000)])
def test_boxes_lie_inside_the_image(shape):
    for u in [*draws(300, BOX_DRAWS), np.zeros(BOX_DRAWS), np.full(BOX_DRAWS, 1 - 2.0**-53)]:
        top, left, height, width = random_crop_box(*shape, u, (0.08, 1.0), (3 / 4, 4 / 3))
        assert height >= 1 and width >= 1
        assert top >= 0 and left >= 0 and top + height <= shape[0] and left + width <= shape[1]


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (20, 20)])
def test_when_no_box_fits_the_largest_central_one_is_taken(shape):
    impossible = (4.0, 4.0)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(1, *shape), list(impossible), [3 / 4, 4 / 3])
    assert random_crop_box(*shape, draws(1, BOX_DRAWS)[0], impossible, (3 / 4, 4 / 3)) == theirs


def test_boxes_and_flips_are_those_that_earlier_runs_have_seen():
    boxes = [random_crop_box(375, 500, u[2:], (0.2, 1.0), (3 / 4, 4 / 3)) for u in draws(4, RandomCrop.num_draws, 42)]
    assert boxes == [(29, 41, 210, 255), (40, 14, 252, 253), (28, 147, 284, 263), (18, 93, 353, 407)]
    assert (draws(8, RandomCrop.num_draws, 42)[:, 0] < 0.5).tolist() == [
        True,
        False,
        False,
        False,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("shape", "box", "size"),
    [
        ((120, 160), (10, 20, 100, 130), (32, 32)),
        ((120, 160), (0, 0, 120, 160), (224, 224)),
        ((37, 53), (3, 4, 30, 31), (24, 40)),
        ((37, 53), (3, 4, 3, 40), (16, 16)),
        ((9, 9), (8, 8, 1, 1), (8, 8)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_equals_pil_within_rounding(shape, box, size, channels):
    pixels = photo(*shape, channels=channels)
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    part = Image.fromarray(part if channels == 3 else part.squeeze(2))
    expected = np.array(part.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, channels)
    ours = resize(ImageFile.of_pixels(pixels).crop(Box(*box), size), size)
    assert ours.dtype == torch.uint8 and ours.shape == expected.shape
    assert psnr(ours, expected) >= 40


def test_a_box_of_the_wanted_size_is_cut_out_unchanged():
    pixels = photo(20, 30)
    assert np.array_equal(resize(ImageFile.of_pixels(pixels).crop(Box(3, 5, 8, 9), (8, 9)), (8, 9)), pixels[3:11, 5:14])


@pytest.mark.parametrize("shape", [(100, 140), (140, 100), (96, 96), (45, 61), (20, 16), (300, 50)])
@pytest.mark.parametrize(("size", "crop_pct"), [(64, 0.875), (48, 1.0), (33, 0.9), (56, 0.95)])
def test_the_center_crop_equals_resize_and_center_crop_of_torchvision_on_pil(shape, size, crop_pct):
    pixels = photo(*shape, seed=1)
    reference = transforms.Compose(
        [
            transforms.Resize(math.floor(size / crop_pct), InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    ours = CenterCrop((size, size), crop_pct)(ImageFile.of_pixels(pixels), np.empty(0))
    expected = np.array(reference(Image.fromarray(pixels)))
    assert ours.shape == expected.shape
    assert psnr(ours, expected) >= 40


@pytest.mark.parametrize("shape", [(100, 140), (140, 100), (31, 300), (300, 31), (8, 8)])
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 50)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_a_center_crop_of_any_shape_has_its_size_and_keeps_the_center(shape, size, crop_pct):
    y, x = np.mgrid[: shape[0], : shape[1]]
    ramp = np.stack([255 * (y + 0.5) / shape[0], 255 * (x + 0.5) / shape[1], 0 * x], -1).astype(np.uint8)
    cut = CenterCrop(size, crop_pct)(ImageFile.of_pixels(ramp), np.empty(0)).float()
    assert cut.shape == (*size, 3)
    assert (cut[:, :, :2].mean((0, 1)) - 127.5).abs().max() < 255 * 0.75 / min(*shape, *size) + 1


def crop(**changes) -> RandomCrop:
    return RandomCrop(**{"size": (16, 24), "scale": (0.2, 1.0), "ratio": (0.75, 4 / 3), "hflip": 0.5} | changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_random_crop_has_its_size_and_depends_on_its_draws_alone(channels):
    pixels = photo(40, 50, channels=channels)
    before = pixels.copy()
    for u in draws(10, RandomCrop.num_draws):
        first = crop()(ImageFile.of_pixels(pixels), u).clone()
        assert first.shape == (16, 24, channels) and first.dtype == torch.uint8
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        assert torch.equal(crop()(ImageFile.of_pixels(pixels), u), first)
    assert np.array_equal(pixels, before)


def test_a_flip_mirrors_the_image_and_nothing_else():
    pixels = photo(40, 50)
    for u in draws(5, RandomCrop.num_draws):
        assert torch.equal(
            crop(hflip=1.0)(ImageFile.of_pixels(pixels), u), crop(hflip=0.0)(ImageFile.of_pixels(pixels), u).flip(1)
        )


def test_flips_are_as_frequent_as_asked_for_and_independent_of_the_box():
    pixels = np.zeros((8, 9, 3), np.uint8)
    pixels[:, 5:] = 255
    whole = crop(size=(8, 9), scale=(1.0, 1.0), ratio=(9 / 8, 9 / 8), hflip=0.3)
    u = draws(3000, RandomCrop.num_draws)
    flipped = np.array([bool(whole(ImageFile.of_pixels(pixels), row)[0, 0, 0]) for row in u])
    assert abs(flipped.mean() - 0.3) < 0.03
    tops = [random_crop_box(100, 100, row[2:], (0.2, 1.0), (0.75, 4 / 3))[0] for row in u]
    assert abs(np.corrcoef(flipped, tops)[0, 1]) < 0.06


def test_the_config_decides_the_crop():
    data = DataConfig(train="x", crop_scale=(0.3, 0.4), crop_ratio=(1.0, 1.0), hflip=0.0)
    assert random_crop(data, (16, 24)) == crop(scale=(0.3, 0.4), ratio=(1.0, 1.0), hflip=0.0)


POLICY = "rand-m9-mstd0.5-inc1"


def test_a_policy_depends_on_its_draws_alone_and_survives_pickling():
    pixels = photo(40, 50)
    augment = crop(auto_augment=POLICY)
    u = draws(12, RandomCrop.num_draws)
    first = [augment(ImageFile.of_pixels(pixels), row) for row in u]
    copy = pickle.loads(pickle.dumps(augment))
    assert all(torch.equal(copy(ImageFile.of_pixels(pixels), u[i]), first[i]) for i in reversed(range(12)))
    plain = [crop()(ImageFile.of_pixels(pixels), row) for row in u]
    assert sum(not torch.equal(a, b) for a, b in zip(first, plain, strict=True)) >= 8


def test_a_policy_leaves_the_global_generators_as_they_were():
    random.seed(5), np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    crop(auto_augment=POLICY)(ImageFile.of_pixels(photo(40, 50)), draws(1, RandomCrop.num_draws)[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_policy_works_on_grey_images():
    pixels = photo(40, 50, channels=1)
    for u in draws(30, RandomCrop.num_draws):
        assert crop(auto_augment=POLICY)(ImageFile.of_pixels(pixels), u).shape == (16, 24, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_equals_that_of_torchvision(channels):
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    images = torch.from_numpy(np.stack([photo(12, 10, seed, channels) for seed in range(3)]))
    expected = torch.stack([F.normalize(F.to_tensor(image.numpy()), mean, std) for image in images])
    ours = Normalize(mean, std)(images)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected)


def test_normalization_adds_nothing_to_a_state_dict():
    assert not Normalize((0.5,), (0.5,)).state_dict()


def test_posterizing_down_to_nothing_is_possible():
    """RandAugment at rand-m9-mstd0.5-inc1 now and then keeps 0 bits, which Pillow 13 refuses."""
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    assert not np.asarray(posterize(image, 0)).any()
