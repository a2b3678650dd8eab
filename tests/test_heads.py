"""Classifiers on top of encoders, against timm's own with the same tensors."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from quarterlight.finetune.config import FinetuneOptimConfig
from quarterlight.finetune.heads import build_classifier, layer_decay_groups, load_classifier
from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec, export_hub, export_weights
from quarterlight.ssl.patches import pair
from quarterlight.ssl.relative_tables import resize_table
from quarterlight.ssl.released import Weights, encoder_spec, encoder_with_weights, read_weights

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
    encoder, _ = encoder_with_weights(spec, weights)
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
    encoder, _ = encoder_with_weights(encoder_spec(EncoderConfig(), DATA, found), found)
    torch.testing.assert_close(encoder.eval()(IMAGES), model.forward_features(IMAGES), rtol=0, atol=1e-6)
    assert encoder.timm.num_classes == 0


@pytest.mark.parametrize("exported", ["classifier.safetensors", "hub"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_classifier_comes_back_whole(weights: Weights, tmp_path: Path, pool: str, exported: str):
    model = fine_tuned(weights, pool, tmp_path)
    found = read_weights(str(tmp_path / exported))
    loaded, spec, report = load_classifier(encoder_spec(EncoderConfig(), DATA, found), found)
    torch.testing.assert_close(loaded.eval()(IMAGES), model(IMAGES), rtol=0, atol=1e-6)
    assert spec.args["num_classes"] == 10
    assert "a head of 10 classes" in report


def test_an_encoder_is_no_classifier(weights: Weights):
    with pytest.raises(InputError, match="holds no classification head"):
        load_classifier(SPEC, weights)


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


SWINS = {"swin": "swin_base_patch4_window7_224", "swinv2": "swinv2_base_window8_256"}
SWIN_ARGS = {"img_size": [64, 64], "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4)}
SWIN_IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def swin_spec(kind: str = "swin", **args) -> ModelSpec:
    return ModelSpec(SWINS[kind], SWIN_ARGS | args, SPEC.mean, SPEC.std)


def swin_weights(spec: ModelSpec) -> Weights:
    """An encoder's weights, none of them at its initial value."""
    generator = torch.Generator().manual_seed(0)
    tensors = build_encoder(spec.name, **spec.timm_args()).timm.state_dict()
    return Weights("x", {n: x + torch.randn(x.shape, generator=generator) * 0.1 for n, x in tensors.items()}, spec)


@pytest.mark.parametrize("kind", SWINS)
def test_a_swins_classifier_has_the_encoders_weights_and_pools_its_tokens(kind: str):
    weights = swin_weights(swin_spec(kind))
    model, spec, report = build_classifier(swin_spec(kind), weights, num_classes=10, pool="avg", drop_path=0.1)
    tensors = model.state_dict()
    assert tensors.keys() - weights.tensors.keys() == {"head.fc.weight", "head.fc.bias"}
    for name, x in weights.tensors.items():
        assert torch.equal(tensors[name], x), name
    assert report == f"x: {len(weights.tensors)} of {len(weights.tensors)} encoder tensors loaded"
    assert 1e-5 < model.head.fc.weight.std() < 3e-5 and not model.head.fc.bias.any()
    nn.init.normal_(model.head.fc.weight)
    encoder, _ = encoder_with_weights(swin_spec(kind), weights)
    logits = encoder(SWIN_IMAGES).mean(dim=1) @ model.head.fc.weight.T
    torch.testing.assert_close(model.eval()(SWIN_IMAGES), logits, rtol=0, atol=1e-5)
    again = timm.create_model(spec.name, **spec.args).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again(SWIN_IMAGES), model(SWIN_IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize("kind", SWINS)
def test_every_parameter_of_a_swins_classifier_is_trained(kind: str):
    model, _, _ = build_classifier(swin_spec(kind), None, num_classes=10, pool="avg", drop_path=0.1)
    model.train()(SWIN_IMAGES).square().sum().backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_a_swin_cannot_be_pooled_by_a_class_token():
    with pytest.raises(InputError, match="pool token: swin_base_patch4_window7_224 has no class token; use pool avg"):
        build_classifier(swin_spec(), None, num_classes=10, pool="token", drop_path=0.0)


@pytest.mark.parametrize(
    ("old", "new", "sizes"),
    [
        ((7, 7), (6, 6), (224, 192)),
        ((4, 8), (4, 4), ((128, 256), 256)),
        ((4, 8), (8, 4), ((128, 256), 256)),
        ((2, 14), (4, 4), ((64, 448), 256)),
    ],
)
@pytest.mark.parametrize("rule", ["geometric", "bicubic"])
def test_tables_of_relative_positions_are_resized_to_the_windows_of_the_spec(rule: str, old, new, sizes):
    """By SimMIM's rule for weights of pretraining, by that of Swin's code for those of a classifier."""
    before, after = (list(pair(size)) for size in sizes)
    weights = swin_weights(swin_spec(img_size=before, window_size=old))
    if rule == "bicubic":
        weights = replace(weights, head={"head.fc.weight": torch.zeros(10, 192), "head.fc.bias": torch.zeros(10)})
    spec = swin_spec(img_size=after, window_size=new)
    model, _, report = build_classifier(spec, weights, num_classes=10, pool="avg", drop_path=0.0)
    trained, resized = timm.create_model(spec.name, **weights.spec.timm_args()), 0
    for name, x in weights.tensors.items():
        if name.endswith("relative_position_bias_table"):
            attention = name.removesuffix(".relative_position_bias_table")
            was, now = (model_of.get_submodule(attention).window_size for model_of in (trained, model))
            if was != now:
                x, resized = resize_table(x, was, now, rule), resized + 1
        torch.testing.assert_close(model.state_dict()[name], x, rtol=0, atol=1e-6)
    assert resized and f"; {resized} tables of relative positions resized ({rule})" in report


def test_a_swinv2_takes_other_windows_as_it_is():
    weights = swin_weights(swin_spec("swinv2", img_size=[256, 256], window_size=8))
    spec = swin_spec("swinv2", img_size=[192, 192], window_size=6)
    model, _, report = build_classifier(spec, weights, num_classes=10, pool="avg", drop_path=0.0)
    assert "resized" not in report and model.layers[0].blocks[0].window_size == (6, 6)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in weights.tensors.items())


