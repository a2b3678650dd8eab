"""Weights that come in: from runs, files and hub folders, whole or refused."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from quarterlight.ssl.config import DataConfig, DecoderConfig, EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ENCODER_FILE, ModelSpec, export_hub, export_weights
from quarterlight.ssl.mae import attach_decoder
from quarterlight.ssl.released import (
    Weights,
    encoder_spec,
    encoder_with_weights,
    load_encoder,
    load_weights,
    read_weights,
)

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": [32, 32], "in_chans": 3, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MEAN, STD = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)
SPEC = ModelSpec(NAME, ARGS, MEAN, STD)
FACTS = {"step": 7, "stage": "pretraining"}
DATA = DataConfig(train="t")


def random_vit(**changes: object) -> nn.Module:
    """Returns a headless timm model none of whose tensors keeps its initial value."""
    model = timm.create_model(NAME, **(ARGS | {"num_classes": 0} | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def mae_file(path: Path, model: nn.Module, **outer: object) -> Path:
    """Writes what facebookresearch/mae publishes: the encoder, MAE's decoder, the mask token, under "model"."""
    extra = {
        "mask_token": torch.randn(1, 1, 16),
        "decoder_embed.weight": torch.randn(16, 48),
        "decoder_embed.bias": torch.randn(16),
        "decoder_pos_embed": torch.randn(1, 17, 16),
        "decoder_blocks.0.norm1.weight": torch.randn(16),
        "decoder_norm.weight": torch.randn(16),
        "decoder_pred.weight": torch.randn(192, 16),
    }
    torch.save({"model": model.state_dict() | extra, **outer}, path)
    return path


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return random_vit()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_dir(tmp_path: Path, vit: nn.Module) -> Path:
    export_weights(tmp_path / "run" / ENCODER_FILE, vit, SPEC, FACTS)
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path: Path, vit: nn.Module) -> Path:
    export_hub(tmp_path / "hub", vit, SPEC, title="t", facts=FACTS)
    return tmp_path / "hub"


def refusal(init: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        read_weights(str(init))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_folder_and_its_file_give_the_same_weights_and_spec(run_dir: Path, vit: nn.Module):
    for init in (run_dir, run_dir / ENCODER_FILE):
        weights = read_weights(str(init))
        assert_same_tensors(weights.tensors, vit.state_dict())
        assert weights.spec == SPEC
        assert weights.source == str(run_dir / ENCODER_FILE)


def test_a_home_folder_is_expanded(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert read_weights("~/run").spec == SPEC


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_hub_folder_gives_the_weights_and_all_that_builds_their_model(hub: Path, vit: nn.Module, prefix: str):
    weights = read_weights(f"{prefix}{hub}")
    assert_same_tensors(weights.tensors, vit.state_dict())
    assert weights.spec is not None
    assert (weights.spec.name, weights.spec.mean, weights.spec.std) == (NAME, MEAN, STD)
    assert {key: weights.spec.args.get(key) for key in ARGS} == ARGS


def test_an_encoder_is_built_from_a_hub_folder_alone(hub: Path, vit: nn.Module, images: Tensor):
    weights = read_weights(str(hub))
    encoder, _ = encoder_with_weights(encoder_spec(EncoderConfig(), DATA, weights), weights)
    torch.testing.assert_close(encoder.eval()(images), vit.forward_features(images), rtol=0, atol=1e-6)


def test_an_encoder_is_built_from_a_run_folder_alone(run_dir: Path, vit: nn.Module, images: Tensor):
    weights = read_weights(str(run_dir))
    encoder, report = encoder_with_weights(encoder_spec(EncoderConfig(), DATA, weights), weights)
    torch.testing.assert_close(encoder.eval()(images), vit.forward_features(images), rtol=0, atol=1e-6)
    assert report == f"{run_dir / ENCODER_FILE}: 30 of 30 encoder tensors loaded"


def test_a_safetensors_file_without_metadata_gives_tensors_and_their_shapes(tmp_path: Path, vit: nn.Module):
    save_file(vit.state_dict(), tmp_path / "x.safetensors")
    weights = read_weights(str(tmp_path / "x.safetensors"))
    assert_same_tensors(weights.tensors, vit.state_dict())
    with pytest.raises(InputError, match="how many attention heads .* width 48, 2 blocks, .* --encoder.args.num_heads"):
        encoder_spec(EncoderConfig(), DATA, weights)
    with pytest.raises(InputError, match="does not say which model it is: give encoder.name"):
        encoder_spec(EncoderConfig(), DATA, Weights("x", weights.tensors, None))
    args = {key: value for key, value in ARGS.items() if key != "img_size"}
    spec = encoder_spec(EncoderConfig(name=NAME, args=args, img_size=32), DATA, weights)
    assert_same_tensors(encoder_with_weights(spec, weights)[0].timm.state_dict(), vit.state_dict())


@pytest.mark.parametrize(
    "outer",
    [{}, {"args": argparse.Namespace(lr=1e-3, device="cuda"), "epoch": 3, "optimizer": {"state": {}}, "scaler": {}}],
)
def test_a_mae_file_gives_the_encoder_only(tmp_path: Path, vit: nn.Module, outer: dict):
    weights = read_weights(str(mae_file(tmp_path / "mae.pth", vit, **outer)))
    assert_same_tensors(weights.tensors, vit.state_dict())
    assert weights.kind == "mae-full"


def test_a_mae_file_loads_into_the_encoder_of_its_name(tmp_path: Path, vit: nn.Module, images: Tensor):
    weights = read_weights(str(mae_file(tmp_path / "mae.pth", vit)))
    spec = encoder_spec(EncoderConfig(name=NAME, args=ARGS), DATA, weights)
    encoder, _ = encoder_with_weights(spec, weights)
    torch.testing.assert_close(encoder.eval()(images), vit.forward_features(images), rtol=0, atol=1e-6)
    assert spec.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"state_dict": tensors}])
