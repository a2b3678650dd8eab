"""What happens to an image's pixels between decoding and the batch, as small picklable classes.

Randomness comes in as uniform numbers, one row an image, so that a crop depends on nothing but the sample's position.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn

from .config import DataConfig
from .errors import InputError

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
CROP_TRIES = 10


def resize_crop(pixels: UInt8[np.ndarray, "H W C"], box: Box, size: tuple[int, int]) -> UInt8[Tensor, "h w C"]:
    """Returns the part of the image in `box`, resized to `size` (height, width) by antialiased bicubic interpolation.

    Stays in uint8: four times as fast as PIL's and within rounding of it (torch's kernel on the same filter).
    """
    top, left, height, width = box
    part = torch.from_numpy(pixels)[top : top + height, left : left + width]
    if (height, width) == size:
        return part
    planes = part.permute(2, 0, 1)[None]  # [1, C, H, W], channels last in memory
    resized = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0)  # [h, w, C]


def random_crop_box(
    height: int, width: int, u: Float[np.ndarray, " draws"], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Returns the box of torchvision's RandomResizedCrop: area in `scale`, log-uniform width/height in `ratio`.

    `u` holds 2 * CROP_TRIES + 2 uniforms. After CROP_TRIES boxes that do not fit, the largest central one that does.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for i in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[2 * i])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[2 * i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-1] * (height - h + 1)), int(u[-2] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop, then a flip, then (in `auto_augment`'s syntax of timm) a random augmentation policy."""

    size: tuple[int, int]  # height, width in pixels
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    auto_augment: str | None = None

    num_draws = 2 * CROP_TRIES + 4

    def __call__(self, pixels: UInt8[np.ndarray, "H W C"], u: Float[np.ndarray, " draws"]) -> UInt8[Tensor, "h w C"]:
        """Returns the augmented image; `u` holds `num_draws` uniforms."""
        height, width, _ = pixels.shape
        box = random_crop_box(height, width, u[2:], self.scale, self.ratio)
        image = resize_crop(pixels, box, self.size)
        if u[0] < self.hflip:
            image = image.flip(1)
        if self._policy is None:
            return image
        pixels = image.squeeze(2).numpy() if image.shape[2] == 1 else image.numpy()
        with _seeded(int(u[1] * 2**32)):
            augmented = self._policy(Image.fromarray(pixels).convert("RGB"))  # a policy fills with a color
        if image.shape[2] == 1:
            augmented = augmented.convert("L")
        return torch.from_numpy(np.array(augmented)).view(image.shape)

    @cached_property
    def _policy(self) -> Callable[[Image.Image], Image.Image] | None:
        if self.auto_augment is None:
            return None
        from timm.data import auto_augment

        hparams = {  # as timm.data.create_transform(interpolation="bicubic") and so MAE's fine-tuning have them
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in IMAGENET_DEFAULT_MEAN),
            "interpolation": Image.Resampling.BICUBIC,
        }
        if self.auto_augment.startswith("rand"):
            return auto_augment.rand_augment_transform(self.auto_augment, hparams)
        if self.auto_augment.startswith("augmix"):
            return auto_augment.augment_and_mix_transform(self.auto_augment, hparams)
        return auto_augment.auto_augment_transform(self.auto_augment, hparams)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the two global generators that timm's policies draw from, and leaves them as they were."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def random_crop(data: DataConfig, size: tuple[int, int]) -> RandomCrop:
    """Returns the training augmentation that `data` asks for, to `size` (height, width) in pixels.

    Raises InputError for a policy that timm does not know.
    """
    crop = RandomCrop(size, data.crop_scale, data.crop_ratio, data.hflip, data.auto_augment)
    try:
        _ = crop._policy
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"data.auto_augment {data.auto_augment}: timm has no such policy ({error!r}); rand-m9-mstd0.5-inc1 is one"
        ) from error
    return crop


@dataclass(frozen=True)
class CenterCrop:
    """The evaluation crop: resize so that the image covers size / crop_pct, then cut out the center."""

    size: tuple[int, int]  # height, width in pixels
    crop_pct: float

    num_draws = 0

    def __call__(self, pixels: UInt8[np.ndarray, "H W C"], u: Float[np.ndarray, " draws"]) -> UInt8[Tensor, "h w C"]:
        """Returns the same as torchvision's Resize(floor(size / crop_pct)) and CenterCrop(size), for a square size."""
        del u
        height, width, _ = pixels.shape
        th, tw = self.size
        target = math.floor(th / self.crop_pct), math.floor(tw / self.crop_pct)
        if target[0] * width >= target[1] * height:  # the height decides
            covering = target[0], max(tw, target[0] * width // height)
        else:
            covering = max(th, target[1] * height // width), target[1]
        image = resize_crop(pixels, (0, 0, height, width), covering)
        top, left = round((covering[0] - th) / 2), round((covering[1] - tw) / 2)
        return image[top : top + th, left : left + tw]


class Normalize(nn.Module):
    """uint8 pixels to normalized floats, on the device: a quarter of the bytes travel there."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B C H W"]:
        """Returns (images / 255 - mean) / std, channels first, contiguous."""
        return ((images / 255 - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()
