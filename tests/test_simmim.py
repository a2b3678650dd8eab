"""SimMIM (Xie et al. 2022) against Hugging Face's models for masked image modeling, with the same weights and masks."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    Swinv2Config,
    Swinv2ForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.patches import unpatchify

OPTIONS = {"decoder": DecoderConfig(name="linear"), "encode_masked": True, "target": "pixels", "loss": "l1"}
SWIN = {"img_size": 192, "window_size": 6, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
SWIN_V2 = SWIN | {"img_size": 128, "window_size": 4}
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
IN_BLOCK = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
IN_BLOCK |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
OF_V2 = {
    ".attention.output.dense.": ".attention.o_proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
OF_V2 |= {"query.bias": "q_bias", "value.bias": "v_bias", "continuous_position_bias_mlp": "cpb_mlp"}
MODELS = ["swin", "swinv2", "vit"]


def simmim(name: str) -> tuple[MaskedAutoencoder, nn.Module]:
    """Returns our model and Hugging Face's in float64 with the same random weights."""
    if name == "swin":
        ours = build_autoencoder("swin_base_patch4_window7_224", **OPTIONS, **SWIN)
        theirs: nn.Module = SwinForMaskedImageModeling(
            SwinConfig(
                image_size=192, window_size=6, embed_dim=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4],
                encoder_stride=32, drop_path_rate=0.0,
            )
        )  # fmt: skip
    elif name == "swinv2":
        ours = build_autoencoder("swinv2_tiny_window8_256", **OPTIONS, **SWIN_V2)
        theirs = Swinv2ForMaskedImageModeling(
            Swinv2Config(
                image_size=128, window_size=4, embed_dim=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 3, 4],
                encoder_stride=32, drop_path_rate=0.0,
            )
        )  # fmt: skip
    else:
        ours = build_autoencoder("vit_base_patch16_224", **OPTIONS, **VIT)
        theirs = ViTForMaskedImageModeling(
            ViTConfig(
                image_size=64, patch_size=16, encoder_stride=16, hidden_size=48, num_hidden_layers=3,
                num_attention_heads=3, intermediate_size=192, layer_norm_eps=1e-6,
            )
        )  # fmt: skip
    ours, theirs = ours.double().train(), theirs.double().train()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ours.load_state_dict(translated({key: p.data for key, p in theirs.named_parameters()}), strict=True)
    return ours, theirs


