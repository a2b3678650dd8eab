"""launch/convert.py: released weights to a file that timm and every stage load, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_kinds import (
    SWIN,
    SWIN_NAME,
    V2_NAME,
    VIT,
    VIT_NAME,
    green,
    in_maes_layout,
    in_swins_layout,
    mae,
    saved,
    shaken,
)
from torchvision.transforms import v2

from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.convert import convert
from quarterlight.ssl.convert_config import ConvertConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec, export_weights
from quarterlight.ssl.released import encoder_with_weights, load_encoder
from quarterlight.ssl.spec import encoder_spec
from quarterlight.ssl.weights import read_weights


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def loaded_by_timm(path: Path) -> Any:
    """Returns timm's model of a file by its metadata alone; nothing of this project takes part."""
    said = metadata(path)
    model = timm.create_model(said["architecture"], **({"num_classes": 0} | json.loads(said["timm_args"])))
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def test_an_encoder_and_its_report(tmp_path, capsys):
    model = mae()
    out = tmp_path / "folder" / "x.safetensors"
    convert(saved(tmp_path / "x.pth", {"model": in_maes_layout(model)}), str(out), ConvertConfig())
    said = capsys.readouterr().out
    assert "x.pth (MAE with its decoder, vit_base_patch16_224): 30 of 30 encoder tensors loaded; 1 attention" in said
    assert "heads by convention (64 wide)" in said and "a decoder of 32 tensors beside it" in said
    assert metadata(out)["source_kind"] == "mae-full" and json.loads(metadata(out)["mean"])[0] == 0.485
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded_by_timm(out).forward_features(x), model.encoder.timm.forward_features(x))
    assert read_weights(str(out)).kind == "quarterlight"


@pytest.mark.parametrize("name", [VIT_NAME, SWIN_NAME])
def test_a_classifier_keeps_its_head_or_loses_it(tmp_path, name):
    args = VIT | {"global_pool": "avg"} if name == VIT_NAME else SWIN
    model = shaken(timm.create_model(name, num_classes=6, **args))
    tensors = model.state_dict() if name == VIT_NAME else in_swins_layout(model)
    source, x = saved(tmp_path / "x.pth", {"model": tensors}), torch.randn(2, 3, *model.patch_embed.img_size)
    convert(source, str(tmp_path / "whole.safetensors"), ConvertConfig())
    assert torch.equal(loaded_by_timm(tmp_path / "whole.safetensors")(x), model(x))
    convert(source, str(tmp_path / "headless.safetensors"), ConvertConfig(head=False, mean=(0.5,) * 3))
    headless = loaded_by_timm(tmp_path / "headless.safetensors")
    assert torch.equal(headless.forward_features(x), model.forward_features(x))
    assert json.loads(metadata(tmp_path / "headless.safetensors")["mean"]) == [0.5] * 3


def test_windows_follow_by_the_same_rule_with_a_head_and_without(tmp_path):
    """A Swin trained with labels stays one when its head is left away; one of SimMIM or of a run here does not."""
    model = shaken(timm.create_model(SWIN_NAME, num_classes=6, **SWIN))
    source = saved(tmp_path / "x.pth", {"model": in_swins_layout(model)})
    for head in (True, False):
        convert(source, str(tmp_path / f"{head}.safetensors"), ConvertConfig(head=head))
    convert(str(tmp_path / "False.safetensors"), str(tmp_path / "again.safetensors"), ConvertConfig())
    spec = ModelSpec(SWIN_NAME, SWIN, (0.5,) * 3, (0.5,) * 3)
    model.reset_classifier(0)
    export_weights(tmp_path / "run.safetensors", model, spec, {"stage": "pretraining"})
    for name, rule in {"True": "bicubic", "False": "bicubic", "again": "bicubic", "run": "geometric"}.items():
        weights = read_weights(str(tmp_path / f"{name}.safetensors"))
        wider = encoder_spec(EncoderConfig(args={"window_size": 2}), DataConfig(train=""), weights)
        assert f"tables of relative positions resized ({rule})" in encoder_with_weights(wider, weights)[1]


