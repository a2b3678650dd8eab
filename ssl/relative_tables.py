"""Swin's tables of relative positions, fitted to other windows.

A table has a row for each offset between two tokens of a window, (2h - 1) x (2w - 1) of them. Two rules are in use:
`geometric` (BEiT's, and SimMIM's for its Swins) keeps what stands for near offsets nearly where it was and spreads the
far ones; `bicubic` (Swin's `utils.load_pretrained`, for supervised weights) stretches the table as a picture.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Rule = Literal["geometric", "bicubic"]
Q_RANGE = (1.01, 1.5)  # in which BEiT looks for the ratio of the progression
DEGREE = 3


def resize_table(
    table: Float[Tensor, "old heads"], old: tuple[int, int], new: tuple[int, int], rule: Rule
) -> Float[Tensor, "new heads"]:
    """Returns the table of windows `old` (tokens high, wide) fitted to windows `new`, in its own dtype.

    Computed in float64 on the CPU. `geometric` agrees with SimMIM's `utils.remap_pretrained_keys_swin`, whose scipy
    function is gone; timm's `resize_rel_pos_bias_table` interpolates linearly instead where that is missing.
    """
    heads = table.shape[1]
    square = table.detach().cpu().double().T.reshape(heads, 2 * old[0] - 1, 2 * old[1] - 1)
    if rule == "bicubic":
        sides = (2 * new[0] - 1, 2 * new[1] - 1)
        resized = F.interpolate(square[None], size=sides, mode="bicubic", align_corners=False)[0]
    else:
        down, across = (torch.from_numpy(_geometric_matrix(o, n)) for o, n in zip(old, new, strict=True))
        resized = down @ square @ across.T
    return resized.reshape(heads, -1).T.to(table).contiguous()


def _geometric_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that interpolates values at the offsets of an old window to those of a new one."""
    if old == new or old == 1:  # a window of one token has one offset, whose value all get
        return np.eye(2 * old - 1) if old == new else np.ones((2 * new - 1, 1))
    places = geometric_places(old, new)
    # Beyond the last place its value goes on, as in the reference.
    wanted = np.arange(-(new - 1.0), new).clip(places[0], places[-1])
    if len(places) <= DEGREE:  # too few for cubic pieces: a window of 2
        return np.stack([np.interp(wanted, places, unit) for unit in np.eye(len(places))], axis=1)
    return _splines(places, wanted) @ np.linalg.inv(_splines(places, places))


def geometric_places(old: int, new: int) -> Float[np.ndarray, " old"]:
    """Returns where the offsets of a window of `old` tokens come to lie among those of a window of `new`.

    Distances from 0 grow by 1, q, q^2, ... with q such that the last one reaches that of the new window. Differs from
    BEiT: a q above 1.5 is found too, so that much larger windows are filled to their ends.
    """
    left, right = Q_RANGE
    while old > 2 and _progression(right, old - 1)[-1] < new - 1:
        right *= 2
    q = left
    while right - left > 1e-6:
        q = (left + right) / 2
        left, right = (left, q) if _progression(q, old - 1)[-1] > new - 1 else (q, right)
    far = _progression(q, old - 1)
    return np.concatenate([-far[::-1], [0.0], far])


def _progression(q: float, count: int) -> Float[np.ndarray, " n"]:
    """Returns 1, 1 + q, 1 + q + q^2, ..."""
    return np.cumsum(q ** np.arange(count))


def _splines(places: Float[np.ndarray, " n"], at: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m n"]:
    """Returns the cubic B-splines (de Boor) whose sums interpolate values at `places`, as scipy's splines do.

    No place but the first and the last two at each end is without a knot ("not-a-knot").
    """
    ends = [places[:1].repeat(DEGREE + 1), places[2:-2], places[-1:].repeat(DEGREE + 1)]
    knots = np.concatenate(ends)
    last = len(places) - 1  # the interval that ends at the last place holds it too
    interval = np.minimum(np.searchsorted(knots, at, side="right") - 1, last)
    basis = (interval[:, None] == np.arange(len(knots) - 1)).astype(np.float64)
    for degree in range(1, DEGREE + 1):
        width = knots[degree:] - knots[:-degree]
        inverse = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
        rising = (at[:, None] - knots[:-degree]) * inverse
        basis = rising[:, :-1] * basis[:, :-1] + (1 - rising[:, 1:]) * basis[:, 1:]
    return basis
