"""What is read of timm's attention, against its own formulas and against slow plain versions in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quarterlight.finetune.pictures.attention import (
    attention_weights,
    block_names,
    blocks_of,
    mean_attention_distance,
    mean_distance,
    on_image,
    rollout,
)
from quarterlight.finetune.pictures.weight_pictures import bias_tables
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import build_encoder

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
SWIN = {"img_size": (32, 64), "patch_size": 1, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}
SWIN_V2 = SWIN | {"window_size": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", VIT),
    "no class token": ("vit_tiny_patch16_224", VIT | {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2}),
    "rotary": ("vit_small_patch16_rope_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", SWIN_V2),
}


def built(kind: str) -> Encoder:
    torch.manual_seed(0)
    name, args = KINDS[kind]
    encoder = build_encoder(name, **args).double().eval()
    for parameter in encoder.parameters():  # timm's initial weights attend to all nearly alike
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return encoder


def images_for(encoder: Encoder, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *encoder.img_size, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_explain_what_timms_own_attention_puts_out(kind):
    """The fused kernel's output is the weights times the values, through timm's projection; and nothing is changed."""
    encoder = built(kind)
    images, seen = images_for(encoder), []
    handles = [
        block.attn.register_forward_hook(lambda module, given, out: seen.append((module, given[0], out)))
        for block in blocks_of(encoder)
    ]
    with torch.no_grad():
        before = encoder(images)
    for handle in handles:
        handle.remove()
    settings = [getattr(block.attn, "fused_attn", None) for block in blocks_of(encoder)]
    weights = attention_weights(encoder, images)
    assert len(weights) == len(seen) == len(block_names(encoder))
    for found, (attn, given, out) in zip(weights, seen, strict=True):
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
        weight = attn.qkv.weight if attn.qkv is not None else None
        dim = given.shape[2]
        bias = attn.v_bias if hasattr(attn, "v_bias") and attn.v_bias is not None else attn.qkv.bias[2 * dim :]
        values = (given @ weight[2 * dim :].T + bias).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        mine = attn.proj((found @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mine, out, atol=1e-12, rtol=1e-9)
    assert [getattr(block.attn, "fused_attn", None) for block in blocks_of(encoder)] == settings
    with torch.no_grad():
        assert torch.equal(encoder(images), before)


def test_weights_are_the_softmax_of_queries_and_keys():
    encoder = built("class token")
    images, inputs = images_for(encoder), []
    handles = [b.attn.register_forward_hook(lambda m, given, out: inputs.append(given[0])) for b in blocks_of(encoder)]
    weights = attention_weights(encoder, images)
    for handle in handles:
        handle.remove()
    for found, x, block in zip(weights, inputs, blocks_of(encoder), strict=True):
        q, k, _ = block.attn.qkv(x).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(found, (q @ k.transpose(2, 3) / 12**0.5).softmax(dim=-1), atol=1e-12, rtol=0)


def test_distance_of_a_hand_built_attention_is_that_computed_by_hand():
    """Four patches of 16 pixels in a square: 16 pixels to the sides, 16 times the root of 2 across."""
    places = torch.tensor([[0.0, 0.0], [0.0, 16.0], [16.0, 0.0], [16.0, 16.0]])
    itself, alike = torch.eye(4), torch.full((4, 4), 0.25)
    across, one_looks_right = torch.eye(4).flip(0), torch.eye(4)
    one_looks_right[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    weights = torch.stack([itself, alike, across, one_looks_right, 0.5 * alike])[
        None
    ]  # the last: half to a class token
    expected = [0.0, (16 + 16 + 16 * 2**0.5) / 4, 16 * 2**0.5, 4.0, (16 + 16 + 16 * 2**0.5) / 4]
    assert mean_distance(weights, places).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_of_blocks_that_attend_to_all_alike(kind):
    """Without weights and biases all scores are 0: distances are means over pairs, in pixels of the image."""
    encoder = built(kind)
    for block in blocks_of(encoder):
        for name, parameter in block.attn.named_parameters():
            if not name.startswith(("norm", "proj", "logit")):
                parameter.data.zero_()
    found = mean_attention_distance(encoder, images_for(encoder))
    if not kind.startswith("swin"):
        assert torch.stack(found).flatten().tolist() == pytest.approx([mean_over_pairs(4, 4, 4)] * 6)
        return
    window = 4 if kind == "swin" else 8
    of_plain_blocks = [found[0].tolist(), found[2].tolist()]  # the others are shifted, and masked at the edges
    assert of_plain_blocks[0] == pytest.approx([mean_over_pairs(window, window, 1)])
    assert of_plain_blocks[1] == pytest.approx([mean_over_pairs(window, window, 2)] * 2)
    assert found[1].max() < found[0].min()


def mean_over_pairs(high: int, wide: int, side: int) -> float:
    places = [(y * side, x * side) for y in range(high) for x in range(wide)]
    return float(np.mean([np.hypot(a - c, b - d) for a, b in places for c, d in places]))


@pytest.mark.parametrize("kind", ["class token", "no class token", "registers", "rotary"])
def test_rollout_is_the_product_of_mixed_attention(kind):
    encoder = built(kind)
    images = images_for(encoder)
    tokens = encoder.num_prefix_tokens + 16
    product = torch.eye(tokens).double().expand(2, -1, -1)
    for weights in attention_weights(encoder, images):
        product = (0.5 * weights.mean(dim=1) + 0.5 * torch.eye(tokens)) @ product
    whole = rollout(encoder, images, torch.eye(tokens).expand(2, -1, -1))
    torch.testing.assert_close(whole, product, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.sum(dim=2), torch.ones(2, tokens).double())
    first = (
        product[:, :1] if encoder.timm.cls_token is not None else product[:, encoder.num_prefix_tokens :].mean(1, True)
    )
    torch.testing.assert_close(rollout(encoder, images), first, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["swin", "swin v2"])
def test_rollout_through_windows_is_that_of_whole_matrices(kind):
    encoder = built(kind)
    images = images_for(encoder, 1)
    layers = attention_weights(encoder, images)
    product = None
    for block, weights in zip(blocks_of(encoder), layers, strict=True):
        high, wide = block.input_resolution
        matrix = 0.5 * torch.eye(high * wide).double() + 0.5 * whole_matrix(block, weights.mean(dim=1))
        if product is None:
            product = matrix
        elif len(matrix) != len(product):  # merged: an equal part of each of four
            y, x = np.indices((high, wide)).reshape(2, -1)
            merge = torch.zeros(high * wide, len(product)).double()
            for dy in (0, 1):
                for dx in (0, 1):
                    merge[range(high * wide), (2 * y + dy) * 2 * wide + 2 * x + dx] = 0.25
            product = matrix @ merge @ product
        else:
            product = matrix @ product
    assert product is not None
    start = torch.eye(encoder.num_units)[None]
    whole = rollout(encoder, images, start)
    torch.testing.assert_close(whole[0], product, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.sum(dim=2), torch.ones(1, encoder.num_units).double())
    torch.testing.assert_close(rollout(encoder, images)[0], product.mean(dim=0, keepdim=True), atol=1e-12, rtol=0)


def whole_matrix(block: Any, weights: Tensor) -> Tensor:
    """Attention of all tokens of one image to all, pair by pair."""
    (high, wide), (wh, ww), (sy, sx) = block.input_resolution, block.window_size, block.shift_size
    matrix = torch.zeros(high * wide, high * wide).double()
    for number, of_window in enumerate(weights):
        top, left = number // (wide // ww) * wh, number % (wide // ww) * ww
        tokens = [(top + i + sy) % high * wide + (left + j + sx) % wide for i in range(wh) for j in range(ww)]
        matrix[np.ix_(tokens, tokens)] = of_window
    return matrix


@pytest.mark.parametrize("kind", ["class token", "swin"])
def test_a_rollout_lies_on_the_image_as_its_patches_do(kind):
    encoder = built(kind)
    patches = 16 if kind == "class token" else 32 * 64
    rows = torch.zeros(1, 1, encoder.num_prefix_tokens + patches)
    rows[:, :, -1] = 1.0  # lower right
    shown = on_image(encoder, rows)[0, 0]
    assert shown.shape == encoder.img_size
    assert shown[-1, -1] == shown.max() == 1 and shown[0, 0] == 0 and shown[-1, 0] == 0


@pytest.mark.parametrize("kind", ["swin", "swin v2"])
def test_a_bias_table_shows_where_keys_stand(kind):
    """The bias that timm adds for a query and a key is found at the key's offset from the middle of the map."""
    encoder = built(kind)
    block = blocks_of(encoder)[2]
    attn, window = block.attn, block.window_size[0]
    if kind == "swin":
        added = attn._get_rel_pos_bias()[0]  # [heads, A, A]
    else:
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        index = attn.relative_position_index.view(-1)
        added = 16 * torch.sigmoid(table[index].view(window**2, window**2, -1).permute(2, 0, 1))
    maps = bias_tables(encoder)[2]
    for query in ((0, 0), (1, 3), (2, 1)):
        for key in ((0, 1), (3, 0), (2, 2)):
            shown = maps[:, window - 1 + key[0] - query[0], window - 1 + key[1] - query[1]]
            wanted = added[:, query[0] * window + query[1], key[0] * window + key[1]]
            torch.testing.assert_close(shown, wanted.detach().float())
