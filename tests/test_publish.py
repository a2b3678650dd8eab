"""launch/export.py: what it writes, read by the libraries it is for; and onto a stand-in for the Hugging Face Hub."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from conftest import ROOT, TINY_PRETRAIN, arguments, command
from hub_server import TOKEN, HubServer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from quarterlight.finetune.publish import publish
from quarterlight.ssl import graphs
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.config import DecoderConfig, EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import CLASSIFIER_FILE, ENCODER_FILE, ModelSpec, export_weights
from quarterlight.ssl.export_config import ExportConfig
from quarterlight.ssl.layouts import HF_SWIN, HF_SWIN_V2, HF_VIT, HF_VIT_MAE, MAE, Layout
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.masking import random_masking
from quarterlight.ssl.plain_vit import mae_tensors
from quarterlight.ssl.released import load_autoencoder, load_encoder, read_weights
from quarterlight.ssl.write_transformers import hf_autoencoder, hf_model, image_processor

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32}
SWIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "img_size": 64, "window_size": 2}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
NAME = "vit_tiny_patch16_224"
DECODER = DecoderConfig(embed_dim=16, depth=1, num_heads=2)
MEAN, STD = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)


def shaken(model: Any) -> Any:
    """Returns the model with random weights everywhere, biases and norms included, for evaluation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def encoder(name: str = NAME, **args: Any) -> Any:
    return shaken(build_encoder(name, **(SWIN if name in (V1, V2) else SMALL) | args).timm)


def classifier(name: str = NAME, **args: Any) -> Any:
    return shaken(timm.create_model(name, num_classes=5, **(SWIN if name in (V1, V2) else SMALL) | args))


def file_of(path: Path, model: Any, name: str, **args: Any) -> str:
    """Writes a model as a run does and returns the file's name."""
    spec = ModelSpec(name, {"in_chans": 3} | args, MEAN, STD)
    export_weights(path, model, spec, {"stage": "pretraining", "step": 3})
    return str(path)


