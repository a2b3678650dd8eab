"""The decoders against plain re-implementations in float64: MAE's by un-shuffling, CrossMAE's by torch's attention."""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.decoder import CrossBlock, TailBlock, TransformerDecoder, build_decoder
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import MaskedAutoencoder, attach_decoder
from quarterlight.ssl.masking import Masking, gather_units, random_masking
from quarterlight.ssl.patches import patchify
from quarterlight.ssl.pos_embed import sincos_pos_embed

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
VITS = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "no prefix": ("vit_base_patch16_siglip_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
}
NARROW = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 1),
    "num_heads": (1, 2, 2),
}
SWINS = {  # units of 8 x 8 pixels, 16 of them
    "swin": ("swin_tiny_patch4_window7_224", NARROW),
    "swin v2": ("swinv2_tiny_window8_256", NARROW),
}
CONFIG = DecoderConfig(embed_dim=16, depth=3, num_heads=2)
UNITS, VALUES = 24, 5


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products by two threads take several times as long where the cores are shared with others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder_of(variant: str) -> Encoder:
    name, args = (VITS | SWINS)[variant]
    return build_encoder(name, **args).double()


def shaken(decoder: nn.Module) -> nn.Module:
    """Returns the decoder in float64, every parameter random, so that no path is hidden behind a zero or a one."""
    generator = torch.Generator().manual_seed(1)
    decoder = decoder.double().eval()
    for parameter in decoder.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder


def built(config: DecoderConfig, encoder: Encoder, *, encode_masked: bool = False) -> nn.Module:
    return shaken(build_decoder(config, encoder, num_values=VALUES, encode_masked=encode_masked))


