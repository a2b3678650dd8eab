"""Classifiers on top of encoders, against timm's own with the same tensors."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from quarterlight.finetune.heads import build_classifier
from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec, export_hub, export_weights
from quarterlight.ssl.released import Weights, encoder_spec, load_encoder, read_weights

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": [32, 32], "in_chans": 3, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SPEC = ModelSpec(NAME, ARGS, (0.5,) * 3, (0.25,) * 3)
DATA = DataConfig(train="t")
POOLS = ("avg", "token")
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """An encoder's weights, none of them at its initial value."""
    generator = torch.Generator().manual_seed(0)
    tensors = build_encoder(NAME, **SPEC.timm_args()).timm.state_dict()
    return Weights("x", {n: x + torch.randn(x.shape, generator=generator) * 0.1 for n, x in tensors.items()}, SPEC)


def classifier(weights: Weights | None, pool: str, *, num_classes: int = 10, drop_path: float = 0.1) -> nn.Module:
    return build_classifier(SPEC, weights, num_classes=num_classes, pool=pool, drop_path=drop_path)[0]


def logits_by_hand(tensors: dict[str, Tensor], model: nn.Module, pool: str) -> Tensor:
    """MAE's classifier, from timm's blocks and plain functions: pool, norm, head."""
    plain = timm.create_model(NAME, num_classes=0, **ARGS).eval()
    plain.load_state_dict(tensors)
    tokens = plain.blocks(plain._pos_embed(plain.patch_embed(IMAGES)))
    if pool == "avg":
        x = nn.functional.layer_norm(tokens[:, 1:].mean(dim=1), (48,), eps=1e-6)
    else:
        x = nn.functional.layer_norm(tokens, (48,), tensors["norm.weight"], tensors["norm.bias"], eps=1e-6)[:, 0]
    return x @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_those_of_the_encoder_pooled_by_hand(weights: Weights, pool: str):
    model = classifier(weights, pool).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    torch.testing.assert_close(model(IMAGES), logits_by_hand(weights.tensors, model, pool), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_those_of_timms_model_with_the_same_tensors(weights: Weights, pool: str):
    model = classifier(weights, pool).eval()
    plain = timm.create_model(NAME, num_classes=10, global_pool=pool, **ARGS).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=0)


def test_with_avg_the_norm_moves_behind_the_pooling_and_starts_afresh(weights: Weights):
    tensors = classifier(weights, "avg").state_dict()
    assert not any(name.startswith("norm.") for name in tensors)
    assert torch.equal(tensors["fc_norm.weight"], torch.ones(48))
    assert torch.equal(tensors["fc_norm.bias"], torch.zeros(48))


def test_with_token_the_trained_norm_stays(weights: Weights):
    tensors = classifier(weights, "token").state_dict()
    assert torch.equal(tensors["norm.weight"], weights.tensors["norm.weight"])
    assert torch.equal(tensors["norm.bias"], weights.tensors["norm.bias"])
    assert not any(name.startswith("fc_norm.") for name in tensors)


@pytest.mark.parametrize("pool", POOLS)
def test_every_other_tensor_is_the_encoders(weights: Weights, pool: str):
    tensors = classifier(weights, pool).state_dict()
    own = {name for name in tensors if name.startswith(("head.", "fc_norm."))}
    assert own >= {"head.weight", "head.bias"}
    for name in tensors.keys() - own:
        assert torch.equal(tensors[name], weights.tensors[name]), name
    assert weights.tensors.keys() - tensors.keys() == ({"norm.weight", "norm.bias"} if pool == "avg" else set())


