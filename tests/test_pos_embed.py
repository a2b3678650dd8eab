import numpy as np
import pytest
import torch

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.pos_embed import sincos_pos_embed


@pytest.mark.parametrize(("dim", "grid"), [(16, (3, 5)), (768, (14, 14))])
def test_entries_follow_the_formula(dim, grid):
    table = sincos_pos_embed(dim, grid)[0].double().numpy()
    quarter = dim // 4
    for row, column in [(0, 0), (0, grid[1] - 1), (grid[0] - 1, 2)]:
        rate = [10000 ** (-k / quarter) for k in range(quarter)]
        wanted = [f(p * r) for p in (column, row) for f in (np.sin, np.cos) for r in rate]
        assert table[row * grid[1] + column] == pytest.approx(wanted, abs=1e-6)


def test_prefix_tokens_get_zeros():
    table = sincos_pos_embed(8, (2, 2), num_prefix_tokens=5)
    assert table.shape == (1, 9, 8) and table.dtype == torch.float32
    assert not table[0, :5].any() and torch.equal(table[:, 5:], sincos_pos_embed(8, (2, 2)))


def test_a_width_that_is_no_multiple_of_four_is_refused():
    with pytest.raises(InputError, match="multiple of 4, not 10"):
        sincos_pos_embed(10, (2, 2))
