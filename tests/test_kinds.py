"""Files in the layouts of those who have released weights, built here: told by names and shapes, and loaded whole."""

import argparse
import re
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from quarterlight.ssl.command import run_command
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.kinds import recognise
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.released import encoder_with_weights, load_autoencoder, load_encoder
from quarterlight.ssl.weights import read_weights

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
SWIN = {"img_size": 128, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
VIT_NAME, SWIN_NAME, V2_NAME = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def shaken(model: nn.Module) -> Any:
    """Returns the model with no parameter at its initial value, but for fixed positions."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def mae(**changes: Any) -> MaskedAutoencoder:
    decoder = DecoderConfig(embed_dim=64, depth=2, num_heads=2)
    return shaken(build_autoencoder(VIT_NAME, decoder=decoder, **VIT | changes))


def in_maes_layout(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Returns an autoencoder's tensors under the names of facebookresearch/mae."""
    found = dict(model.encoder.timm.state_dict())
    for name, x in model.decoder.state_dict().items():
        found["mask_token" if name == "mask_token" else f"decoder_{name}"] = x
    return found | {"decoder_pos_embed": model.decoder.pos_embed}


def in_swins_layout(model: nn.Module) -> dict[str, Tensor]:
    """Returns a timm Swin's tensors under the names of microsoft/Swin-Transformer, with the buffers in its files."""
    found = {}
    for name, x in model.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        found[name.replace("head.fc.", "head.")] = x
    for key, module in model.named_modules():
        for buffer in ("relative_position_index", "relative_coords_table", "attn_mask"):
            if getattr(module, buffer, None) is not None:
                found[f"{key}.{buffer}"] = getattr(module, buffer)
    return found


def in_simmims_layout(model: MaskedAutoencoder) -> dict[str, Tensor]:
    side, width = model.encoder.unit_size, model.encoder.embed_dim
    weight, bias = model.decoder.pred.weight, model.decoder.pred.bias  # (row, column, channel)
    names = {f"encoder.{name}": x for name, x in in_swins_layout(model.encoder.timm).items()}
    names["encoder.mask_token"] = model.mask_token[None, None]
    names["decoder.0.weight"] = weight.view(side, side, 3, width).permute(2, 0, 1, 3).reshape(-1, width, 1, 1)
    names["decoder.0.bias"] = bias.view(side, side, 3).permute(2, 0, 1).flatten()
    return {name: x.detach() for name, x in names.items()}


def saved(path: Path, tensors: Any) -> str:
    torch.save(tensors, path)
    return str(path)


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_features(source: str, model: Any, side: int, **how: Any) -> None:
    encoder, _ = load_encoder(source, **how)
    wanted = model.forward_features(images(side))
    wanted = wanted.flatten(1, 2) if wanted.ndim == 4 else wanted
    torch.testing.assert_close(encoder(images(side)), wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def assert_same_loss(found: MaskedAutoencoder, wanted: MaskedAutoencoder) -> None:
    masking = wanted.encoder.sample_masking(2)
    x = images(wanted.encoder.img_size[0])
    torch.testing.assert_close(found(x, masking).loss, wanted(x, masking).loss, rtol=1e-6, atol=0)


# MAE. That our autoencoder computes what MAE's does is proved with Hugging Face's (test_mae.py,
# test_read_transformers.py).


@pytest.mark.parametrize("wrap", ["plain", "trained", "distributed", "compiled"])
def test_a_full_mae_file_is_an_autoencoder(tmp_path, wrap):
    model = mae(target="pixels" if wrap == "trained" else "norm_pix")
    tensors = in_maes_layout(model)
    content: dict[str, Any] = {"model": tensors}
    if wrap == "trained":  # as its training leaves it
        content |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3, "scaler": {}}
        content["args"] = argparse.Namespace(norm_pix_loss=False, model="mae_vit_tiny", output_dir=Path("x"))
    elif wrap != "plain":
        prefix = {"distributed": "module.", "compiled": "module._orig_mod."}[wrap]
        content = {"state_dict": {prefix + name: x for name, x in tensors.items()}}
    source = saved(tmp_path / "x.pth", content)
    weights = read_weights(source)
    assert (weights.kind, weights.unused) == ("mae-full", ())
    assert len(weights.tensors) + len(weights.decoder.tensors) == len(tensors)
    assert_same_features(source, model.encoder.timm, 32)
    assert_same_loss(load_autoencoder(source), model)


def test_files_for_pictures_want_plain_pixels(tmp_path):
    """Nothing in them tells them from those for fine-tuning, whose target is the default."""
    model = mae(target="pixels")
    source = saved(tmp_path / "mae_visualize_vit_base.pth", {"model": in_maes_layout(model)})
    assert_same_loss(load_autoencoder(source, target="pixels"), model)


def test_at_another_size_the_decoder_gets_positions_of_its_own(tmp_path):
    source = saved(tmp_path / "x.pth", {"model": in_maes_layout(mae())})
    found = load_autoencoder(source, img_size=(48, 32))
    wanted = mae(img_size=(48, 32))
    assert torch.equal(found.decoder.pos_embed, wanted.decoder.pos_embed)
    masking = found.encoder.sample_masking(2)
    assert found(torch.randn(2, 3, 48, 32), masking).prediction.shape == (2, 24, 192)


def test_an_encoder_of_mae_is_told_by_its_fixed_waves(tmp_path):
    model = mae().encoder.timm
    assert read_weights(saved(tmp_path / "x.pth", {"model": model.state_dict()})).kind == "mae"
    assert (
        read_weights(saved(tmp_path / "y.pth", shaken(timm.create_model(VIT_NAME, **VIT)).state_dict())).kind == "timm"
    )


def test_a_fine_tuned_mae_is_a_classifier_and_an_encoder(tmp_path):
    model = shaken(timm.create_model(VIT_NAME, num_classes=7, global_pool="avg", **VIT))
    source = saved(tmp_path / "x.pth", {"model": model.state_dict()})
    weights = read_weights(source)
    assert (weights.kind, weights.spec.args["global_pool"], weights.unused) == ("mae-finetuned", "avg", ())
    assert weights.head.keys() == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert_same_features(source, model, 32)
    encoder, _ = load_encoder(source)
    model.reset_classifier(0)
    assert torch.equal(encoder.timm(images(32)), model(images(32)))  # with the norm behind the mean


def test_an_autoencoder_of_this_project_that_was_saved_as_it_is_loads_as_one(tmp_path):
    model = mae()
    source = saved(tmp_path / "x.pth", model.state_dict())
    assert read_weights(source).kind == "quarterlight"
    assert_same_features(source, model.encoder.timm, 32)
    assert_same_loss(load_autoencoder(source), model)


# Swin and SimMIM.


def pickled_with_settings(
    path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> str:
    """Writes what Swin's and SimMIM's training leaves; yacs is there while it is written only."""
    module: Any = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        config = module.CfgNode({"MODEL": module.CfgNode({"TYPE": "swin"})})
        config.__dict__["__immutable__"] = True
        config["MODEL"].update(settings)
        others = {"optimizer": {}, "lr_scheduler": {}, "max_accuracy": np.float64(83.5), "epoch": 99, "config": config}
        return saved(path, {"model": tensors, **others, "amp": {"loss_scaler0": {"loss_scale": 65536.0}}})


@pytest.mark.parametrize("name", [SWIN_NAME, V2_NAME])
def test_a_simmim_file_is_an_autoencoder(tmp_path, monkeypatch, name):
    decoder = DecoderConfig(name="linear")
    options = {"decoder": decoder, "encode_masked": True, "target": "pixels", "loss": "l1"}
    model = shaken(build_autoencoder(name, **options, **SWIN))
    source = pickled_with_settings(tmp_path / "x.pth", in_simmims_layout(model), monkeypatch)
    weights = read_weights(source)
    assert (weights.kind, weights.unused) == ("simmim", ())
    assert_same_features(source, model.encoder.timm, 128)
    assert_same_loss(load_autoencoder(source), model)


def test_the_target_of_a_simmim_file_is_that_of_its_settings_or_not_told(tmp_path, monkeypatch):
    options = {"decoder": DecoderConfig(name="linear"), "encode_masked": True, "target": "pixels", "loss": "l1"}
    for name in (SWIN_NAME, V2_NAME):
        tensors = in_simmims_layout(build_autoencoder(name, **options, **SWIN))
        for enabled in (True, False, None):
            said = {"SIMMIM": {"NORM_TARGET": {"ENABLE": enabled, "PATCH_SIZE": 47}}} if enabled is not None else {}
            weights = read_weights(pickled_with_settings(tmp_path / "x.pth", tensors, monkeypatch, **said))
            notes = " ".join(weights.decoder.notes)
            assert ("windows of 47 x 47" in notes) == (enabled is True)
            assert ("told by nothing" in notes) == (enabled is None and name == V2_NAME)


def test_the_first_networks_of_a_simmim_swin_v2_are_renamed(tmp_path):
    model = shaken(timm.create_model(V2_NAME, num_classes=0, **SWIN))
    tensors = {f"encoder.{name}": x for name, x in in_swins_layout(model).items()}
    tensors = {name.replace("cpb_mlp", "rpe_mlp"): x for name, x in tensors.items()} | {
        "encoder.mask_token": torch.zeros(1, 1, 16)
    }
    source = saved(tmp_path / "x.pth", {"model": tensors})
    assert (read_weights(source).kind, read_weights(source).unused) == ("simmim", ("mask_token",))
    assert_same_features(source, model, 128)


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        (SWIN_NAME, {}, "swin"),
        (SWIN_NAME, {"img_size": 64}, "swin"),  # the last stages have no room for the windows
        (V2_NAME, {}, "swinv2"),
        (V2_NAME, {"pretrained_window_sizes": (2, 2, 2, 1)}, "swinv2"),
    ],
)
@pytest.mark.parametrize("classes", [0, 5])
def test_a_supervised_swin_is_read(tmp_path, name, changes, kind, classes):
    model = shaken(timm.create_model(name, num_classes=classes, **SWIN | changes))
    source = saved(tmp_path / "x.pth", {"model": in_swins_layout(model)})
    weights = read_weights(source)
    assert (weights.kind, weights.unused) == (kind, ())
    assert weights.head.keys() == ({"head.fc.weight", "head.fc.bias"} if classes else set())
    assert_same_features(source, model, SWIN["img_size"] if "img_size" not in changes else changes["img_size"])