def test_other_pickled_state_dicts_are_read(tmp_path: Path, vit: nn.Module, wrap):
    torch.save(wrap(vit.state_dict()), tmp_path / "x.pth")
    assert_same_tensors(read_weights(str(tmp_path / "x.pth")).tensors, vit.state_dict())


def test_the_whole_autoencoders_decoder_is_left_out(tmp_path: Path, vit: nn.Module):
    encoder = build_encoder(NAME, **SPEC.timm_args())
    autoencoder = attach_decoder(
        encoder, decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2), target="pixels", in_chans=3
    )
    names = {name.replace("encoder.timm.", ""): x for name, x in autoencoder.state_dict().items()}
    torch.save(names, tmp_path / "x.pth")
    assert read_weights(str(tmp_path / "x.pth")).tensors.keys() == vit.state_dict().keys()


@pytest.mark.parametrize("init", ["nowhere", "nowhere.pth", "runs/nowhere.safetensors", "vit_tny_patch16_224"])
def test_a_name_that_is_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str):
    monkeypatch.chdir(tmp_path)
    assert init in refusal(init)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    assert ENCODER_FILE in refusal(tmp_path)


def test_a_hub_folder_without_weights_is_refused(hub: Path):
    (hub / "model.safetensors").unlink()
    assert str(hub) in refusal(hub)


def test_a_damaged_hub_config_is_refused(hub: Path):
    (hub / "config.json").write_text("{")
    assert str(hub) in refusal(hub)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
@pytest.mark.parametrize("content", [b"", b"hello, I am a text\n", b"\x00" * 64, b"PK\x03\x04 not a zip"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_file_cut_short_is_refused(tmp_path: Path, run_dir: Path, vit: nn.Module):
    for whole in (run_dir / ENCODER_FILE, mae_file(tmp_path / "mae.pth", vit)):
        whole.write_bytes(whole.read_bytes()[:-1000])
        assert str(whole) in refusal(whole)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2), 3, {"model": {"epoch": 3}}])
def test_a_pickled_file_without_named_tensors_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "x.pth")
    assert "no tensors" in refusal(tmp_path / "x.pth")


class Planted:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_pickled_file_is_refused_and_does_not_run(tmp_path: Path, vit: nn.Module):
    proof = tmp_path / "ran"
    torch.save({"model": vit.state_dict(), "args": Planted(proof)}, tmp_path / "x.pth")
    assert "x.pth" in refusal(tmp_path / "x.pth")
    assert not proof.exists()


@pytest.mark.parametrize("missing", ["mean", "std", "timm_args"])
def test_metadata_that_lacks_a_part_is_refused(tmp_path: Path, vit: nn.Module, missing: str):
    metadata = {"architecture": NAME, "timm_args": json.dumps(ARGS), "mean": "[0.5]", "std": "[0.5]"}
    del metadata[missing]
    save_file(vit.state_dict(), tmp_path / "x.safetensors", metadata=metadata)
    assert missing in refusal(tmp_path / "x.safetensors")


