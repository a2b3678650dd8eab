"""timm's ViTs as encoders: equal to timm with nothing masked, equal to dropping tokens by hand otherwise."""

import pytest
import timm
import torch

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
VARIANTS = {
    "class token": ("vit_base_patch16_224", {"img_size": 64, **SMALL}),
    "non-square": ("vit_base_patch16_224", {"img_size": (32, 80), **SMALL}),
    "small patches": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4, **SMALL}),
    "patch 14, no norm in front": ("vit_huge_patch14_224", {"img_size": 56, **SMALL}),
    "patch 32": ("vit_base_patch32_224", {"img_size": 96, **SMALL}),
    "four channels": ("vit_base_patch16_224", {"img_size": 64, "in_chans": 4, **SMALL}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, **SMALL}),
    "registers, average": ("vit_medium_patch16_reg4_gap_256", {"img_size": 64, **SMALL}),
    "no class token": ("vit_base_patch16_siglip_224", {"img_size": 64, **SMALL}),
    "norm in front": ("vit_base_patch16_clip_224", {"img_size": 64, **SMALL}),
    "positions without class token": ("deit3_small_patch16_224", {"img_size": 64, **SMALL}),
    "no positions": ("vit_base_patch16_224", {"img_size": 64, "pos_embed": "none", **SMALL}),
    "rotary": ("vit_small_patch16_rope_224", {"img_size": 64, **SMALL}),
    "rotary, learned for each block": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": (32, 80), **SMALL}),
    "rotary, register": ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64, **SMALL}),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56, **SMALL}),
    "dynamic size": ("vit_base_patch16_224", {"img_size": 64, "dynamic_img_size": True, **SMALL}),
}


def shaken(name: str, args: dict):
    """Returns an encoder whose every parameter is random, so that no path is hidden behind a zero."""
    encoder = build_encoder(name, **args).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    images = torch.randn(2, args.get("in_chans", 3), *encoder.timm.patch_embed.img_size, dtype=torch.float64)
    return encoder, images


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_nothing_masked_it_is_timms_forward_features(variant):
    encoder, images = shaken(*VARIANTS[variant])
    assert isinstance(encoder, Encoder)
    tokens = encoder(images)
    torch.testing.assert_close(tokens, encoder.timm.forward_features(images), atol=1e-12, rtol=0)
    assert tokens.shape[1] == encoder.num_prefix_tokens + encoder.num_units
    everything = encoder(images, encoder.sample_masking(2, 0.0))
    order = encoder.sample_masking(2, 0.0).ids_keep
    for b in range(2):
        prefix = encoder.num_prefix_tokens
        torch.testing.assert_close(everything[b, prefix:], tokens[b, prefix:][order[b]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_it_is_timm_with_the_hidden_tokens_forbidden_as_keys(variant):
    encoder, images = shaken(*VARIANTS[variant])
    masking = encoder.sample_masking(2, 0.5)
    tokens = encoder(images, masking)
    vit, prefix = encoder.timm, encoder.num_prefix_tokens
    seen = torch.cat([torch.ones(2, prefix, dtype=torch.bool), ~masking.is_masked], dim=1)
    dense = vit.forward_features(images, attn_mask=seen[:, None, None, :])
    for b in range(2):
        torch.testing.assert_close(tokens[b, :prefix], dense[b, :prefix], atol=1e-10, rtol=0)
        torch.testing.assert_close(tokens[b, prefix:], dense[b, prefix:][masking.ids_keep[b]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_timms_and_every_trainable_parameter_gets_a_gradient(variant):
    name, args = VARIANTS[variant]
    encoder = build_encoder(name, **args)
    timm.create_model(name, num_classes=0, **args).load_state_dict(encoder.timm.state_dict(), strict=True)
    images = torch.randn(2, args.get("in_chans", 3), *encoder.timm.patch_embed.img_size)
    encoder(images, encoder.sample_masking(2)).square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_initial_weights_are_maes():
    encoder = build_encoder("vit_base_patch16_224", img_size=64, **SMALL)
    encoder.init_weights()
    vit = encoder.timm
    bound = (6 / (48 + 3 * 16 * 16)) ** 0.5  # Xavier uniform of the patch embedding as a linear layer
    assert 0.95 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    for linear in (vit.blocks[0].attn.qkv, vit.blocks[1].mlp.fc1):
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    assert vit.norm.weight.eq(1).all() and not vit.norm.bias.any()
    assert vit.cls_token.std() < 0.04 and not vit.pos_embed[0, 0].any() and vit.pos_embed[0, 1:].abs().max() > 0.9


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("resnet50", {}, "ResNet is not supported; use one of timm's vit_"),
        ("swinv2_cr_tiny_224", {}, "SwinTransformerV2Cr is not supported"),
        ("vit_relpos_small_patch16_224", {}, "not supported"),
        ("vit_base_patch16_224", {"img_size": 225}, "image height 225 .* use 224 or 240"),
        ("vit_base_patch16_224", {"patch_size": (16, 8)}, "16 x 8 pixels"),
        ("vit_base_patch16_224", {"embed_dim": 100}, "timm cannot build vit_base_patch16_224 with"),
        ("vit_base_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate drops patches .* set mask.ratio"),
        ("vit_small_patch16_rope_224", {"patch_drop_rate": 0.5}, "patch_drop_rate drops patches .* set mask.ratio"),
        ("vit_base_patch16_225", {}, "Did you mean vit_base_patch16_224"),
    ],
)
def test_models_that_cannot_drop_patches_are_refused(name, args, said):
    with pytest.raises(InputError, match=said):
        build_encoder(name, **args)


def test_attention_kernel_follows_device_and_precision():
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    choose_attention(encoder, torch.device("cpu"), "no")
    assert encoder.timm.blocks[0].attn.fused_attn
    fused = encoder(images)
    choose_attention(encoder, torch.device("cpu"), "bf16")
    assert not encoder.timm.blocks[0].attn.fused_attn
    torch.testing.assert_close(encoder(images), fused, atol=1e-5, rtol=0)