def test_a_swin_v2_of_timm_names_no_windows(tmp_path):
    model = shaken(timm.create_model(V2_NAME, num_classes=0, **SWIN))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    source = str(tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"a Swin V2 of width 16 with \[2, 2, 1, 1\] blocks, whose windows .* give enc"
    ):
        load_encoder(source)
    args = {key: value for key, value in SWIN.items() if key != "img_size"}
    assert_same_features(source, model, 128, name=V2_NAME, img_size=128, **args)


# GreenMIM.


def green(model: MaskedAutoencoder, swin: nn.Module) -> dict[str, Tensor]:
    names = {f"encoder.{name}": x for name, x in in_swins_layout(swin).items() if "attn_mask" not in name}
    decoder = in_maes_layout(model)
    return names | {name: x for name, x in decoder.items() if name.startswith(("decoder", "mask_token"))}


def test_a_green_mim_file_is_read_in_the_order_that_is_given():
    swin = shaken(timm.create_model(SWIN_NAME, num_classes=0, **SWIN))
    tensors = green(mae(), swin)
    with pytest.raises(InputError, match="is GreenMIM's, .* convert it with launch/convert.py and --merge_order"):
        recognise(tensors)
    found = recognise(tensors, "swin")
    assert found.kind == "greenmim" and len(found.unused) == len([name for name in tensors if "encoder" not in name])
    assert all(torch.equal(x, found.encoder[name]) for name, x in swin.state_dict().items())
    found = recognise(tensors, "greenmim2022")
    merging = timm.create_model(SWIN_NAME, num_classes=0, **SWIN).layers[1].downsample
    prefix = "layers.1.downsample."
    merging.load_state_dict({k.removeprefix(prefix): x for k, x in found.encoder.items() if k.startswith(prefix)})
    x = torch.randn(1, 4, 4, 16)
    squares = x.reshape(1, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).flatten(3)  # 00, 01, 10, 11 (row, column)
    theirs = swin.layers[1].downsample
    torch.testing.assert_close(merging(x), theirs.reduction(theirs.norm(squares)), rtol=0, atol=1e-6)
    assert not torch.allclose(merging(x), theirs(x), atol=1e-3)
    with pytest.raises(InputError, match="is for GreenMIM only"):
        recognise(in_swins_layout(swin), "swin")