def tokens_for(encoder: Encoder, masking: Masking, *, everything: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    units = masking.is_masked.shape[1] if everything else masking.ids_keep.shape[1]
    shape = (len(masking.ids_keep), encoder.num_prefix_tokens + units, encoder.embed_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masks(count: int = 3, units: int = UNITS, ratio: float = 0.6) -> Masking:
    return random_masking(count, units, ratio, generator=torch.Generator().manual_seed(3))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


# --- MAE's


def maes_way(decoder, tokens: Tensor, masking: Masking, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Returns predictions of all units as facebookresearch/mae computes them (`forward_decoder`)."""
    x = F.linear(tokens, decoder.embed.weight, decoder.embed.bias)
    b, n, d = len(x), masking.ids_restore.shape[1], x.shape[2]
    mask_tokens = decoder.mask_token.expand(b, n + prefix - x.shape[1], d)
    units = torch.cat([x[:, prefix:], mask_tokens], dim=1)
    units = units.gather(1, masking.ids_restore[:, :, None].expand(-1, -1, d))
    x = torch.cat([x[:, :prefix], units], dim=1)
    x = x + sincos_pos_embed(d, grid, num_prefix_tokens=prefix).double()
    for block in decoder.blocks:
        x = block(x)
    x = F.layer_norm(x, (d,), decoder.norm.weight, decoder.norm.bias, 1e-6)
    return F.linear(x, decoder.pred.weight, decoder.pred.bias)[:, prefix:]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("variant", VITS)
def test_the_transformer_decoder_is_maes(variant, depth):
    encoder, masking = encoder_of(variant), masks()
    decoder = built(dataclasses.replace(CONFIG, depth=depth), encoder)
    tokens = tokens_for(encoder, masking)
    assert encoder.num_prefix_tokens == {"class token": 1, "no prefix": 0, "registers": 5}[variant]
    wanted = maes_way(decoder, tokens, masking, encoder.num_prefix_tokens, encoder.grid)
    found = decoder(tokens, masking)
    close(found, wanted)
    close(decoder(tokens, masking, masking.ids_masked), gather_units(wanted, masking.ids_masked))
    assert found.shape == (3, UNITS, VALUES)


def test_its_initial_weights_are_maes():
    decoder = build_decoder(
        DecoderConfig(embed_dim=64, depth=2, num_heads=4), encoder_of("class token"), num_values=48, encode_masked=False
    )
    for linear in (decoder.embed, decoder.pred, decoder.blocks[0].attn.qkv, decoder.blocks[1].mlp.fc2):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    assert decoder.norm.weight.eq(1).all() and decoder.norm.eps == 1e-6 and decoder.blocks[0].norm1.eps == 1e-6
    assert 0.01 < decoder.mask_token.std() < 0.03
    assert "pos_embed" not in decoder.state_dict()


@pytest.mark.parametrize("first", [0, 1, 7, 11])
@pytest.mark.parametrize("mlp_ratio", [4.0, 1.5])
def test_a_block_on_the_tail_is_the_tail_of_the_block(first, mlp_ratio):
    decoder = built(dataclasses.replace(CONFIG, mlp_ratio=mlp_ratio), encoder_of("class token"))
    assert isinstance(decoder, TransformerDecoder)
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    block = decoder.blocks[1]
    plain = Block(16, 2, mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    plain.load_state_dict(block.state_dict(), strict=True)
    found, wanted = block(x, first=first), plain(x)[:, first:]
    close(found, wanted)
    direction = torch.randn_like(wanted)
    ours, theirs = (
        torch.autograd.grad(y, [x, *its.parameters()], direction) for y, its in ((found, block), (wanted, plain))
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@pytest.mark.parametrize("variant", VITS)
def test_of_a_part_of_the_masked_units_it_sees_only_that_part(variant):
    encoder, masking = encoder_of(variant), masks()
    decoder, tokens, prefix = built(CONFIG, encoder), tokens_for(encoder, masking), encoder.num_prefix_tokens
    ids = masking.ids_masked[:, :7]
    pos = sincos_pos_embed(16, encoder.grid, num_prefix_tokens=prefix)[0].double()
    places = torch.cat([torch.arange(prefix).expand(3, -1), masking.ids_keep + prefix, ids + prefix], dim=1)
    hidden = decoder.mask_token.expand(3, 7, 16)
    x = torch.cat([decoder.embed(tokens), hidden], dim=1) + pos[places]
    wanted = decoder.pred(decoder.norm(decoder.blocks(x)))[:, -7:]
    close(decoder(tokens, masking, ids), wanted)
    assert (decoder(tokens, masking)[torch.arange(3)[:, None], ids] - wanted).abs().max() > 1e-3  # others take part


@pytest.mark.parametrize("variant", VITS)
def test_with_masked_units_encoded_the_transformer_decoder_has_no_mask_token(variant):
    encoder, masking = encoder_of(variant), masks()
    decoder = built(CONFIG, encoder, encode_masked=True)
    tokens, prefix = tokens_for(encoder, masking, everything=True), encoder.num_prefix_tokens
    assert decoder.mask_token is None and "mask_token" not in dict(decoder.named_parameters())
    x = decoder.embed(tokens) + sincos_pos_embed(16, encoder.grid, num_prefix_tokens=prefix).double()
    wanted = decoder.pred(decoder.norm(decoder.blocks(x)))[:, prefix:]
    close(decoder(tokens, masking), wanted)
    ids = masking.ids_masked[:, 2:5]
    close(decoder(tokens, masking, ids), wanted[torch.arange(3)[:, None], ids])


# --- CrossMAE's


def crossmaes_way(decoder, tokens: Tensor, masking: Masking, ids: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Returns predictions of the units `ids` by torch's own attention."""
    d = decoder.embed.out_features
    pos = sincos_pos_embed(d, grid, num_prefix_tokens=prefix)[0].double()
    places = torch.cat([torch.arange(prefix).expand(len(ids), -1), masking.ids_keep + prefix], dim=1)
    context = decoder.context_norm(decoder.embed(tokens) + pos[places])
    x = decoder.mask_token + pos[ids + prefix]
    for block in decoder.blocks:
        attention = nn.MultiheadAttention(d, block.num_heads, batch_first=True).double()
        attention.in_proj_weight.data = torch.cat([block.q.weight.data, block.kv.weight.data])
        attention.in_proj_bias.data = torch.cat([block.q.bias.data, block.kv.bias.data])
        attention.out_proj.load_state_dict(block.proj.state_dict())
        x = x + attention(block.norm1(x), context, context)[0]
        hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return decoder.pred(decoder.norm(x))


@pytest.mark.parametrize("variant", VITS)
def test_the_cross_decoder_is_torchs_attention_from_hidden_to_visible(variant):
    encoder, masking = encoder_of(variant), masks()
    decoder = built(dataclasses.replace(CONFIG, name="cross", num_heads=4, mlp_ratio=2.0), encoder)
    tokens = tokens_for(encoder, masking)
    some = masking.ids_masked[:, 3:9]
    wanted = crossmaes_way(decoder, tokens, masking, some, encoder.num_prefix_tokens, encoder.grid)
    close(decoder(tokens, masking, some), wanted)
    everything = torch.arange(UNITS).expand(3, -1)
    wanted = crossmaes_way(decoder, tokens, masking, everything, encoder.num_prefix_tokens, encoder.grid)
    close(decoder(tokens, masking), wanted)


def test_a_hidden_units_prediction_does_not_depend_on_which_others_are_predicted():
    encoder, masking = encoder_of("class token"), masks()
    decoder, tokens = built(dataclasses.replace(CONFIG, name="cross"), encoder), tokens_for(encoder, masking)
    ids = masking.ids_masked
    together = decoder(tokens, masking, ids)
    for chosen in ([4], [0, 1, 2], [9, 4, 7, 0]):
        close(decoder(tokens, masking, ids[:, chosen]), together[:, chosen], 1e-12)
    full = decoder(tokens, masking)
    close(gather_units(full, ids), together, 1e-12)


@pytest.mark.parametrize("name", ["transformer", "cross"])
def test_every_visible_token_and_prefix_token_matters(name):
    encoder, masking = encoder_of("registers"), masks()
    decoder = built(dataclasses.replace(CONFIG, name=name), encoder)
    tokens = tokens_for(encoder, masking).requires_grad_()
    prediction = decoder(tokens, masking, masking.ids_masked)
    (gradient,) = torch.autograd.grad(prediction[:, 2].square().sum(), tokens)
    assert (gradient.norm(dim=2) > 1e-6).all()
    other = decoder(tokens + 0.1, masking, masking.ids_masked)
    assert ((other - prediction).abs().amax(dim=2) > 1e-6).all()


@pytest.mark.parametrize("name", ["transformer", "cross"])
def test_images_of_a_batch_do_not_see_each_other(name):
    encoder, masking = encoder_of("class token"), masks()
    decoder = built(dataclasses.replace(CONFIG, name=name), encoder)
    tokens = tokens_for(encoder, masking)
    together = decoder(tokens, masking, masking.ids_masked)
    for b in range(3):
        alone = Masking(*(x[b : b + 1] for x in masking[:3]))
        close(decoder(tokens[b : b + 1], alone, alone.ids_masked), together[b : b + 1])


# --- SimMIM's


@pytest.mark.parametrize("variant", [*VITS, "swin"])
def test_the_linear_decoder_is_one_linear_layer(variant):
    encoder = encoder_of(variant)
    masking = masks(units=encoder.num_units)
    decoder = built(dataclasses.replace(CONFIG, name="linear"), encoder, encode_masked=True)
    tokens = tokens_for(encoder, masking, everything=True)
    wanted = F.linear(tokens[:, encoder.num_prefix_tokens :], decoder.pred.weight, decoder.pred.bias)
    close(decoder(tokens, masking), wanted)
    close(decoder(tokens, masking, masking.ids_masked), gather_units(wanted, masking.ids_masked))
    assert {name for name, _ in decoder.named_parameters()} == {"pred.weight", "pred.bias"}


# --- all stages of a Swin


@pytest.mark.parametrize("name", ["transformer", "cross"])
def test_multi_scale_is_a_sum_of_linear_layers_over_the_tokens_of_all_stages(name):
    encoder = encoder_of("swin").eval()
    masking = masks(units=encoder.num_units, ratio=0.5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    stages = encoder.stages(images, masking)
    assert [x.shape[1:] for x in stages] == [(8 * 16, 8), (8 * 4, 16), (8, 32)]
    config = dataclasses.replace(CONFIG, name=name, multi_scale=True)
    decoder = built(config, encoder)
    embed = decoder.embed
    wanted = torch.zeros(3, 8, 16, dtype=torch.float64)
    for b, k in itertools.product(range(3), range(8)):
        for number, per_unit in enumerate((16, 4, 1)):
            tokens = stages[number][b, k * per_unit : (k + 1) * per_unit]
            if number < 2:
                norm = embed.norms[number]
                tokens = F.layer_norm(tokens, tokens.shape[1:], norm.weight, norm.bias, 1e-6)
            linear = embed.linears[number]
            wanted[b, k] += linear.weight @ tokens.flatten() + linear.bias
    close(embed(stages), wanted)
    with torch.no_grad():  # and after the embedding it is the decoder of a single scale
        plain = built(dataclasses.replace(config, multi_scale=False), encoder)
        plain.load_state_dict(decoder.state_dict(), strict=False)
        plain.embed = nn.Identity()
        close(decoder(stages, masking, masking.ids_masked), plain(wanted, masking, masking.ids_masked))
        close(decoder(stages, masking), plain(wanted, masking))


def test_the_tokens_of_a_unit_stand_together_in_the_order_in_which_they_merge():
    encoder = encoder_of("swin").eval()
    masking = masks(units=encoder.num_units, ratio=0.5)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    # One pixel of one visible unit is disturbed where no window reaches another unit: only that unit's tokens change.
    unit = int(masking.ids_keep[0, 2])
    disturbed = images.clone()
    disturbed[0, :, unit // 4 * 8, unit % 4 * 8] += 10
    before, after = encoder.stages(images, masking)[0], encoder.stages(disturbed, masking)[0]
    changed = (before != after).any(dim=2).nonzero()
    assert len(changed) and (changed[:, 0] == 0).all() and (changed[:, 1] // 16 == 2).all()


# --- what makes no sense


@pytest.mark.parametrize(
    ("variant", "change", "encode_masked", "said"),
    [
        ("class token", {"name": "linear"}, False, "decoder.name linear .* set encode_masked true"),
        ("class token", {"name": "cross"}, True, "decoder.name cross cannot be had with encode_masked"),
        ("class token", {"multi_scale": True}, False, "multi_scale needs an encoder with several stages"),
        ("class token", {"multi_scale": True, "name": "cross"}, False, "multi_scale needs an encoder with several"),
        ("swin", {"multi_scale": True}, True, "multi_scale is for visible units: .* encode_masked"),
        ("swin", {"multi_scale": True, "name": "linear"}, True, "multi_scale is for visible units"),
        ("swin", {"multi_scale": True, "name": "cross"}, True, "multi_scale is for visible units"),
        ("class token", {"num_heads": 3}, False, "decoder.embed_dim 16 is not a multiple of decoder.num_heads 3"),
        ("swin", {"num_heads": 5, "name": "cross"}, False, "embed_dim 16 is not a multiple of decoder.num_heads 5"),
        ("class token", {"embed_dim": 18}, False, "embed_dim 18 is not a multiple of 4"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(variant, change, encode_masked, said):
    with pytest.raises(InputError, match=said):
        build_decoder(
            dataclasses.replace(CONFIG, **change), encoder_of(variant), num_values=VALUES, encode_masked=encode_masked
        )


# --- in the autoencoder

COMBINATIONS = [
    *(("class token", name, False, False) for name in ("transformer", "cross")),
    *(("class token", name, False, True) for name in ("transformer", "linear")),
    *((swin, name, scales, False) for swin in SWINS for name in ("transformer", "cross") for scales in (False, True)),
    *((swin, name, False, True) for swin in SWINS for name in ("transformer", "linear")),
]


def attached(variant: str, config: DecoderConfig = CONFIG, *, target: str = "norm_pix", **more) -> MaskedAutoencoder:
    return attach_decoder(
        encoder_of(variant).float(), in_chans=3, decoder=config, target=target, pca_components=10, **more
    ).double()


@pytest.mark.parametrize("target", ["norm_pix", "pixels", "pca", "hog"])
@pytest.mark.parametrize(("variant", "name", "multi_scale", "encode_masked"), COMBINATIONS)
def test_every_trained_parameter_gets_a_gradient(variant, name, multi_scale, encode_masked, target):
    config = dataclasses.replace(CONFIG, name=name, multi_scale=multi_scale, depth=2)
    model = attached(variant, config, target=target, encode_masked=encode_masked, pred_share=0.5).train()
    images = torch.randn(4, 3, *model.encoder.img_size, dtype=torch.float64)
    if target == "pca":
        model.target.fit([images])
    result = model(images, masks(4, model.encoder.num_units, 0.5), only_scored=True)
    result.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in trained.values())
    assert not [name for name, p in model.decoder.named_parameters() if p.dim() > 1 and not p.grad.any()]
    tokens = [p for name, p in trained.items() if name.endswith("mask_token")]
    assert len(tokens) == 1 and tokens[0].grad.any()  # the encoder's or the decoder's, never both
    assert result.prediction.shape == (4, model.encoder.num_units // 4, model.target.num_values)


@pytest.mark.parametrize(("variant", "name", "multi_scale", "encode_masked"), COMBINATIONS)
def test_what_a_step_computes_is_what_a_picture_shows_of_it(variant, name, multi_scale, encode_masked):
    config = dataclasses.replace(CONFIG, name=name, multi_scale=multi_scale)
    model = attached(variant, config, encode_masked=encode_masked)
    images = torch.randn(4, 3, *model.encoder.img_size, dtype=torch.float64)
    masking = masks(4, model.encoder.num_units, 0.5)
    step, picture = model(images, masking, only_scored=True), model(images, masking)
    close(step.prediction, gather_units(picture.prediction, masking.ids_masked))
    close(step.loss, picture.loss)


@pytest.mark.parametrize("only_scored", [True, False])
@pytest.mark.parametrize(("variant", "name", "multi_scale", "encode_masked"), COMBINATIONS)
def test_blocks_that_may_be_sharded_are_called_as_modules_once_a_step(
    variant, name, multi_scale, encode_masked, only_scored
):
    config = dataclasses.replace(CONFIG, name=name, multi_scale=multi_scale)
    model = attached(variant, config, encode_masked=encode_masked, pred_share=0.5)
    classes, calls = model.sharded_blocks, []
    assert (Block in classes, TailBlock in classes, CrossBlock in classes) == (
        variant not in SWINS, name == "transformer", name == "cross"
    )  # fmt: skip
    blocks = [module for module in model.modules() if type(module) in classes]
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    images = torch.randn(4, 3, *model.encoder.img_size, dtype=torch.float64)
    model(images, masks(4, model.encoder.num_units, 0.5), only_scored=only_scored)
    assert calls == blocks
    assert len(blocks) == (1 if variant not in SWINS else 0) + (3 if name != "linear" else 0)


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize(("share", "count"), [(1.0, 15), (0.5, 8), (0.3, 4), (0.01, 1)])
@pytest.mark.parametrize("name", ["transformer", "cross"])
def test_a_step_scores_the_first_part_of_the_masked_units(name, share, count, loss):
    model = attached(
        "class token", dataclasses.replace(CONFIG, name=name), target="pixels", loss=loss, pred_share=share
    )
    images = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    masking = masks(4)
    assert masking.ids_masked.shape == (4, 15)
    result = model(images, masking, only_scored=True)
    ids = masking.ids_masked[:, :count]
    assert result.prediction.shape == (4, count, 192)
    tokens = model.encoder(images, masking)
    close(result.prediction, model.decoder(tokens, masking, ids))
    pixels = patchify(images, 8)[torch.arange(4)[:, None], ids]
    wanted = (F.mse_loss if loss == "mse" else F.l1_loss)(result.prediction, pixels)
    close(result.loss, wanted, 1e-12)
    whole = model(images, masking)  # a picture's loss is over all masked units
    assert whole.prediction.shape == (4, 24, 192)
    everything = gather_units(whole.prediction, masking.ids_masked)
    wanted = patchify(images, 8)[torch.arange(4)[:, None], masking.ids_masked]
    close(whole.loss, (F.mse_loss if loss == "mse" else F.l1_loss)(everything, wanted), 1e-12)
