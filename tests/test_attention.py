"""Attention against a softmax written out, and the bias of relative positions against timm's and plain indexing."""

import itertools

import pytest
import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor

from quarterlight.ssl.attention import attend, bias_by_products, prefers_matmul, relative_bias


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) v in float64, from exponentials."""
    scores = torch.einsum("...le,...se->...ls", q.double(), k.double()) * scale
    if bias is not None:
        scores = scores + bias.double()
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return torch.einsum("...ls,...se->...le", weights / weights.sum(dim=-1, keepdim=True), v.double())


def queries_keys_values(*, length: int = 12, keys: int = 9, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (length, keys, keys)
    return [torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in shapes]


def some_bias(kind: str, *, length: int = 12, keys: int = 9) -> Tensor | None:
    """Returns no bias, one of finite numbers, or one that forbids about half of the keys, never all of them."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 3, length, keys, generator=generator, dtype=torch.float64)
    if kind == "forbidding":
        forbidden = torch.rand(bias.shape, generator=generator) < 0.5
        forbidden[..., 0] = False
        bias = bias.masked_fill(forbidden, float("-inf"))
    return bias


BIASES = ("none", "finite", "forbidding")


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_attention_is_a_softmax_over_the_allowed_keys(dtype, tolerance, kind, scale):
    q, k, v = queries_keys_values(dtype=dtype)
    bias = some_bias(kind)
    result = attend(q, k, v, None if bias is None else bias.to(dtype), scale=scale)
    wanted = softmax_attention(q, k, v, bias, 8**-0.5 if scale is None else scale)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.bfloat16, 5e-2)])
def test_gradients_of_both_kernels_are_those_of_the_softmax(dtype, tolerance, kind):
    tensors = [x.requires_grad_() for x in queries_keys_values(dtype=dtype)]
    bias = some_bias(kind)
    weights = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    result = attend(*tensors, None if bias is None else bias.to(dtype), scale=0.3)
    gradients = torch.autograd.grad((result.double() * weights).sum(), tensors)
    wanted = torch.autograd.grad((softmax_attention(*tensors, bias, 0.3) * weights).sum(), tensors)
    for gradient, wanted_gradient in zip(gradients, wanted, strict=True):
        assert gradient.isfinite().all()
        error = (gradient.double() - wanted_gradient.double()).norm() / wanted_gradient.double().norm()
        assert error < tolerance


def test_a_bias_in_float32_serves_tokens_in_bf16():
    q, k, v = queries_keys_values(dtype=torch.bfloat16)
    bias = some_bias("forbidding")
    assert bias is not None
    result = attend(q, k, v, bias.float(), scale=1.0)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), softmax_attention(q, k, v, bias, 1.0), atol=5e-2, rtol=0)