# ViTs inside something else.


def test_dino_moco_and_others_name_their_encoder_by_a_prefix(tmp_path):
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **VIT))
    other = timm.create_model(VIT_NAME, num_classes=0, **VIT).state_dict()
    state = model.state_dict()

    def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: x for name, x in tensors.items()}

    contents = {
        "dino": {
            "student": under("module.backbone.", other) | {"module.head.mlp.0.weight": torch.zeros(2)},
            "teacher": under("backbone.", state) | {"head.mlp.0.weight": torch.zeros(2)},
            "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3,
        },
        "moco-v3": {
            "state_dict": under("module.base_encoder.", state | {"head.0.weight": torch.zeros(2)})
            | under("module.momentum_encoder.", other) | {"module.predictor.0.weight": torch.zeros(2)},
        },
        "i-jepa": {"encoder": under("module.", other), "target_encoder": under("module.", state)},
        "compiled": under("model.backbone._orig_mod.", state),
        "flat": under("teacher.backbone.", state) | under("student.backbone.", other),
    }  # fmt: skip
    for name, content in contents.items():
        source = saved(tmp_path / f"{name}.pth", content)
        assert_same_features(source, model, 32)
    assert len(read_weights(str(tmp_path / "moco-v3.pth")).unused) == 2 + len(other)
    with pytest.raises(InputError, match=r"holds several encoders \(a., b.\)"):
        read_weights(saved(tmp_path / "x.pth", under("a.", state) | under("b.", other)))


