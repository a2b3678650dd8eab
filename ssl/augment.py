"""What happens to an image's pixels between decoding and the batch, as small picklable classes.

Randomness comes in as uniform numbers, one row an image, so that a crop depends on nothing but the sample's position.
A crop is a call with one image, and has `of_small` for many images of one small size.
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
from .decode import Box, ImageFile
from .errors import InputError
from .resample import fits_tables, resize_crops

CROP_TRIES = 10


def resize(pixels: UInt8[np.ndarray, "H W C"], size: tuple[int, int]) -> UInt8[Tensor, "h w C"]:
    """Returns the image resized to `size` (height, width) by antialiased bicubic interpolation.

    Stays in uint8: four times as fast as PIL's and within rounding of it (torch's kernel on the same filter).
    """
    if pixels.shape[:2] == size:
        return torch.from_numpy(pixels)
    dense = torch.from_numpy(np.ascontiguousarray(pixels))  # of a part of an image torch makes planes, slow to copy
    planes = dense[None].permute(0, 3, 1, 2)  # [1, C, H, W], channels last in memory
    return _interpolate(planes, size)[0].permute(1, 2, 0)  # [h, w, C]


def _interpolate(planes: UInt8[Tensor, "B C H W"], size: tuple[int, int]) -> UInt8[Tensor, "B C h w"]:
    return torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False)


def random_crop_box(
    height: int,
    width: int,
    u: Float[np.ndarray, " draws"],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    clip: bool = False,
) -> Box:
    """Returns the box of torchvision's RandomResizedCrop: area in `scale`, log-uniform width/height in `ratio`.

    `u` holds 2 * CROP_TRIES + 2 uniforms. After CROP_TRIES boxes that do not fit, the largest central one that does.
    With `clip` the first box is cut to the image where it does not fit, as in MAE's linear probe (`util/crop.py`): so
    it is for a quarter of the boxes of areas from 0.08 to 1 in an image of 500 x 375 pixels.
    """
    v = u.tolist()  # arithmetic with numpy's scalars takes five times as long
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for i in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * v[2 * i])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * v[2 * i + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if clip:
            w, h = max(1, min(w, width)), max(1, min(h, height))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(v[-1] * (height - h + 1)), int(v[-2] * (width - w + 1)), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop, then a flip, then (in `auto_augment`'s syntax of timm) a random augmentation policy."""

    size: tuple[int, int]  # height, width in pixels
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    auto_augment: str | None = None
    clip: bool = False  # see `random_crop_box`

    num_draws = 2 * CROP_TRIES + 4

    def __call__(self, image: ImageFile, u: Float[np.ndarray, " draws"]) -> UInt8[Tensor, "h w C"]:
        """Returns the augmented image; `u` holds `num_draws` uniforms. Raises UnreadableImage."""
        box = random_crop_box(image.height, image.width, u[2:], self.scale, self.ratio, self.clip)
        crop = resize(image.crop(box, self.size), self.size)
        return self._with_policy(crop.flip(1) if u[0] < self.hflip else crop, u)

    def of_small(self, images: UInt8[Tensor, "B H W C"], u: Float[np.ndarray, "B draws"]) -> UInt8[Tensor, "B h w C"]:
        """Returns the same of many images at once; they differ by rounding, which is not done twice."""
        _, height, width, _ = images.shape
        if not fits_tables((height, width), self.size):
            return torch.stack([self(ImageFile.of_pixels(x), row) for x, row in zip(images.numpy(), u, strict=True)])
        boxes = [random_crop_box(height, width, row[2:], self.scale, self.ratio, self.clip) for row in u]
        flipped = np.array([row[0] < self.hflip for row in u])
        crops = resize_crops(images, np.array(boxes), flipped, self.size)
        if self._policy is None:
            return crops
        return torch.stack([self._with_policy(crop, row) for crop, row in zip(crops, u, strict=True)])

    def _with_policy(self, image: UInt8[Tensor, "h w C"], u: Float[np.ndarray, " draws"]) -> UInt8[Tensor, "h w C"]:
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

    def __call__(self, image: ImageFile, u: Float[np.ndarray, " draws"]) -> UInt8[Tensor, "h w C"]:
        """Returns the same as torchvision's Resize(floor(size / crop_pct)) and CenterCrop(size), for a square size.

        Raises UnreadableImage.
        """
        del u
        return self._center(resize(image.pixels(), self._covering(image.height, image.width)))

    def of_small(self, images: UInt8[Tensor, "B H W C"], u: Float[np.ndarray, "B draws"]) -> UInt8[Tensor, "B h w C"]:
        """Returns the same of many images at once."""
        del u
        covering = self._covering(*images.shape[1:3])
        if covering != tuple(images.shape[1:3]):
            images = _interpolate(images.permute(0, 3, 1, 2), covering).permute(0, 2, 3, 1)
        return self._center(images)

    def _covering(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width to which an image is resized."""
        th, tw = self.size
        target = math.floor(th / self.crop_pct), math.floor(tw / self.crop_pct)
        if target[0] * width >= target[1] * height:  # the height decides
            return target[0], max(tw, target[0] * width // height)
        return max(th, target[1] * height // width), target[1]

    def _center(self, images: UInt8[Tensor, "*B H W C"]) -> UInt8[Tensor, "*B h w C"]:
        th, tw = self.size
        top, left = round((images.shape[-3] - th) / 2), round((images.shape[-2] - tw) / 2)
        return images[..., top : top + th, left : left + tw, :]


class Normalize(nn.Module):
    """uint8 pixels to normalized floats, on the device: a quarter of the bytes travel there."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B C H W"]:
        """Returns (images / 255 - mean) / std, channels first, contiguous.

        Channels first while a pixel is a byte, then one product and one difference: a fifth of the time on a CPU.
        """
        scale, shift = 1 / (255 * self.std), self.mean / self.std
        planes = images.permute(0, 3, 1, 2).contiguous().float()
        return planes.mul_(scale[:, None, None]).sub_(shift[:, None, None])
