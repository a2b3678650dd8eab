"""The masked autoencoder against Hugging Face's ViTMAEForPreTraining, with the same weights and the same noise."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.masking import num_keep, random_masking
from quarterlight.ssl.patches import patchify

BASE = {"img_size": 224, "patch_size": 16, "in_chans": 3, "embed_dim": 768, "depth": 12, "num_heads": 12}
ODD = {"img_size": 42, "patch_size": 6, "in_chans": 4, "embed_dim": 36, "depth": 3, "num_heads": 3}


def pair(shape: dict, decoder: DecoderConfig, *, norm_pix: bool) -> tuple[MaskedAutoencoder, ViTMAEForPreTraining]:
    """Returns our model and Hugging Face's with the same random weights; positions too: theirs start as zeros."""
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=shape["img_size"], patch_size=shape["patch_size"], num_channels=shape["in_chans"],
            hidden_size=shape["embed_dim"], num_hidden_layers=shape["depth"], num_attention_heads=shape["num_heads"],
            intermediate_size=4 * shape["embed_dim"], decoder_hidden_size=decoder.embed_dim,
            decoder_num_hidden_layers=decoder.depth, decoder_num_attention_heads=decoder.num_heads,
            decoder_intermediate_size=4 * decoder.embed_dim, norm_pix_loss=norm_pix, layer_norm_eps=1e-6,
            mask_ratio=0.75, attn_implementation="sdpa",
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    for name, parameter in theirs.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    ours = build_autoencoder(
        "vit_base_patch16_224", decoder=decoder, target="norm_pix" if norm_pix else "pixels", **shape
    )
    ours.load_state_dict(translated(theirs), strict=True)
    ours.decoder.pos_embed.copy_(theirs.decoder.decoder_pos_embed.data)
    return ours, theirs


def translated(theirs: ViTMAEForPreTraining, grads: bool = False) -> dict[str, torch.Tensor]:
    """Returns their parameters (or gradients) under our names."""
    params = dict(theirs.named_parameters())
    given = {k: (p.grad if grads else p.data) for k, p in params.items() if not grads or p.grad is not None}
    found: dict[str, torch.Tensor] = {}
    plain = {
        "vit.embeddings.cls_token": "encoder.timm.cls_token",
        "vit.embeddings.position_embeddings": "encoder.timm.pos_embed",
        "vit.embeddings.patch_embeddings.projection": "encoder.timm.patch_embed.proj",
        "vit.layernorm": "encoder.timm.norm",
        "decoder.decoder_embed": "decoder.embed",
        "decoder.mask_token": "decoder.mask_token",
        "decoder.decoder_norm": "decoder.norm",
        "decoder.decoder_pred": "decoder.pred",
    }
    for source, target in plain.items():
        for suffix in ("", ".weight", ".bias"):
            if source + suffix in given:
                found[target + suffix] = given[source + suffix]
    for stem, ours in (("vit.layers", "encoder.timm.blocks"), ("decoder.decoder_layers", "decoder.blocks")):
        i = 0
        while f"{stem}.{i}.layernorm_before.weight" in params:
            for kind in ("weight", "bias"):
                block, theirs_block = f"{ours}.{i}", f"{stem}.{i}"
                qkv = [given[f"{theirs_block}.attention.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{block}.attn.qkv.{kind}"] = torch.cat(qkv)
                for source, target in (
                    ("attention.o_proj", "attn.proj"),
                    ("layernorm_before", "norm1"),
                    ("layernorm_after", "norm2"),
                    ("mlp.fc1", "mlp.fc1"),
                    ("mlp.fc2", "mlp.fc2"),
                ):
                    found[f"{block}.{target}.{kind}"] = given[f"{theirs_block}.{source}.{kind}"]
            i += 1
    return found


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("shape", "decoder"),
    [(BASE, DecoderConfig()), (ODD, DecoderConfig(embed_dim=20, depth=2, num_heads=5))],
    ids=["base", "odd"],
)
def test_loss_predictions_and_gradients_equal_hugging_face(shape, decoder, norm_pix):
    ours, theirs = pair(shape, decoder, norm_pix=norm_pix)
    units = (shape["img_size"] // shape["patch_size"]) ** 2
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, shape["in_chans"], shape["img_size"], shape["img_size"], generator=generator)
    noise = torch.rand(2, units, generator=generator)
    masking = random_masking(2, units, 0.75, noise=noise)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        result = ours(images.to(dtype), masking)
        wanted = theirs(images.to(dtype), noise=noise)
        torch.testing.assert_close(result.loss, wanted.loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result.prediction, wanted.logits, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result.is_masked, wanted.mask.bool())
    result.loss.backward()
    wanted.loss.backward()
    gradients = translated(theirs, grads=True)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-12)
            assert error < 1e-8, name