def translated(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of theirs (parameters or gradients) under our names. Raises KeyError when one is left over."""
    given, found = {first_versions(key): value for key, value in given.items()}, {}
    for key in [key for key in given if key.endswith(".self.query.weight")]:  # the second version's keys have no bias
        stem, name = key.partition(".attention.self.")[0], key.removesuffix("query.weight")
        found[f"{our_block(stem)}.attn.qkv.weight"] = torch.cat(
            [given.pop(f"{name}{x}.weight") for x in ("query", "key", "value")]
        )
    for key in [key for key in given if key.endswith(("q_proj.weight", "q_proj.bias"))]:
        stem, _, kind = key.rpartition(".attention.q_proj.")
        qkv = [given.pop(f"{stem}.attention.{x}_proj.{kind}") for x in "qkv"]
        found[f"{our_block(stem)}.attn.qkv.{kind}"] = torch.cat(qkv)
    for kind, shape in (("weight", (-1,)), ("bias", ())):
        values = given.pop(f"decoder.0.{kind}")  # [(channel, row, column), D, 1, 1]; ours as (row, column, channel)
        side = round((len(values) // 3) ** 0.5)
        found[f"decoder.pred.{kind}"] = values.view(3, side * side, *shape).transpose(0, 1).reshape(len(values), *shape)
    for key, value in given.items():
        path, _, kind = key.partition(".")[2].rpartition(".")
        if kind == "mask_token":
            found["mask_token"] = value.flatten()
        elif path.startswith("embeddings"):
            plain = {"patch_embeddings.projection": "patch_embed.proj.", "norm": "patch_embed.norm."}
            tokens = {"cls_token": "cls_token", "position_embeddings": "pos_embed"}
            name = plain[path.removeprefix("embeddings.")] + kind if path != "embeddings" else tokens[kind]
            found[f"encoder.timm.{name}"] = value
        elif path == "layernorm":
            found[f"encoder.timm.norm.{kind}"] = value
        elif ".downsample." in path:  # theirs at the end of a stage, timm's at the beginning of the next
            stage, _, layer = path.removeprefix("encoder.layers.").partition(".downsample.")
            found[f"encoder.timm.layers.{int(stage) + 1}.downsample.{layer}.{kind}"] = value
        elif ".attention.self." in key:
            stem, _, name = key.partition(".attention.self.")
            found[f"{our_block(stem)}.attn.{name}"] = value
        elif kind == "relative_position_bias_table":
            stem = our_block("swin." + path.removesuffix(".attention.relative_position_bias"))
            found[f"{stem}.attn.{kind}"] = value
        else:
            stem, name = next((path.removesuffix(x), y) for x, y in IN_BLOCK.items() if path.endswith("." + x))
            found[f"{our_block(key.partition('.')[0] + '.' + stem.rstrip('.'))}.{name}.{kind}"] = value
    return found


def first_versions(key: str) -> str:
    """Returns a name in Swinv2 as the first version and ViT have it, where they have it."""
    for theirs, name in OF_V2.items() if key.startswith("swinv2") else ():
        key = key.replace(theirs, name)
    return key


def our_block(stem: str) -> str:
    for theirs, name in (
        ("swinv2.encoder.layers", "layers"),
        ("swin.encoder.layers", "layers"),
        ("vit.layers", "blocks"),
    ):
        stem = stem.replace(theirs, f"encoder.timm.{name}")
    return stem


@pytest.mark.parametrize("name", MODELS)
def test_loss_predictions_and_gradients_equal_hugging_face(name):
    ours, theirs = simmim(name)
    encoder = ours.encoder
    images = torch.randn(2, 3, *encoder.img_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masking = encoder.sample_masking(2, 0.6)
    side = encoder.img_size[0] // theirs.config.patch_size // encoder.grid[0]  # their patches in a unit
    hidden = masking.is_masked.view(2, *encoder.grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
    result = ours(images, masking)
    wanted = theirs(images, bool_masked_pos=hidden.flatten(1))
    torch.testing.assert_close(result.loss, wanted.loss, rtol=1e-9, atol=0)
    reconstruction = unpatchify(result.prediction, encoder.unit_size, encoder.grid)
    torch.testing.assert_close(reconstruction, wanted.reconstruction, rtol=0, atol=1e-9)
    assert torch.equal(result.is_masked, masking.is_masked)
    result.loss.backward()
    wanted.loss.backward()
    gradients = translated({key: p.grad for key, p in theirs.named_parameters() if p.grad is not None})
    trained = {key: p for key, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys() - {"encoder.timm.pos_embed"}  # our positions are fixed
    for key, parameter in trained.items():
        error = (parameter.grad - gradients[key]).norm() / gradients[key].norm().clamp_min(1e-12)
        assert error < 1e-8, key


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_training_step_is_the_same(name):
    ours, _ = simmim(name)
    masking = ours.encoder.sample_masking(2, 0.6)
    images = torch.randn(2, 3, *ours.encoder.img_size, dtype=torch.float64)
    whole, scored = ours(images, masking), ours(images, masking, only_scored=True)
    torch.testing.assert_close(scored.loss, whole.loss, rtol=1e-12, atol=0)
    for b in range(2):
        wanted = whole.prediction[b][masking.ids_masked[b]]
        torch.testing.assert_close(scored.prediction[b], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_pixels_do_not_reach_the_predictions(name):
    ours, _ = simmim(name)
    encoder = ours.encoder
    masking = encoder.sample_masking(2, 0.6)
    images = torch.randn(2, 3, *encoder.img_size, dtype=torch.float64)
    hidden = masking.is_masked.view(2, 1, *encoder.grid)
    hidden = hidden.repeat_interleave(encoder.unit_size, 2).repeat_interleave(encoder.unit_size, 3)
    disturbed = torch.where(hidden, 100 * torch.randn_like(images), images)
    first, second = ours(images, masking), ours(disturbed, masking)
    assert torch.equal(first.prediction, second.prediction) and not torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_token_where_nothing_is_hidden_changes_nothing(name):
    ours, _ = simmim(name)
    images = torch.randn(1, 3, *ours.encoder.img_size, dtype=torch.float64)
    masking = ours.encoder.sample_masking(1, 0.6)
    masking = masking._replace(is_masked=torch.zeros_like(masking.is_masked))
    torch.testing.assert_close(ours.encoder(images, masking, ours.mask_token), ours.encoder(images))


def test_a_linear_decoder_without_tokens_of_hidden_units_is_refused():
    with pytest.raises(InputError, match="decoder.name linear .* set encode_masked true"):
        build_autoencoder("swin_tiny_patch4_window7_224", **OPTIONS | {"encode_masked": False}, **SWIN)