def test_forbidden_keys_and_their_values_take_no_part():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = queries_keys_values(dtype=dtype)
        bias = torch.zeros(2, 3, 12, 9, dtype=dtype)
        bias[..., 4:] = float("-inf")
        first = attend(q, k, v, bias)
        for x in (k, v):
            x[:, :, 4:] = 1e4
        assert torch.equal(attend(q, k, v, bias), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_attention_weights_and_scales_up_the_others(dtype):
    torch.manual_seed(0)
    q, k = (torch.zeros(1, 1, 2000, 4, dtype=dtype) for _ in range(2))
    v = torch.ones(1, 1, 2000, 4, dtype=dtype)
    result = attend(q, k, v, dropout=0.25).float()
    assert result.mean().item() == pytest.approx(1, abs=0.02) and 0.003 < result[..., 0].std() < 0.03
    assert attend(q, k, v, dropout=0.0).float().std() < 1e-2


def test_matmul_is_preferred_in_bf16_on_a_cpu_only():
    devices, dtypes = ("cpu", "cuda", "mps"), (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    preferring = [pair for pair in itertools.product(devices, dtypes) if prefers_matmul(*pair)]
    assert preferring == [("cpu", torch.bfloat16)]


def window_attention(window: tuple[int, int], heads: int, dtype: torch.dtype = torch.float64) -> WindowAttention:
    """Returns timm's attention with a random table."""
    attention = WindowAttention(4 * heads, num_heads=heads, window_size=window).to(dtype)
    generator = torch.Generator().manual_seed(3)
    table = attention.relative_position_bias_table
    table.data = torch.randn(table.shape, generator=generator, dtype=torch.float64).to(dtype)
    return attention


def arranged(attention: WindowAttention, *, groups: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns `pairs` and `places` of groups in which places of three windows stand in any order; the last slot free.

    Some pairs are thus not of one window, and the empty slot is a window of its own.
    """
    generator = torch.Generator().manual_seed(4)
    area = attention.window_area
    places = torch.stack([torch.randperm(3 * area, generator=generator)[:length] for _ in range(groups)])
    windows, places = places // area, places % area
    windows[:, -1], places[:, -1] = -1, 0
    pairs = attention.relative_position_index[places[:, :, None], places[:, None, :]]
    same = windows[:, :, None] == windows[:, None, :]
    return torch.where(same, pairs, len(attention.relative_position_bias_table)), places


WINDOWS = [((7, 7), 3), ((4, 8), 2), ((5, 2), 1)]


@pytest.mark.parametrize(("window", "heads"), WINDOWS)
def test_the_bias_of_a_whole_window_is_timms(window, heads):
    attention = window_attention(window, heads)
    index, table = attention.relative_position_index, attention.relative_position_bias_table
    places = torch.arange(attention.window_area).repeat(2, 1)
    wanted = attention._get_rel_pos_bias().expand(2, -1, -1, -1)
    for bias in (relative_bias, bias_by_products):
        assert torch.equal(bias(table, index.repeat(2, 1, 1), places, index), wanted)


@pytest.mark.parametrize(("window", "heads"), WINDOWS)
@pytest.mark.parametrize("bias", [relative_bias, bias_by_products])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_bias_and_gradient_are_those_of_plain_indexing(window, heads, bias, dtype, tolerance):
    attention = window_attention(window, heads, dtype)
    table = attention.relative_position_bias_table
    pairs, places = arranged(attention, groups=4, length=17)
    forbidden = pairs == len(table)
    assert forbidden.any() and not forbidden.all()
    result = bias(table, pairs, places, attention.relative_position_index)
    padded = torch.cat([table, torch.full((1, heads), float("-inf"), dtype=dtype)])
    wanted = padded[pairs].permute(0, 3, 1, 2)  # [G, H, L, L]
    assert result.shape == (4, heads, 17, 17) and torch.equal(result, wanted)
    weights = torch.randn(result.shape, dtype=dtype)
    weights[forbidden[:, None].expand_as(weights)] = 0.0  # as a softmax gives where nothing is let through
    kept = ~forbidden[:, None].expand_as(weights)
    (gradient,) = torch.autograd.grad((result[kept] * weights[kept]).sum(), table)
    (wanted_gradient,) = torch.autograd.grad((wanted[kept] * weights[kept]).sum(), table)
    torch.testing.assert_close(gradient, wanted_gradient, atol=tolerance, rtol=tolerance)
    assert gradient.dtype == dtype and gradient.any()


def test_a_bias_in_bf16_has_a_gradient_summed_in_the_tables_precision():
    attention = window_attention((2, 2), 3, torch.float32)
    table = attention.relative_position_bias_table
    pairs, places = arranged(attention, groups=400, length=9)
    result = relative_bias(table, pairs, places, attention.relative_position_index, torch.bfloat16)
    allowed = (pairs < len(table))[:, None].expand_as(result)
    padded = torch.cat([table, torch.full((1, 3), float("-inf"))])
    assert torch.equal(result, padded[pairs].permute(0, 3, 1, 2).to(torch.bfloat16))
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    (gradient,) = torch.autograd.grad(result, table, torch.where(allowed, weights, 0))
    wanted = torch.zeros(table.shape, dtype=torch.float64)
    for head in range(3):
        at = allowed[:, head]
        wanted[:, head].index_add_(0, pairs[at], weights[:, head][at].double())
    assert gradient.dtype == torch.float32 and wanted.max() > 300  # more than bf16 could count one by one
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [relative_bias, bias_by_products])
def test_the_gradient_through_a_softmax_is_finite_and_that_of_plain_indexing(bias):
    attention = window_attention((4, 4), 2)
    table = attention.relative_position_bias_table
    pairs, places = arranged(attention, groups=3, length=13)
    scores = torch.randn(3, 2, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights = torch.randn(3, 2, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    padded = torch.cat([table, torch.full((1, 2), float("-inf"), dtype=torch.float64)])
    found = []
    for x in (bias(table, pairs, places, attention.relative_position_index), padded[pairs].permute(0, 3, 1, 2)):
        found.append(torch.autograd.grad(((scores + x).softmax(dim=-1) * weights).sum(), table)[0])
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], atol=1e-13, rtol=0)


def test_bias_by_products_stays_exact_under_bf16_autocast():
    attention = window_attention((7, 7), 3, torch.float32)
    table = attention.relative_position_bias_table
    pairs, places = arranged(attention, groups=2, length=20)
    wanted = bias_by_products(table, pairs, places, attention.relative_position_index)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bias_by_products(table, pairs, places, attention.relative_position_index), wanted)