def test_the_small_vit_of_moco_has_heads_of_its_own(tmp_path):
    args = {"img_size": 32, "embed_dim": 384, "depth": 1, "num_heads": 12}
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **args))
    for prefix in ("module.base_encoder.", "module.momentum_encoder."):
        state = {prefix + name: x for name, x in model.state_dict().items()}
        source = saved(tmp_path / "x.pth", {"state_dict": state})
        assert read_weights(source).notes == ("12 attention heads, as MoCo v3's ViT-S has them",)
        assert_same_features(source, model, 32)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_read_as_timm_reads_it(tmp_path, registers):
    args = VIT | {"img_size": 28, "patch_size": 14, "init_values": 1.0}
    args |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **args))
    theirs = {name: x.clone() for name, x in model.state_dict().items()} | {"mask_token": torch.randn(1, 64)}
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
        theirs["pos_embed"] = torch.randn(1, 5, 64)
    wanted = checkpoint_filter_fn(dict(theirs), model)
    model.load_state_dict(wanted)
    assert_same_features(saved(tmp_path / "x.pth", theirs), model, 28)
    chunked = {re.sub(r"^blocks\.", "blocks.0.", name): x for name, x in theirs.items()}
    source = saved(tmp_path / "y.pth", {"teacher": {f"backbone.{name}": x for name, x in chunked.items()}})
    assert_same_features(source, model, 28)


def test_timms_averages_come_first(tmp_path):
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **VIT))
    content = {"state_dict": {k: x + 1 for k, x in model.state_dict().items()}, "state_dict_ema": model.state_dict()}
    source = saved(tmp_path / "x.pth.tar", content)
    assert_same_features(source, model, 32)
    assert "averaged weights" in "".join(read_weights(source).notes)


@pytest.mark.parametrize(
    "name", ["convnextv2_tiny.fcmae", "hiera_tiny_224.mae", "beit_base_patch16_224.in22k_ft_in22k"]
)
def test_models_that_have_no_encoder_here_are_refused_before_anything_is_fetched(name):
    with pytest.raises(InputError, match=f"encoder {name}: a .* is not supported; use one of timm's vit_"):
        read_weights(name)


# What cannot be used.