def test_a_green_mim_file_needs_an_order(tmp_path):
    swin = shaken(timm.create_model(SWIN_NAME, num_classes=0, **SWIN))
    source, out = saved(tmp_path / "x.pth", {"model": green(mae(), swin)}), tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="x.pth: is GreenMIM's, .* --merge_order greenmim2022"):
        convert(source, str(out), ConvertConfig())
    convert(source, str(out), ConvertConfig(merge_order="swin"))
    x = torch.randn(2, 3, 128, 128)
    assert torch.equal(loaded_by_timm(out).forward_features(x), swin.forward_features(x))


def test_a_swin_v2_that_was_trained_with_other_windows_is_read_back(tmp_path):
    """Its windows before go into the file, which `--init` takes."""
    args = SWIN | {"pretrained_window_sizes": (8, 8, 8, 4)}
    model = shaken(timm.create_model(V2_NAME, num_classes=0, **args))
    out = tmp_path / "x.safetensors"
    convert(saved(tmp_path / "x.pth", {"model": in_swins_layout(model)}), str(out), ConvertConfig())
    assert read_weights(str(out)).spec.args["pretrained_window_sizes"] == [8, 8, 8, 0]  # the last has 4 still
    encoder, _ = load_encoder(str(out))
    x = torch.randn(2, 3, 128, 128)
    torch.testing.assert_close(encoder.timm.forward_features(x), model.forward_features(x), rtol=0, atol=1e-5)
    for windows in ("/etc/passwd", ["x"], [[1, 2, 3]], [True]):
        spec = ModelSpec(V2_NAME, {"pretrained_window_sizes": windows}, (0.5,) * 3, (0.5,) * 3)
        export_weights(tmp_path / "odd.safetensors", model, spec, {})
        with pytest.raises(InputError, match="pretrained_window_sizes are no list of windows"):
            read_weights(str(tmp_path / "odd.safetensors"))


def test_the_command_refuses_a_file_cut_short_in_one_sentence(tmp_path):
    save_file(timm.create_model(VIT_NAME, num_classes=0, **VIT).state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-500])
    words = [sys.executable, ROOT / "launch" / "convert.py", tmp_path / "cut.safetensors", tmp_path / "y.safetensors"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "y.safetensors").exists()
    assert done.stderr.startswith(f"error: init {tmp_path}/cut.safetensors: not a readable safetensors file (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("init", "out", "said"),
    [
        ("x.safetensors", "y.pth", "out .*y.pth does not end in .safetensors"),
        ("x.safetensors", "there.safetensors", "out .*there.safetensors exists: give another name"),
        ("nothing.pth", "y.safetensors", "nothing.pth: no such file or folder"),
        ("narrow.safetensors", "y.safetensors", "how many attention heads it has .*width 48, 2 blocks"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, init, out, said):
    save_file(timm.create_model(VIT_NAME, num_classes=0, **VIT).state_dict(), tmp_path / "x.safetensors")
    narrow = VIT | {"embed_dim": 48, "num_heads": 3}
    save_file(timm.create_model(VIT_NAME, num_classes=0, **narrow).state_dict(), tmp_path / "narrow.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match=said) as caught:
        convert(str(tmp_path / init), str(tmp_path / out), ConvertConfig())
    assert "\n" not in str(caught.value)
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious" and not (tmp_path / "y.safetensors").exists()
    args = EncoderConfig(args={"num_heads": 3})
    convert(str(tmp_path / "narrow.safetensors"), str(tmp_path / "z.safetensors"), ConvertConfig(encoder=args))


def test_the_transform_is_torchvisions_evaluation(tmp_path):
    source = saved(tmp_path / "x.pth", mae().encoder.timm.state_dict())
    _, transform = load_encoder(source, img_size=64)
    picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGBA")
    steps = [v2.Resize(73, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64), v2.PILToTensor()]
    pixels = v2.Compose(steps)(picture.convert("RGB")).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(transform(picture), (pixels - mean) / std, rtol=0, atol=1e-5)
    assert transform(picture.convert("L")).shape == (3, 64, 64)


def test_a_grey_encoder_takes_grey_images(tmp_path):
    source = saved(tmp_path / "x.pth", mae(in_chans=1).encoder.timm.state_dict())
    encoder, transform = load_encoder(source)
    image = transform(Image.new("RGB", (40, 40)))
    assert image.shape == (1, 32, 32) and encoder(image[None]).shape == (1, 17, 64)
