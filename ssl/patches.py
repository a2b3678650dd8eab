"""Images to patches and back, and what a masked autoencoder predicts of them.

Letters used everywhere: B images on this rank · H W pixels · C channels · P patch side · N units in the grid · K kept ·
M = N - K masked · D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InputError


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N P2C"]:
    """Returns the patches in row-major grid order, each as (row, column, channel): MAE's order, channel fastest.

    Raises InputError when the image is not a whole number of patches.
    """
    b, c, h, w = images.shape
    p = patch_size
    check_grid((h, w), p)
    x = images.reshape(b, c, h // p, p, w // p, p)  # [B, C, h, P, w, P]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    patches: Float[Tensor, "B N P2C"], patch_size: int, grid: tuple[int, int], in_chans: int = 3
) -> Float[Tensor, "B C H W"]:
    """Returns the images whose `patchify` gives `patches`; `grid` is (patches high, patches wide)."""
    p, (h, w) = patch_size, grid
    x = patches.reshape(len(patches), h, w, p, p, in_chans)  # [B, h, w, P, P, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), in_chans, h * p, w * p)


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Returns (height, width) of a size given as a side or as a pair."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_grid(img_size: tuple[int, int], patch_size: int) -> None:
    """Raises InputError, with the sizes that would do, when `img_size` (H, W) is not a multiple of `patch_size`."""
    for side, name in zip(img_size, ("height", "width"), strict=True):
        if side < patch_size or side % patch_size:
            lower, upper = side // patch_size * patch_size, -(-side // patch_size) * patch_size
            sizes = f"{lower} or {upper}" if lower else f"{upper}"
            raise InputError(f"image {name} {side} is not a multiple of the patch size {patch_size}: use {sizes}")


def patch_statistics(
    patches: Float[Tensor, "B N P2C"],
) -> tuple[Float[Tensor, "B N 1"], Float[Tensor, "B N 1"]]:
    """Returns mean and standard deviation of each patch: unbiased variance, 1e-6 added under the root (MAE's)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, unbiased=True)
    return mean, (var + 1e-6).sqrt()


def pixel_target(images: Float[Tensor, "B C H W"], patch_size: int, *, norm_pix: bool) -> Float[Tensor, "B N P2C"]:
    """Returns what is to be predicted for every patch: its pixels, normalized within the patch when `norm_pix`."""
    patches = patchify(images, patch_size)
    if not norm_pix:
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std
