"""Which units of a grid stay visible: uniformly random, in blocks, or on a regular grid, always exactly as many."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from .randoms import uniforms

Strategy = Literal["random", "block", "grid"]

BLOCK_TRIES = 64  # blocks placed for one image; what then is still to be hidden, is hidden unit by unit
ASPECT = math.log(1 / 0.3)  # a block is at most 1 / 0.3 times as wide as high, or as high as wide
# The order in which an 8 x 8 cell fills up most evenly (Bayer's ordered dither); its first quarter is one in 2 x 2.
_DITHER = np.zeros((1, 1))
for _ in range(3):
    _DITHER = np.block([[4 * _DITHER, 4 * _DITHER + 2], [4 * _DITHER + 3, 4 * _DITHER + 1]])


def visible_units(
    strategy: Strategy, grid: tuple[int, int], kept: int, *, seed: int, purpose: str, positions: Int[np.ndarray, " B"]
) -> Bool[np.ndarray, "B N"]:
    """Returns, for the sample at each position, which `kept` units of `grid` (units high, wide) are visible.

    The same for the same (seed, purpose, position). `random` is uniform without replacement; `block` hides rectangles
    as BEiT does (Bao et al. 2022, algorithm 1: at least 16 of 196 patches each), which is MAE's block-wise sampling,
    the last one cut to the exact number; `grid` keeps a regular pattern at a random offset: at a ratio of 0.75 one of
    every 2 x 2 units, as MAE's grid-wise sampling (on odd grids as nearly as the exact number allows), and at others
    Bayer's ordered dither.
    """
    if strategy == "block":
        return np.stack([_blocks(grid, kept, draws) for draws in _block_draws(seed, purpose, positions, grid)])
    num_units = grid[0] * grid[1]
    score = uniforms(seed, purpose, positions, num_units)
    if strategy == "grid":
        score = score + _dither(grid, uniforms(seed, f"{purpose} offset", positions, 2))
    return score.argsort(axis=1, kind="stable").argsort(axis=1) < kept


def _dither(grid: tuple[int, int], offsets: Float[np.ndarray, "B 2"]) -> Float[np.ndarray, "B N"]:
    """Returns the rank of every unit in the pattern, 0 to 63, shifted for each image."""
    shift = (offsets * 8).astype(np.int64)  # [B, 2]
    rows = (np.arange(grid[0]) + shift[:, :1]) % 8  # [B, units high]
    columns = (np.arange(grid[1]) + shift[:, 1:]) % 8  # [B, units wide]
    return _DITHER[rows[:, :, None], columns[:, None, :]].reshape(len(offsets), -1)


def _block_draws(
    seed: int, purpose: str, positions: Int[np.ndarray, " B"], grid: tuple[int, int]
) -> Float[np.ndarray, "B draws"]:
    return uniforms(seed, f"{purpose} blocks", positions, 4 * BLOCK_TRIES + grid[0] * grid[1])


def _blocks(grid: tuple[int, int], kept: int, draws: Float[np.ndarray, " draws"]) -> Bool[np.ndarray, " N"]:
    """Returns the visible units of one image."""
    height, width = grid
    visible = np.ones(grid, bool)
    smallest = max(1, round(height * width * 16 / 196))
    for area, aspect, top, left in draws[: 4 * BLOCK_TRIES].reshape(-1, 4):
        to_hide = int(visible.sum()) - kept
        if to_hide == 0:
            return visible.ravel()
        units = smallest + area * max(0, to_hide - smallest)
        ratio = math.exp((2 * aspect - 1) * ASPECT)
        h = min(height, max(1, round(math.sqrt(units * ratio))))
        w = min(width, max(1, round(math.sqrt(units / ratio))))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        rows, columns = np.nonzero(visible[y : y + h, x : x + w])
        visible[y + rows[:to_hide], x + columns[:to_hide]] = False
    score = np.where(visible.ravel(), 0.0, 2.0) + draws[4 * BLOCK_TRIES :]
    return score.argsort(kind="stable").argsort() < kept
