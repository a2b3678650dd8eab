"""Fixed 2-D sine-cosine positions, as facebookresearch/mae makes them."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InputError


def sincos_pos_embed(embed_dim: int, grid: tuple[int, int], *, num_prefix_tokens: int = 0) -> Float[Tensor, "1 PN D"]:
    """Returns the table for `grid` (units high, units wide) in row-major order, in float32.

    The first half of the channels encodes the column, the second half the row; in each half the sines come before the
    cosines, with wave numbers 10000^(-k / (embed_dim / 4)) (computed in float64). Prefix tokens come first, as zeros.
    Released MAE weights were trained with this order, although the code there names the halves the other way round.

    Raises InputError when `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise InputError(f"sine-cosine positions need a width that is a multiple of 4, not {embed_dim}")
    omega = 1.0 / 10000 ** (np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4.0))
    row, column = np.indices(grid).reshape(2, -1, 1)  # [N, 1] each
    angles = (column * omega, row * omega)
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    table = np.concatenate([np.zeros((num_prefix_tokens, embed_dim)), table])
    return torch.from_numpy(table).float()[None]