def simmim_layer(name: str, depths: tuple[int, ...]) -> int:
    """SimMIM's number of the layer of a parameter (`get_swin_layer`): blocks from 1, merging with the block before."""
    if name.startswith("patch_embed."):
        return 0
    if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(found[1])]) + int(found[2]) + 1
    if found := re.match(r"layers\.(\d+)\.downsample\.", name):
        return sum(depths[: int(found[1])])
    assert name.startswith(("norm.", "head.")), name
    return sum(depths) + 1


@pytest.mark.parametrize("kind", SWINS)
def test_layer_decay_of_a_swin_is_simmims(kind: str):
    depths = (2, 2, 18, 2)
    spec = swin_spec(kind, depths=depths, embed_dim=8, num_heads=(1, 1, 1, 1))
    model, _, _ = build_classifier(spec, None, num_classes=3, pool="avg", drop_path=0.0)
    groups = layer_decay_groups(model, FinetuneOptimConfig(layer_decay=0.8, weight_decay=0.05))
    found = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    layers = set()
    for name, parameter in model.named_parameters():
        scale, decay = found[parameter]
        layer = simmim_layer(name, depths)
        layers.add(layer)
        assert scale == pytest.approx(0.8 ** (24 + 1 - layer), rel=1e-9), name
        relative = ("relative_position_bias_table", "logit_scale", "cpb_mlp")
        plain = name.endswith("bias") or "norm" in name or any(part in name for part in relative)
        assert decay == (0.0 if plain else 0.05), name
    assert layers == set(range(26))


def test_a_swins_merging_learns_like_the_block_before_it():
    model, _, _ = build_classifier(swin_spec(), None, num_classes=3, pool="avg", drop_path=0.0)
    groups = layer_decay_groups(model, FinetuneOptimConfig(layer_decay=0.5))
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    merging, before = model.layers[2].downsample.reduction.weight, model.layers[1].blocks[1].mlp.fc1.weight
    assert scales[merging] == scales[before] == pytest.approx(0.5**5)
    assert scales[model.patch_embed.proj.weight] == pytest.approx(0.5**9)
    assert scales[model.norm.weight] == scales[model.head.fc.weight] == 1.0


def test_learned_rotations_learn_with_the_positions_and_are_never_decayed():
    name, args = "vit_small_patch16_rope_mixed_ape_224", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
    classifier, _, _ = build_classifier(
        ModelSpec(name, args, (0.5,) * 3, (0.5,) * 3), None, num_classes=3, pool="avg", drop_path=0.0
    )
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    groups = layer_decay_groups(classifier, FinetuneOptimConfig(layer_decay=0.5))
    found = {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    rotations = [name for name in found if name.startswith("rope.")]
    assert rotations and all(found[name] == found["pos_embed"] == (0.5**3, 0.0) for name in rotations)
    assert set(rotations) <= build_encoder(name, **args).no_weight_decay