def test_a_timm_name_whose_weights_cannot_be_had_is_refused(tmp_path: Path):
    code = (
        "from quarterlight.ssl.released import read_weights\nfrom quarterlight.ssl.errors import InputError\n"
        "for init in ('vit_tiny_patch16_224', 'hf-hub:nobody/nothing'):\n"
        "    try: read_weights(init)\n    except InputError as error: print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | offline, check=True, timeout=120
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("init vit_tiny_patch16_224: timm cannot load these weights")
    assert second.startswith("init hf-hub:nobody/nothing: timm cannot load these weights")


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"embed_dim": 96}, "30 of the encoder's 30"),
        ({"depth": 3}, "12 of the encoder's 42"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_counts(vit: nn.Module, change: dict, count: str):
    weights = Weights("x.pth", dict(vit.state_dict()), None)
    spec = dataclasses.replace(SPEC, args=ARGS | change)
    with pytest.raises(InputError) as caught:
        encoder_with_weights(spec, weights)
    assert f"{count} tensors did not load" in str(caught.value)
    assert "x.pth" in str(caught.value)


def test_grey_weights_do_not_load_into_a_color_encoder():
    weights = Weights("x", dict(random_vit(in_chans=1).state_dict()), None)
    with pytest.raises(
        InputError, match=r"1 of the encoder's 30.*patch_embed.proj.weight is \[48, 1, 8, 8\], not \[48, 3, 8, 8\]"
    ):
        encoder_with_weights(SPEC, weights)


def test_a_missing_tensor_is_named_and_the_model_is_left_as_it_was(vit: nn.Module):
    tensors = {name: x for name, x in vit.state_dict().items() if name != "blocks.1.norm2.bias"}
    model = random_vit()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(InputError, match="blocks.1.norm2.bias is missing"):
        load_weights(model, Weights("x", {name: x + 1 for name, x in tensors.items()}, None))
    assert_same_tensors(dict(model.state_dict()), before)


def test_tensors_of_no_use_are_reported(vit: nn.Module):
    weights = Weights("x", vit.state_dict(), None, unused=("teacher.weight",))
    _, report = encoder_with_weights(SPEC, weights)
    assert report == "x: 30 of 30 encoder tensors loaded; not used: teacher.weight (1)"


@pytest.mark.parametrize("args", [{"init_values": 0.1}, {"pre_norm": True}, {"reg_tokens": 2, "no_embed_class": True}])
def test_tensors_that_the_encoder_lacks_are_not_dropped_without_a_word(args: dict):
    """Layer scales, a norm before the blocks and registers move features; all else of the encoder would load."""
    tensors = {"patch_embed.proj.bias": torch.zeros(48)} | random_vit(**args).state_dict()
    spec = dataclasses.replace(SPEC, args=ARGS | {"no_embed_class": args.get("no_embed_class", False)})
    with pytest.raises(InputError, match=r"tensors? that the encoder lacks \((blocks.0.ls1|norm_pre|reg_token).*args"):
        encoder_with_weights(spec, Weights("x", tensors, None))
    _, report = encoder_with_weights(spec, Weights("x", tensors, None, allow_partial=True))
    assert "not used" in report


@pytest.mark.parametrize("size", [[48, 48], [16, 16], [32, 64], [64, 32], [24, 40]])
@pytest.mark.parametrize("known", [True, False])
def test_positions_are_resized_to_another_image_size(vit: nn.Module, size: list[int], known: bool):
    weights = Weights("x", dict(vit.state_dict()), SPEC if known else None)
    encoder, report = encoder_with_weights(dataclasses.replace(SPEC, args=ARGS | {"img_size": size}), weights)
    grid = [size[0] // 8, size[1] // 8]
    expected = resample_abs_pos_embed(vit.pos_embed, grid, [4, 4], num_prefix_tokens=1)
    assert_same(encoder.timm.pos_embed, expected)
    assert f"to {grid[0]} x {grid[1]} patches" in report
    others = {name: x for name, x in vit.state_dict().items() if name != "pos_embed"}
    assert_same_tensors({k: x for k, x in encoder.timm.state_dict().items() if k != "pos_embed"}, others)


@pytest.mark.parametrize("size", [[32, 32], [64, 64], [48, 24], [64, 32]])
def test_positions_of_a_grid_that_is_not_square_are_resized(size: list[int]):
    wide = random_vit(img_size=[32, 64])
    weights = Weights("x", dict(wide.state_dict()), dataclasses.replace(SPEC, args=ARGS | {"img_size": [32, 64]}))
    encoder, _ = encoder_with_weights(dataclasses.replace(SPEC, args=ARGS | {"img_size": size}), weights)
    expected = resample_abs_pos_embed(wide.pos_embed, [size[0] // 8, size[1] // 8], [4, 8], num_prefix_tokens=1)
    assert_same(encoder.timm.pos_embed, expected)


def test_positions_of_a_grid_that_is_not_square_and_not_known_are_refused():
    weights = Weights("x", dict(random_vit(img_size=[32, 64]).state_dict()), None)
    with pytest.raises(InputError):
        encoder_with_weights(SPEC, weights)


def test_positions_of_a_grid_that_shapes_do_not_tell(tmp_path: Path):
    """4 x 6 patches and a class token; a square that was guessed gives way to the size that is given."""
    wide = random_vit(img_size=[32, 48])
    save_file(wide.state_dict(), tmp_path / "x.safetensors")
    args = {"num_heads": 3, "patch_size": 8}
    encoder, _ = load_encoder(str(tmp_path / "x.safetensors"), img_size=(32, 48), **args)
    x = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(encoder(x), wide.forward_features(x), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="24 patches, which is no square grid"):
        load_encoder(str(tmp_path / "x.safetensors"), **args)

    wide = random_vit(img_size=[32, 72])  # as many as 6 x 6
    save_file(wide.state_dict(), tmp_path / "y.safetensors")
    encoder, _ = load_encoder(str(tmp_path / "y.safetensors"), img_size=(32, 72), **args)
    assert_same(encoder.timm.pos_embed, wide.pos_embed)
    with pytest.raises(InputError, match="positions of 37 patches beside 0 other .* encoder.args.no_embed_class"):
        load_encoder(str(tmp_path / "y.safetensors"), no_embed_class=True, **args)


def test_positions_of_the_same_grid_stay_to_the_bit():
    wide = random_vit(img_size=[32, 64])
    spec = dataclasses.replace(SPEC, args=ARGS | {"img_size": [32, 64]})
    for known in (spec, None):
        encoder, report = encoder_with_weights(spec, Weights("x", dict(wide.state_dict()), known))
        assert_same(encoder.timm.pos_embed, wide.pos_embed)
        assert "resized" not in report


def test_positions_without_a_class_token_row_are_resized():
    bare = random_vit(class_token=False, global_pool="avg", fc_norm=False)
    spec = dataclasses.replace(SPEC, args=ARGS | {"class_token": False, "global_pool": "avg", "fc_norm": False})
    larger = dataclasses.replace(spec, args=spec.args | {"img_size": [48, 40]})
    encoder, _ = encoder_with_weights(larger, Weights("x", dict(bare.state_dict()), spec))
    expected = resample_abs_pos_embed(bare.pos_embed, [6, 5], [4, 4], num_prefix_tokens=0)
    assert_same(encoder.timm.pos_embed, expected)


def test_positions_next_to_registers_are_resized():
    extra = {"reg_tokens": 2, "no_embed_class": True}
    model = random_vit(**extra)
    spec = dataclasses.replace(SPEC, args=ARGS | extra)
    larger = dataclasses.replace(spec, args=spec.args | {"img_size": [48, 40]})
    encoder, _ = encoder_with_weights(larger, Weights("x", dict(model.state_dict()), spec))
    expected = resample_abs_pos_embed(model.pos_embed, [6, 5], [4, 4], num_prefix_tokens=0)
    assert_same(encoder.timm.pos_embed, expected)


def known() -> Weights:
    return Weights("x", {}, SPEC)


def test_what_the_config_leaves_open_comes_from_the_weights():
    assert encoder_spec(EncoderConfig(), DATA, known()) == SPEC
    assert encoder_spec(EncoderConfig(name=NAME), DATA, known()) == SPEC


def test_the_config_wins_over_the_weights():
    data = DataConfig(train="t", mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    spec = encoder_spec(EncoderConfig(img_size=64, args={"depth": 3}), data, known())
    assert spec == ModelSpec(NAME, ARGS | {"img_size": [64, 64], "depth": 3}, (0.5,) * 3, (1.0,) * 3)


def test_another_model_takes_no_arguments_from_the_weights():
    spec = encoder_spec(EncoderConfig(name="vit_small_patch16_224"), DATA, known())
    assert spec.args == {"in_chans": 3}


def test_an_image_size_may_be_given_twice_but_not_differently():
    same = encoder_spec(EncoderConfig(img_size=48), DataConfig(train="t", img_size=(48, 48)), known())
    assert same.args["img_size"] == [48, 48]
    with pytest.raises(InputError, match="encoder.img_size is 48 and data.img_size is 32"):
        encoder_spec(EncoderConfig(img_size=48), DataConfig(train="t", img_size=32), known())


def test_channels_of_data_and_weights_must_agree():
    given = EncoderConfig(args={"in_chans": 3})
    with pytest.raises(InputError, match="takes 3 channels and data.in_chans is 1"):
        encoder_spec(given, DataConfig(train="t", in_chans=1), known())
    grey = Weights("x", {}, dataclasses.replace(SPEC, args=ARGS | {"in_chans": 1}))
    with pytest.raises(InputError, match="takes 1 channels and data.in_chans is 3"):
        encoder_spec(EncoderConfig(), DATA, grey)


def test_weights_of_colors_take_grey_images_as_timm_makes_them(run_dir: Path, vit: nn.Module):
    """A grey image stands for three equal channels, but for the channels' own normalization."""
    encoder, transform = load_encoder(str(run_dir), in_chans=1)
    wanted = timm.models.adapt_input_conv(1, vit.patch_embed.proj.weight)
    assert_same(encoder.timm.patch_embed.proj.weight, wanted)
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(encoder(grey), vit.forward_features(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5)
    assert transform(Image.new("L", (40, 40))).shape == (1, 32, 32)
    weights = read_weights(str(run_dir))
    spec = encoder_spec(EncoderConfig(), DataConfig(train="t", in_chans=1), weights)
    assert spec.args["in_chans"] == 1 and spec.mean == (sum(MEAN) / 3,)
    assert "patch embedding of 3 channels made one of 1" in encoder_with_weights(spec, weights)[1]


def test_means_are_one_value_a_channel():
    grey = encoder_spec(EncoderConfig(name=NAME), DataConfig(train="t", in_chans=1), None)
    assert grey.mean == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    one = encoder_spec(EncoderConfig(name=NAME), DataConfig(train="t", mean=(0.5,), std=(0.25,)), None)
    assert (one.mean, one.std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(InputError, match="2 values for 3 channels"):
        encoder_spec(EncoderConfig(name=NAME), DataConfig(train="t", mean=(0.5, 0.5)), None)


def test_an_encoder_without_name_or_weights_is_refused():
    with pytest.raises(InputError, match="encoder.name"):
        encoder_spec(EncoderConfig(), DATA, None)


def test_without_weights_the_encoder_has_maes_initial_ones():
    encoder, report = encoder_with_weights(SPEC, None)
    assert "initial weights" in report
    assert torch.equal(encoder.timm.blocks[0].attn.qkv.bias, torch.zeros(144))
    assert torch.equal(encoder.timm.pos_embed[0, 0], torch.zeros(48))
    bound = (6 / (48 + 144)) ** 0.5
    assert 0.95 * bound < float(encoder.timm.blocks[0].attn.qkv.weight.detach().abs().max()) <= bound


def test_weights_of_a_deeper_model_are_refused():
    spec = ModelSpec("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, (0.5,) * 3, (0.5,) * 3)
    deeper, _ = encoder_with_weights(spec, None)
    shallower = ModelSpec(spec.name, spec.args | {"depth": 1}, spec.mean, spec.std)
    with pytest.raises(InputError, match=r"12 tensors that the encoder lacks \(blocks.1.attn.*encoder.args"):
        encoder_with_weights(shallower, Weights("deeper", dict(deeper.timm.state_dict()), spec))


@pytest.mark.parametrize("key", ["pretrained", "num_classes", "global_pool"])
def test_arguments_that_are_not_an_encoders_are_refused(key):
    config = EncoderConfig(name="vit_tiny_patch16_224", args={key: 1})
    with pytest.raises(InputError, match=f"encoder.args.{key}: .*(--init|fine-tuning takes)"):
        encoder_spec(config, DataConfig(train="x.tar"), None)