def test_loss_counts_masked_patches_only():
    model = build_autoencoder("vit_tiny_patch16_224", img_size=32, patch_size=8, target="pixels", depth=1)
    masking = model.encoder.sample_masking(2, 0.5)
    images = torch.randn(2, 3, 32, 32)
    result = model(images, masking)
    errors = (result.prediction - patchify(images, 8)).square()[result.is_masked]
    torch.testing.assert_close(result.loss, errors.mean())


def test_hidden_pixels_do_not_reach_the_encoder():
    model = build_autoencoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    masking = model.encoder.sample_masking(4, 0.75, seed=3)
    images = torch.randn(4, 3, 32, 32)
    hidden = masking.is_masked.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    disturbed = torch.where(hidden, 100 * torch.randn_like(images), images)
    assert torch.equal(model.encoder(images, masking), model.encoder(disturbed, masking))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_training_lowers_the_loss(norm_pix):
    torch.manual_seed(0)
    model = build_autoencoder(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3,
        decoder=DecoderConfig(embed_dim=32, depth=1, num_heads=2), target="norm_pix" if norm_pix else "pixels",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ramps = torch.linspace(-1, 1, 16)[None, None, None].expand(8, 3, 16, 16) * torch.randn(8, 3, 1, 1)
    masking = model.encoder.sample_masking(8)
    losses = []
    for _ in range(60):
        loss = model(ramps, masking).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_num_keep_rounds_as_mae_does():
    assert [num_keep(196, 0.75), num_keep(196, 0.6), num_keep(196, 0.9), num_keep(49, 0.75)] == [49, 78, 19, 12]
    assert num_keep(20, 0.9) == int(20 * (1 - 0.9)) == 1  # not 2


SIZED = {
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 1}, 32),
    "rotary": ("vit_small_patch16_rope_224", {"patch_size": 8, "depth": 1}, 32),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 1}, 64),
    "Swin": ("swin_tiny_patch4_window7_224", {"window_size": 2, "depths": (1, 1, 1, 1)}, 64),
    "Swin v2": ("swinv2_tiny_window8_256", {"window_size": 2, "depths": (1, 1, 1, 1)}, 64),
}


@pytest.mark.parametrize("encode_masked", [False, True])
@pytest.mark.parametrize("variant", SIZED)
def test_images_of_another_size_are_refused_with_the_two_sizes(variant, encode_masked):
    name, args, side = SIZED[variant]
    model = build_autoencoder(name, img_size=side, encode_masked=encode_masked, **args)
    masking = model.encoder.sample_masking(2)
    for other in ((side // 2, side // 2), (side, 2 * side)):
        said = rf"images of {other[0]} x {other[1]} pixels given to an encoder for {side} x {side}: crop .* img_size="
        with pytest.raises(InputError, match=said):
            model(torch.randn(2, 3, *other), masking)
        with pytest.raises(InputError, match=said):
            model.encoder(torch.randn(2, 3, *other))


@pytest.mark.parametrize("variant", SIZED)
def test_without_masks_a_mask_token_stands_nowhere(variant):
    name, args, side = SIZED[variant]
    model = build_autoencoder(name, img_size=side, encode_masked=True, **args).eval()
    images = torch.randn(2, 3, side, side)
    assert torch.equal(model.encoder(images, None, model.mask_token), model.encoder(images))


def test_only_encoders_with_stages_have_them():
    encoder = build_autoencoder("vit_tiny_patch16_224", img_size=32, depth=1).encoder
    with pytest.raises(TypeError, match="VisionTransformer has no stages"):
        encoder.stages(torch.randn(2, 3, 32, 32), encoder.sample_masking(2))


def test_whole_images_of_another_size_are_timms_affair_where_it_takes_any():
    args = {"img_size": 32, "patch_size": 8, "depth": 1, "dynamic_img_size": True}
    model = build_autoencoder("vit_tiny_patch16_224", **args)
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(model.encoder(images), model.encoder.timm.forward_features(images))
    with pytest.raises(InputError, match="32 x 48 pixels given to an encoder for 32 x 32"):
        model.encoder(images, model.encoder.sample_masking(2))


def test_masks_for_other_units_are_refused():
    model = build_autoencoder("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    with pytest.raises(InputError, match=r"masks are for \(2, 49\) .* there are \(2, 16\)"):
        model(torch.randn(2, 3, 32, 32), random_masking(2, 49, 0.75))