def noise(model: Any, count: int = 3) -> Tensor:
    embed = (model.encoder.timm if isinstance(model, MaskedAutoencoder) else model).patch_embed
    shape = (count, embed.proj.in_channels, *embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Returns a file of ours and the encoder in it."""
    model = encoder()
    return file_of(tmp_path_factory.mktemp("vit") / ENCODER_FILE, model, NAME, **SMALL), model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: tuple[str, str]) -> Path:
    """Returns the folder of a real pretraining run."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    options = TINY_PRETRAIN | {"steps": "2", "data.train": shards[0], "data.val": shards[1], "run_dir": str(folder)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command("pretrain.py", options), check=True, capture_output=True, env=environment, timeout=300)
    return folder


def from_pretrained(folder: Path, **more: Any) -> Any:
    """Returns the model that config.json names, after a look that nothing is missing and nothing left over."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **more)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


# transformers


def test_hugging_face_gives_our_loss_for_the_autoencoder_of_a_run(run: Path, tmp_path: Path):
    measured = publish(str(run), str(tmp_path / "hf"), ExportConfig(to="transformers", part="autoencoder"))
    assert measured["difference"] is not None and measured["difference"] < 1e-5
    theirs = from_pretrained(tmp_path / "hf")
    assert theirs.config.norm_pix_loss and theirs.config.mask_ratio == 0.75
    ours = build_autoencoder(
        NAME, img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2,
        decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2),
    ).eval()  # fmt: skip
    state = load_file(next(run.glob("state/step-*/model.safetensors")))
    ours.load_state_dict({name.removeprefix("autoencoder."): x for name, x in state.items()}, strict=True)
    images, places = noise(ours), torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    result = ours(images, random_masking(3, 16, 0.75, noise=places))
    wanted = theirs(images, noise=places)
    torch.testing.assert_close(result.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.prediction, wanted.logits, rtol=1e-5, atol=1e-5)
    back = HF_VIT_MAE.to_ours(load_file(tmp_path / "hf" / "model.safetensors"))
    assert torch.equal(back.pop("decoder.pos_embed"), ours.decoder.pos_embed)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], x) for name, x in ours.state_dict().items())


def test_a_file_of_a_state_is_read_with_what_its_run_says(run: Path, tmp_path: Path):
    path = next(run.glob("state/step-*/model.safetensors"))
    autoencoder = load_autoencoder(str(path))
    assert autoencoder.encoder.timm.blocks[0].attn.num_heads == autoencoder.decoder.blocks[0].attn.num_heads == 2
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    moved = read_weights(str(tmp_path / "model.safetensors"))
    assert "give the run's folder" in " ".join(moved.decoder.notes) and moved.spec.args["num_heads"] is None


FITTING = {
    "vit": encoder,
    "grey vit": lambda: encoder(in_chans=1),
    "vit not square": lambda: encoder(img_size=(32, 48)),
    "vit without qkv bias": lambda: encoder(qkv_bias=False),
    "vit with quick gelu": lambda: encoder(act_layer="quick_gelu"),
    "swin": lambda: encoder(V1),
    "swin not square": lambda: encoder(V1, img_size=(64, 128)),
    "swin with maps of one window": lambda: encoder(V1, img_size=224, window_size=7),
    "swinv2": lambda: encoder(V2),
    "swinv2 with small maps": lambda: encoder(V2, window_size=4),
    "swinv2 with other windows before": lambda: encoder(V2, pretrained_window_sizes=(4, 4, 4, 2)),
    "class token": lambda: classifier(global_pool="token"),
    "mean of patches": lambda: classifier(global_pool="avg"),
    "swin classifier": lambda: classifier(V1),
    "swinv2 classifier": lambda: classifier(V2),
    "autoencoder": lambda: shaken(build_autoencoder(NAME, decoder=DECODER, target="pixels", **SMALL)),
}
KINDS = {
    "class token": "ViTForImageClassification",
    "mean of patches": "BeitForImageClassification",
    "swin classifier": "SwinForImageClassification",
    "swinv2 classifier": "Swinv2ForImageClassification",
    "autoencoder": "ViTMAEForPreTraining",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
}


@pytest.mark.parametrize("case", FITTING)
def test_transformers_computes_the_same(case: str, tmp_path: Path):
    from quarterlight.ssl.write_transformers import write_folder

    model = FITTING[case]()
    made = hf_autoencoder(model, 0.75) if isinstance(model, MaskedAutoencoder) else hf_model(model)
    images = noise(model)
    values = images.shape[1]
    write_folder(tmp_path, made, ModelSpec(NAME, {}, (0.5,) * values, (0.5,) * values), 0.875)
    assert made.config["architectures"] == [KINDS.get(case) or KINDS.get(case.split()[0], "ViTModel")]
    more = {"add_pooling_layer": False} if made.config["architectures"][0].endswith("Model") else {}
    theirs = from_pretrained(tmp_path, **more)
    with torch.no_grad():
        if isinstance(model, MaskedAutoencoder):
            places = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
            ours, found = (
                model(images, random_masking(3, 16, 0.75, noise=places)).loss,
                theirs(images, noise=places).loss,
            )
        elif model.num_classes:
            ours, found = model(images), theirs(images).logits
        else:
            tokens = model.forward_features(images)
            ours = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
            found = theirs(images).last_hidden_state
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max().clamp_min(1)))


def test_a_folder_for_transformers_whose_images_are_not_square_is_read_back(tmp_path: Path):
    model = encoder(img_size=(32, 48))  # 4 x 6 patches and a class token, as many as 5 x 5
    source = file_of(tmp_path / ENCODER_FILE, model, NAME, **SMALL | {"img_size": [32, 48]})
    publish(source, str(tmp_path / "hf"), ExportConfig(to="transformers"))
    loaded, _ = load_encoder(str(tmp_path / "hf"))
    images = noise(model)
    torch.testing.assert_close(loaded(images), model.forward_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "layout"), [(NAME, HF_VIT), (V1, HF_SWIN), (V2, HF_SWIN_V2)])
def test_what_transformers_writes_of_it_is_bit_for_bit_ours(name: str, layout: Layout, tmp_path: Path):
    from quarterlight.ssl.write_transformers import write_folder

    model = encoder(name)
    write_folder(tmp_path / ".", hf_model(model), ModelSpec(name, {}, MEAN, STD), 0.875)
    from_pretrained(tmp_path, add_pooling_layer=False).save_pretrained(tmp_path / "theirs")
    back = layout.to_ours(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: encoder(reg_tokens=2), "has register tokens"),
        (lambda: encoder(class_token=False, global_pool="avg"), "has no class token"),
        (lambda: encoder(pos_embed="none"), "has no absolute positions"),
        (lambda: encoder(no_embed_class=True), "no position"),
        (lambda: encoder(init_values=0.1), "scales its layers"),
        (lambda: encoder(qk_norm=True), "normalizes queries and keys"),
        (lambda: encoder(pre_norm=True), "a norm before its blocks"),
        (lambda: encoder(act_layer="relu"), "its activation is ReLU"),
        (lambda: encoder(global_pool="avg"), "has a final norm and this encoder has none"),
        (lambda: encoder("vit_small_patch16_rope_224"), "has rotary positions"),
        (lambda: build_encoder("vit_tiny_r_s16_p8_224", img_size=64).timm, "has a convolutional stem"),
        (lambda: encoder(V1, window_size=4), "windows of one size, and this one has 4 and 2"),
        (lambda: classifier(global_pool="avg", fc_norm=False), "no such classifier"),
        (lambda: classifier(global_pool="avg", img_size=(32, 48)), "square images only"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, qkv_bias=False, **SMALL), "with biases"),
        (lambda: build_autoencoder(NAME, decoder=replace(DECODER, name="cross"), **SMALL), "another kind"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, encode_masked=True, **SMALL), "mask tokens in the encoder"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, target="hog", **SMALL), "a target other than"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, **SMALL | {"img_size": (32, 48)}), "not square"),
        (lambda: build_autoencoder(V1, decoder=DECODER, **SWIN), "is a Swin"),
    ],
)
def test_what_transformers_has_no_model_for_is_refused_with_the_reason(build: Any, reason: str):
    with pytest.raises(InputError, match=f"transformers.*{reason}.*use --"):
        model = build()
        _ = hf_autoencoder(model, 0.75) if isinstance(model, MaskedAutoencoder) else hf_model(model)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (40, 40)])
def test_their_processor_crops_as_our_evaluation_does(size: tuple[int, int], tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    image.save(tmp_path / "image.png")
    config = image_processor(ModelSpec(NAME, {}, MEAN, STD), (32, 32), 0.875)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    crop = CenterCrop((32, 32), 0.875).of_small(torch.from_numpy(np.asarray(image).copy())[None], np.zeros((1, 0)))[0]
    wanted = (crop.permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert found.shape == (3, 32, 32)
    levels = (found - wanted).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.max() < 2.5 and levels.mean() < 0.5  # of 255


def test_class_names_go_into_config_json():
    config = hf_model(classifier(), labels=["ant", "bee", "cat", "dog", "elk"]).config
    assert config["id2label"][4] == "elk" and config["label2id"]["ant"] == 0


# MAE's files

MAES_KEYS = {
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
    "mask_token", "decoder_embed.weight", "decoder_embed.bias", "decoder_pos_embed", "decoder_norm.weight",
    "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias",
}  # fmt: skip
IN_BLOCK = {
    f"{x}.{y}" for x in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for y in ("weight", "bias")
}


def test_maes_file_of_a_run_has_maes_keys_and_comes_back_bit_for_bit(run: Path, tmp_path: Path):
    publish(str(run), str(tmp_path / "full.pth"), ExportConfig(to="mae", part="autoencoder"))
    content = torch.load(tmp_path / "full.pth", weights_only=True)
    assert content.keys() == {"model"}
    found = content["model"]
    blocks = {f"blocks.{i}.{x}" for i in range(2) for x in IN_BLOCK} | {f"decoder_blocks.0.{x}" for x in IN_BLOCK}
    assert found.keys() == MAES_KEYS | blocks
    assert found["decoder_pred.weight"].shape == (4 * 4 * 3, 16) and found["decoder_pos_embed"].shape == (1, 17, 16)
    back, ours = read_weights(str(tmp_path / "full.pth")), read_weights(str(run))
    assert back.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(back.tensors[name], x) for name, x in ours.tensors.items())
    state = load_file(next(run.glob("state/step-*/model.safetensors")))
    whole = MAE.to_ours(found)
    del whole["decoder.pos_embed"]  # ours is computed
    assert {f"autoencoder.{name}" for name in whole} == state.keys()
    assert all(torch.equal(state[f"autoencoder.{name}"], x) for name, x in whole.items())


def test_maes_encoders_and_classifiers_are_timms(vit: tuple[str, Any], tmp_path: Path):
    publish(vit[0], str(tmp_path / "encoder.pth"), ExportConfig(to="mae"))
    plain = timm.create_model(NAME, num_classes=0, **SMALL).eval()
    plain.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True)["model"], strict=True)
    assert torch.equal(plain(noise(plain)), vit[1](noise(plain)))
    assert {"fc_norm.weight", "head.weight"} < mae_tensors(classifier(global_pool="avg")).keys()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: encoder(V1), "is a Swin"),
        (lambda: encoder(reg_tokens=1), "register tokens"),
        (lambda: encoder(img_size=(32, 48)), "not square"),
        (lambda: encoder(qkv_bias=False), "without bias"),
        (lambda: encoder(act_layer="quick_gelu"), "the activation QuickGELU"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, in_chans=1, **SMALL), "decoders of color images only"),
        (lambda: build_autoencoder(NAME, decoder=DECODER, target="pca", pca_components=8, **SMALL), "a target other"),
    ],
)
def test_what_maes_code_cannot_build_is_refused_with_the_reason(build: Any, reason: str):
    with pytest.raises(InputError, match=f"facebookresearch/mae.*{reason}.*|{reason}.*use --"):
        mae_tensors(build())


# timm


def test_a_folder_for_timm_is_read_by_timm_and_by_transformers(vit: tuple[str, Any], tmp_path: Path):
    publish(vit[0], str(tmp_path / "hub"), ExportConfig(to="timm", crop_pct=0.5))
    images = noise(vit[1])
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(loaded(images), vit[1](images))
    assert timm.data.resolve_model_data_config(loaded)["crop_pct"] == 0.5
    assert all(
        torch.equal(x, vit[1].state_dict()[name]) for name, x in read_weights(str(tmp_path / "hub")).tensors.items()
    )
    wrapper = transformers.AutoModel.from_pretrained(tmp_path / "hub").eval()
    assert type(wrapper).__name__ == "TimmWrapperModel"
    torch.testing.assert_close(wrapper(images).last_hidden_state, vit[1].forward_features(images))


def test_a_folder_that_timm_cannot_load_does_not_stay(vit: tuple[str, Any], tmp_path: Path, monkeypatch: Any):
    create = timm.create_model

    def refuse(name: str, **more: Any) -> Any:
        if name.startswith("local-dir:"):
            raise RuntimeError("no network")
        return create(name, **more)

    monkeypatch.setattr("quarterlight.finetune.publish.timm.create_model", refuse)
    with pytest.raises(InputError, match=r"timm cannot load what was written \(.*\): nothing stays; a single file"):
        publish(vit[0], str(tmp_path / "hub"), ExportConfig(to="timm"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hub", "x.safetensors"])
def test_what_timm_computes_otherwise_is_never_there(name: str, vit: tuple[str, Any], tmp_path: Path, monkeypatch: Any):
    def far(*_: Any) -> float:
        assert not (tmp_path / name).exists()  # only under another name so far
        return 2e-4

    monkeypatch.setattr("quarterlight.finetune.publish._difference", far)
    with pytest.raises(InputError, match="timm's VisionTransformer differs by 2.0e-04 of the largest output"):
        publish(vit[0], str(tmp_path / name), ExportConfig(to="timm"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_the_bytes_and_what_they_cost(half: Any, vit: tuple[str, Any], tmp_path: Path, capsys: Any):
    measured = publish(vit[0], str(tmp_path / "half.safetensors"), ExportConfig(to="timm", half=half))
    found = load_file(tmp_path / "half.safetensors")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    assert all(torch.equal(found[name], x.to(dtype)) for name, x in vit[1].state_dict().items())
    rounded = copy.deepcopy(vit[1])
    rounded.load_state_dict({name: x.to(dtype).float() for name, x in vit[1].state_dict().items()})
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, moved = vit[1].forward_features(images), rounded.forward_features(images)
    assert measured["half_error"] == pytest.approx(float((moved - wanted).norm() / wanted.norm()), rel=1e-3)
    assert f"{half}: outputs move by" in capsys.readouterr().out
    with safe_open(tmp_path / "half.safetensors", framework="pt") as file:
        assert file.metadata()["weights"] == half and file.metadata()["step"] == "3"
    publish(str(tmp_path / "half.safetensors"), str(tmp_path / "again.safetensors"), ExportConfig(to="timm"))
    with torch.no_grad():
        torch.testing.assert_close(
            timm.create_model(f"local-dir:{_hub(tmp_path)}", pretrained=True).eval().forward_features(images), moved
        )


def _hub(folder: Path) -> Path:
    publish(str(folder / "half.safetensors"), str(folder / "hub"), ExportConfig(to="timm"))
    return folder / "hub"


def test_half_weights_of_transformers_are_loaded_as_such(vit: tuple[str, Any], tmp_path: Path):
    publish(vit[0], str(tmp_path / "hf"), ExportConfig(to="transformers", half="bf16"))
    assert from_pretrained(tmp_path / "hf", add_pooling_layer=False).dtype == torch.bfloat16


def test_weights_beyond_fp16_are_refused(tmp_path: Path):
    model = encoder()
    with torch.no_grad():
        model.norm.bias[0] = 1e5
    source = file_of(tmp_path / ENCODER_FILE, model, NAME, **SMALL)
    with pytest.raises(InputError, match=r"norm.bias holds 1e\+05, and fp16 ends at 65504: use bf16"):
        publish(source, str(tmp_path / "half"), ExportConfig(to="timm", half="fp16"))


def test_another_image_size_resizes_positions(vit: tuple[str, Any], tmp_path: Path):
    publish(vit[0], str(tmp_path / "large"), ExportConfig(to="timm", encoder=EncoderConfig(img_size=64)))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'large'}", pretrained=True)
    assert loaded.pos_embed.shape == (1, 65, 24) and loaded.pretrained_cfg["input_size"] == (3, 64, 64)


# graphs


@pytest.mark.parametrize("case", ["vit", "swin classifier"])
def test_onnx_and_torch_programs_compute_the_same_for_any_number_of_images(case: str, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    name, args = (NAME, SMALL) if case == "vit" else (V1, SWIN | {"num_classes": 5})
    model = FITTING[case]()
    file = ENCODER_FILE if case == "vit" else CLASSIFIER_FILE
    source = file_of(tmp_path / file, model, name, **json.loads(json.dumps(args)))
    for to, suffix, bound in (("onnx", ".onnx", 1e-4), ("torch", ".pt2", 1e-5)):
        measured = publish(source, str(tmp_path / f"model{suffix}"), ExportConfig(to=to))  # type: ignore[arg-type]
        assert measured["difference"] is not None and measured["difference"] < bound
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, *model.patch_embed.img_size]
    assert json.loads(session.get_modelmeta().custom_metadata_map["mean"]) == list(MEAN)
    told = {graphs.FACTS: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=told).module()
    assert json.loads(told[graphs.FACTS])["architecture"] == name
    for count in (1, 3, 7):
        images = noise(model, count)
        with torch.no_grad():
            tokens = model.forward_features(images)
            wanted = [model(images)] if model.num_classes else [tokens, model.forward_head(tokens)]
            for found, right in zip(program(images), wanted, strict=True):
                torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
        for found, right in zip(session.run(None, {"images": images.numpy()}), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), right, rtol=1e-4, atol=1e-4)


def test_a_graph_in_bf16_computes_in_bf16(vit: tuple[str, Any], tmp_path: Path):
    measured = publish(vit[0], str(tmp_path / "model.pt2"), ExportConfig(to="torch", half="bf16"))
    assert measured["half_error"] is not None and 0 < measured["half_error"] < 0.1
    program = torch.export.load(tmp_path / "model.pt2").module()
    tokens, features = program(noise(vit[1], 2).bfloat16())
    assert tokens.dtype == features.dtype == torch.bfloat16


# the command


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"to": "timm"}, "here", "here exists: give another name"),
    ({"to": "onnx"}, "model", r"--to onnx writes one file: give a name that ends in \.onnx"),
    ({"to": "mae"}, "model.bin", r"give a name that ends in \.pth"),
    ({"to": "transformers"}, "model.safetensors", r"writes a folder: give a name without \.safetensors"),
    ({"to": "timm"}, "model.pth", r"writes a folder: give a name without \.pth"),
    ({"to": "mae", "part": "autoencoder"}, "a.pth", "is no run folder; the decoder is in the states"),
    ({"to": "timm", "part": "classifier"}, "a", "holds no classification head"),
    ({"to": "timm", "push": "nobody"}, "a", "push is nobody: it must be OWNER/NAME"),
    ({"to": "timm", "push": "some/one"}, "a", "push some/one: no Hugging Face token is set"),
    ({"to": "onnx", "half": "bf16"}, "a.onnx", "use fp16"),
]


@pytest.mark.parametrize(("options", "out", "message"), WRONG)
def test_mistakes_are_refused_and_nothing_is_written(
    options: dict[str, Any], out: str, message: str, vit: tuple[str, Any], tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)  # whoever runs the tests may have one
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=message):
        publish(vit[0], str(tmp_path / out), ExportConfig(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_missing_runs_packages_and_decoders_are_named(run: Path, tmp_path: Path, monkeypatch: Any):
    with pytest.raises(InputError, match="init nowhere: no such file or folder"):
        publish("nowhere", str(tmp_path / "a"), ExportConfig(to="timm"))
    with pytest.raises(InputError, match="--to onnx takes no decoder"):
        publish(str(run), str(tmp_path / "a.onnx"), ExportConfig(to="onnx", part="autoencoder"))
    with pytest.raises(InputError, match=r"leave --encoder\.\* away"):
        config = ExportConfig(to="mae", part="autoencoder", encoder=EncoderConfig(img_size=32))
        publish(str(run), str(tmp_path / "a.pth"), config)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (ENCODER_FILE, "config.yaml"):
        (bare / name).write_bytes((run / name).read_bytes())
    with pytest.raises(InputError, match="has no whole state, where the decoder would be; use --part encoder"):
        publish(str(bare), str(tmp_path / "a.pth"), ExportConfig(to="mae", part="autoencoder"))
    (bare / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match="is no pretraining run"):
        publish(str(bare), str(tmp_path / "a.pth"), ExportConfig(to="mae", part="autoencoder"))
    monkeypatch.setattr(graphs, "ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'quarterlight\[onnx\]'"):
        publish(str(run), str(tmp_path / "a.onnx"), ExportConfig(to="onnx"))


def test_the_card_tells_data_recipe_and_figures_and_no_license(
    run: Path, tmp_path: Path, shards: tuple[str, str], monkeypatch: Any
):
    publish(str(run), str(tmp_path / "hf"), ExportConfig(to="transformers"))
    card = (tmp_path / "hf" / "README.md").read_text()
    header = card.split("---")[1]
    assert "license" not in header and "library_name: transformers" in header
    for text in ("- train: train-*.tar", "- 60 training images", "mask_ratio | 0.75", "ViTModel", "base_lr: 0.01"):
        assert text in card
    assert "| loss |" in card and "add_pooling_layer=False" in card
    assert str(run.parent) not in card and str(Path(shards[0]).parent) not in card
    snippet = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "hf")
    loaded: dict[str, Any] = {}
    exec(snippet, loaded)
    assert type(loaded["model"]).__name__ == "ViTModel" and loaded["processor"].crop_size["height"] == 16


LOAD = """
import sys, timm, torch
model = timm.create_model("hf-hub:some/one", pretrained=True).eval()
torch.save(model.state_dict(), sys.argv[1])
"""


def test_pushed_weights_come_back_from_the_hub(run: Path, tmp_path: Path):
    hub = HubServer()
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",  # the stand-in takes Git LFS only
    }  # fmt: skip

    def python(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)

    script = str(ROOT / "launch" / "export.py")
    try:
        options = arguments({"to": "timm", "push": "some/one", "private": "true"})
        done = python(script, str(run), str(tmp_path / "hub"), *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"pushed: {hub.url}/some/one" in done.stdout
        assert hub.private == {"some/one": True}
        assert hub.files["some/one"].keys() == {"config.json", "model.safetensors", "README.md"}
        assert b"hf-hub:some/one" in hub.files["some/one"]["README.md"]
        done = python("-c", LOAD, str(tmp_path / "back.pt"))
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        hub.close()
    back, ours = torch.load(tmp_path / "back.pt"), load_file(run / ENCODER_FILE)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], x) for name, x in ours.items())
    done = python(script, str(run), "x", "--to", "tensorflow")
    assert done.returncode == 2 and "error: to is tensorflow: it must be one of" in done.stderr


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own uploads
def test_a_single_file_is_pushed_with_a_card_and_a_refusal_loses_nothing(
    vit: tuple[str, Any], tmp_path: Path, monkeypatch: Any
):
    hub = HubServer()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        publish(vit[0], str(tmp_path / "mae.pth"), ExportConfig(to="mae", push="some/other"))
        assert hub.files["some/other"]["mae.pth"] == (tmp_path / "mae.pth").read_bytes()
        assert b'torch.load("mae.pth"' in hub.files["some/other"]["README.md"]
        assert hub.private == {"some/other": False}
        hub.refuse = True
        with pytest.raises(
            InputError, match="push some/other: the Hub did not take it .*what was written here is whole"
        ):
            publish(vit[0], str(tmp_path / "again.pth"), ExportConfig(to="mae", push="some/other"))
        assert (tmp_path / "again.pth").is_file()
    finally:
        hub.close()
    with pytest.raises(InputError, match="the Hub did not take it"):  # nobody answers any more
        publish(vit[0], str(tmp_path / "third.pth"), ExportConfig(to="mae", push="some/other"))