@pytest.mark.parametrize("pool", POOLS)
def test_the_head_starts_near_zero(weights: Weights, pool: str):
    torch.manual_seed(0)
    model = classifier(weights, pool, num_classes=500)
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.05)
    assert float(model.head.weight.detach().abs().max()) > 5e-5
    assert torch.equal(model.head.bias, torch.zeros(500))


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_is_trained_positions_included(weights: Weights, pool: str):
    model = classifier(weights, pool)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_drop_path_grows_linearly_over_the_blocks(weights: Weights):
    blocks = classifier(weights, "avg", drop_path=0.2).blocks
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    assert blocks[1].drop_path1.drop_prob == blocks[1].drop_path2.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("pool", POOLS)
def test_the_spec_builds_the_classifier_again_without_drop_path(weights: Weights, pool: str):
    model, spec, report = build_classifier(SPEC, weights, num_classes=10, pool=pool, drop_path=0.1)
    assert report == "x: 30 of 30 encoder tensors loaded"
    assert (spec.mean, spec.std) == (SPEC.mean, SPEC.std)
    again = timm.create_model(spec.name, **spec.args).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again(IMAGES), model.eval()(IMAGES), rtol=0, atol=0)
    assert not any("drop" in key for key in spec.args)


@pytest.mark.parametrize("pool", POOLS)
def test_positions_are_resized_to_the_image_size_of_the_spec(weights: Weights, pool: str):
    spec = ModelSpec(NAME, ARGS | {"img_size": [48, 40]}, SPEC.mean, SPEC.std)
    model, _, report = build_classifier(spec, weights, num_classes=10, pool=pool, drop_path=0.0)
    encoder, _ = load_encoder(spec, weights)
    torch.testing.assert_close(model.pos_embed, encoder.timm.pos_embed, rtol=0, atol=0)
    assert "positions resized from 4 x 4 to 6 x 5 patches" in report


def test_without_weights_the_encoder_has_maes_initial_ones():
    model, _, report = build_classifier(SPEC, None, num_classes=10, pool="avg", drop_path=0.0)
    assert "initial weights" in report
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(48))
    assert torch.equal(model.blocks[0].mlp.fc1.bias, torch.zeros(192))


def test_weights_that_do_not_fit_are_refused(weights: Weights):
    partial = Weights("x", {n: t for n, t in weights.tensors.items() if not n.startswith("blocks.1.")}, SPEC)
    with pytest.raises(InputError, match="x: 12 of the encoder's 30 tensors did not load"):
        classifier(partial, "avg")


def test_a_model_without_class_token_cannot_be_pooled_by_it():
    spec = ModelSpec(NAME, ARGS | {"class_token": False, "global_pool": "avg"}, SPEC.mean, SPEC.std)
    with pytest.raises(InputError):
        build_classifier(spec, None, num_classes=10, pool="token", drop_path=0.0)


def fine_tuned(weights: Weights, pool: str, folder: Path) -> nn.Module:
    """Returns a classifier after exporting it to `folder`, as a file and as a hub folder."""
    model, spec, _ = build_classifier(SPEC, weights, num_classes=10, pool=pool, drop_path=0.0)
    export_weights(folder / "classifier.safetensors", model, spec, {})
    export_hub(folder / "hub", model, spec, title="t", facts={})
    return model.eval()


@pytest.mark.parametrize("pool", POOLS)
def test_timm_loads_an_exported_classifier_with_the_same_logits(weights: Weights, tmp_path: Path, pool: str):
    model = fine_tuned(weights, pool, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("exported", ["classifier.safetensors", "hub"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_serves_as_an_encoder_without_its_head(weights: Weights, tmp_path: Path, pool: str, exported: str):
    model = fine_tuned(weights, pool, tmp_path)
    found = read_weights(str(tmp_path / exported))
    encoder, _ = load_encoder(encoder_spec(EncoderConfig(), DATA, found), found)
    torch.testing.assert_close(encoder.eval()(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-6)
    assert encoder.timm.num_classes == 0


@pytest.mark.parametrize("exported", ["classifier.safetensors", "hub"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_is_fine_tuned_again_for_other_classes(weights: Weights, tmp_path: Path, pool: str, exported: str):
    model = fine_tuned(weights, pool, tmp_path)
    found = read_weights(str(tmp_path / exported))
    again, spec, _ = build_classifier(
        encoder_spec(EncoderConfig(), DATA, found), found, num_classes=4, pool=pool, drop_path=0.0
    )
    assert again.num_classes == spec.args["num_classes"] == 4
    torch.testing.assert_close(again.eval().forward_features(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-6)