def wrong_files(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    model = mae()
    full, swin = in_maes_layout(model), timm.create_model(SWIN_NAME, num_classes=0, **SWIN)
    decoder = {name: x for name, x in full.items() if name.startswith("decoder")}
    half = {(f"x.{name}" if i % 2 else name): x for i, (name, x) in enumerate(full.items())}
    renamed = {name.replace("blocks", "stufe"): x for name, x in full.items()}
    resnet = {"conv1.weight": torch.zeros(2), "layer1.0.conv1.weight": torch.zeros(2)}
    beit = full | {"rel_pos_bias.relative_position_bias_table": torch.zeros(732, 1)}
    return {
        "another architecture": (resnet, "holds a convolutional or hybrid network"),
        "a text model": ({"wte.weight": torch.zeros(2, 2)}, "holds 1 tensors, and none is the patch embedding"),
        "a decoder only": (decoder, "holds a decoder only .* give the full file"),
        "an optimizer": ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "but an optimizer's state"),
        "its bare state": ({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, "an optimizer's state"),
        "half the names changed": (half, "does not say which model .* or renamed"),
        "blocks renamed": (renamed, "does not say which model it is"),
        "half a block": ({k: x for k, x in full.items() if "blocks.1.mlp" not in k}, "4 of the encoder's 30 tensors"),
        "a BEiT": (beit, "BEiT-like ViT"),
        "absolute positions": (in_swins_layout(swin) | {"absolute_pos_embed": torch.zeros(1, 9)}, "absolute positions"),
        "distilled": (full | {"dist_token": torch.zeros(1, 1, 64)}, "distilled DeiT"),
        "a module": ({"model": {"x": nn.Linear(2, 2)}}, "it names torch.nn.modules.linear.Linear, which is code"),
    }  # fmt: skip


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, capsys):
    for name, (content, said) in wrong_files(tmp_path).items():
        source = saved(tmp_path / "x.pth", content)
        with pytest.raises(InputError, match=said) as caught:
            load_encoder(source)
        assert "\n" not in str(caught.value) and "x.pth" in str(caught.value), name
        with pytest.raises(SystemExit) as ended:
            run_command(partial(str, source), load_encoder)
        printed = capsys.readouterr()
        assert (ended.value.code, printed.out) == (1, ""), name
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, name


def test_an_encoder_alone_is_no_autoencoder(tmp_path):
    source = saved(tmp_path / "x.pth", {"model": mae().encoder.timm.state_dict()})
    with pytest.raises(InputError, match="an encoder without a decoder; give a full file"):
        load_autoencoder(source)
    source = saved(tmp_path / "y.pth", {"model": in_maes_layout(mae())})
    with pytest.raises(InputError, match=r"its decoder does not fit .* decoder.embed_dim 64, decoder.depth 2"):
        load_autoencoder(source, decoder=DecoderConfig(embed_dim=32, depth=2, num_heads=2))


# Loading into something else than what it was.


def test_a_patch_embedding_is_resized(tmp_path):
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **VIT))
    weights = read_weights(saved(tmp_path / "x.pth", model.state_dict()))
    spec = replace(weights.spec, args=weights.spec.args | {"patch_size": 16, "img_size": [64, 64]})
    encoder, report = encoder_with_weights(spec, weights)
    wanted = resample_patch_embed(model.patch_embed.proj.weight, [16, 16])
    torch.testing.assert_close(encoder.timm.patch_embed.proj.weight, wanted, rtol=0, atol=0)
    assert torch.equal(encoder.timm.pos_embed, model.pos_embed)  # the same grid
    assert "patch embedding resized from 8 x 8 to 16 x 16 pixels" in report and "positions" not in report


def test_what_is_missing_may_start_afresh(tmp_path):
    model = shaken(timm.create_model(VIT_NAME, num_classes=0, **VIT))
    tensors = {name: x for name, x in model.state_dict().items() if "blocks.1.mlp" not in name}
    weights = read_weights(saved(tmp_path / "x.pth", tensors))
    with pytest.raises(InputError, match="--allow_partial true"):
        encoder_with_weights(weights.spec, weights)
    encoder, report = encoder_with_weights(weights.spec, replace(weights, allow_partial=True))
    assert "26 of 30 encoder tensors loaded" in report and "4 keep their initial values: blocks.1.mlp" in report
    state = encoder.timm.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in tensors.items())
    assert torch.equal(state["blocks.1.mlp.fc1.bias"], torch.zeros(256))  # MAE's beginning
    nothing = replace(weights, tensors={"x": torch.zeros(2)}, allow_partial=True)
    with pytest.raises(InputError, match="30 of the encoder's 30 tensors did not load"):
        encoder_with_weights(weights.spec, nothing)
