"""Crops of many small images resized at once, as two matrix products: a third of the time of one call an image.

Along each axis a resized crop is a fixed linear map of the pixels in it, and an axis of 32 pixels has only 528 crops.
So the maps are computed once and looked up. Their weights are whole numbers, small enough for exact sums in float32: so
the pixels do not depend on how a matrix product adds up, which varies with the batch, the threads and the machine.
"""

import functools

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

UNIT = 1 << 14  # what the weights of an output pixel add up to: 8 bits of a pixel and 14 of a weight leave two of 24
TABLE_BYTES = 1 << 26  # a larger table of maps is not worth its memory: one image at a time, then


def crop_maps(side: int, size: int) -> Float[Tensor, "crops size side"]:
    """Returns the maps from `side` pixels to `size` for every crop of them: antialiased bicubic, a = -0.5, as PIL's.

    Weights are whole multiples of 1 / UNIT, and given as these multiples; each row adds up to UNIT.

    The crop of `length` pixels from `start` on is number crop_number(start, length, side).
    """
    out = np.arange(size)[:, None] + 0.5
    pixel = np.arange(side)
    maps = []
    for start in range(side):  # all at once would take many times the memory of the result
        length = np.arange(1, side - start + 1)[:, None, None]  # [lengths, 1, 1]
        scale = length / size
        stretch = np.maximum(scale, 1.0)  # a kernel as wide as an output pixel, where that is the wider
        center = start + out * scale
        low, high = np.floor(center - 2 * stretch + 0.5), np.floor(center + 2 * stretch + 0.5)
        inside = (pixel >= np.maximum(low, start)) & (pixel < np.minimum(high, start + length))
        weight = _bicubic((pixel + 0.5 - center) / stretch) * inside  # [lengths, size, side]
        maps.append(_whole(weight / weight.sum(axis=2, keepdims=True)))
    return torch.from_numpy(np.concatenate(maps))


def crop_number(start: Int[np.ndarray, " n"], length: Int[np.ndarray, " n"], side: int) -> Int[np.ndarray, " n"]:
    """Returns the place of a crop in `crop_maps`: by start, and then by length."""
    return start * side - start * (start - 1) // 2 + length - 1


def fits_tables(sides: tuple[int, int], sizes: tuple[int, int]) -> bool:
    """Returns whether the maps from `sides` to `sizes` pixels are few enough to be kept, for both axes."""
    return all(n * (n + 1) // 2 * n * size * 4 <= TABLE_BYTES for n, size in zip(sides, sizes, strict=True))


def resize_crops(
    images: UInt8[Tensor, "B H W C"],
    boxes: Int[np.ndarray, "B 4"],
    flipped: Bool[np.ndarray, " B"],
    size: tuple[int, int],
) -> UInt8[Tensor, "B h w C"]:
    """Returns the crops in `boxes` (top, left, height, width) resized to `size`, some of them mirrored."""
    batch, height, width, channels = images.shape
    rows = _kept_maps(height, size[0])[crop_number(boxes[:, 0], boxes[:, 2], height)]  # [B, h, H]
    columns = _kept_maps(width, size[1])[crop_number(boxes[:, 1], boxes[:, 3], width)]  # [B, w, W]
    columns[flipped] = columns[flipped].flip(1)
    pixels = images.transpose(1, 2).reshape(batch, width, -1).float()  # [B, W, H C]
    pixels = _rounded(torch.bmm(columns, pixels)).view(batch, size[1], height, channels)
    pixels = pixels.transpose(1, 2).reshape(batch, height, -1)  # [B, H, w C]
    return _rounded(torch.bmm(rows, pixels)).to(torch.uint8).view(batch, *size, channels)


def _rounded(sums: Float[Tensor, "B n m"]) -> Float[Tensor, "B n m"]:
    """Returns the nearest whole pixel values, after each axis as in PIL; all of it exact."""
    return sums.add_(UNIT // 2).div_(UNIT).floor_().clamp_(0, 255)


def _whole(weights: Float[np.ndarray, "crops size side"]) -> Float[np.ndarray, "crops size side"]:
    """Returns the weights as whole multiples of 1 / UNIT that add up to UNIT; the largest takes the rest."""
    whole = np.rint(weights * UNIT)
    largest = whole.argmax(axis=2, keepdims=True)
    rest = UNIT - whole.sum(axis=2, keepdims=True)
    np.put_along_axis(whole, largest, np.take_along_axis(whole, largest, axis=2) + rest, axis=2)
    return whole.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _kept_maps(side: int, size: int) -> Tensor:
    return crop_maps(side, size)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
