"""Folders of transformers load as they are, and compute what transformers computes."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2ForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from quarterlight.ssl import read_transformers
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.masking import random_masking
from quarterlight.ssl.released import load_autoencoder, load_encoder
from quarterlight.ssl.renaming import BUFFERS
from quarterlight.ssl.weights import read_weights

VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
VIT |= {"intermediate_size": 72, "layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 20, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 5}
DECODER |= {"decoder_intermediate_size": 80}
SWIN = {"image_size": 128, "window_size": 4, "embed_dim": 12, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 3, 4]}
SWIN |= {"encoder_stride": 32, "drop_path_rate": 0.0}
DINO = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
MODELS = {
    "ViTModel": (ViTModel, ViTConfig(**VIT), "hf-vit"),
    "ViTModel, 64 wide": (ViTModel, ViTConfig(**VIT | {"hidden_size": 64, "num_attention_heads": 8}), "hf-vit"),
    "ViTModel, eps by default": (ViTModel, ViTConfig(**VIT | {"layer_norm_eps": 1e-12}), "hf-vit"),
    "ViTForImageClassification": (ViTForImageClassification, ViTConfig(**VIT, num_labels=5), "hf-vit"),
    "ViTForMaskedImageModeling": (ViTForMaskedImageModeling, ViTConfig(**VIT, encoder_stride=8), "hf-simmim"),
    "ViTMAE": (ViTMAEForPreTraining, ViTMAEConfig(**VIT, **DECODER), "hf-vit-mae"),
    "Dinov2": (Dinov2Model, Dinov2Config(**DINO, layerscale_value=0.5), "hf-dinov2"),
    "Dinov2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**DINO), "hf-dinov2"),
    "SwinModel": (SwinModel, SwinConfig(**SWIN), "hf-swin"),
    "SwinForImageClassification": (SwinForImageClassification, SwinConfig(**SWIN, num_labels=5), "hf-swin"),
    "SwinForMaskedImageModeling": (SwinForMaskedImageModeling, SwinConfig(**SWIN), "hf-simmim"),
    "Swinv2": (Swinv2ForImageClassification, Swinv2Config(**SWIN, num_labels=3), "hf-swinv2"),
    "Swinv2, masked": (Swinv2ForMaskedImageModeling, Swinv2Config(**SWIN), "hf-simmim"),
    "Swinv2, other windows before": (
        Swinv2ForImageClassification,
        Swinv2Config(**SWIN, pretrained_window_sizes=[8, 8, 8, 4]),
        "hf-swinv2",
    ),
}


def built(name: str) -> Any:
    """Returns a model of transformers none of whose parameters keeps its initial value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name][0](MODELS[name][1]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def saved(model: Any, folder: Path, **how: Any) -> str:
    model.save_pretrained(folder, **how)
    return str(folder)


def images_for(model: Any) -> Tensor:
    size = model.config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def base(model: nn.Module) -> Any:
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


@torch.no_grad()
def features_of(model: Any, images: Tensor) -> Tensor:
    if isinstance(model, ViTMAEForPreTraining):  # it shuffles, and masks unless told not to
        count = (images.shape[2] // model.config.patch_size) ** 2
        model.config.mask_ratio = 0.0
        return model.vit(images, noise=torch.arange(count).float().expand(len(images), -1)).last_hidden_state
    return base(model)(images).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(tmp_path, name):
    model = built(name)
    source = saved(model, tmp_path)
    weights = read_weights(source)
    assert weights.kind == MODELS[name][2]
    encoder, _ = load_encoder(source)
    images = images_for(model)
    with torch.no_grad():
        tolerance = 1e-4 if "eps" in name else 1e-5  # theirs is 1e-12, timm's 1e-6
        torch.testing.assert_close(encoder(images), features_of(model, images), rtol=tolerance, atol=tolerance)
    given = {key: x for key, x in load_file(tmp_path / "model.safetensors").items() if not key.endswith(BUFFERS)}
    read = [*weights.tensors.values(), *weights.head.values(), *(given[key] for key in weights.unused)]
    read += weights.decoder.tensors.values() if weights.decoder is not None else ()
    added = DINO["hidden_size"] if "registers" in name else 0  # a position, to the class token
    assert sum(x.numel() for x in read) + added == sum(x.numel() for x in given.values())
    assert all(key.startswith(("pooler.", "embeddings.mask_token", "vit.pooler")) for key in weights.unused)


def test_a_folder_in_parts_and_one_of_pickles_are_read(tmp_path):
    model = built("ViTModel")
    images = images_for(model)
    parts = Path(saved(model, tmp_path / "parts", max_shard_size="20KB"))
    assert len(list(parts.glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(parts / "config.json", pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")  # in today's names
    for folder in (parts, pickled, f"local-dir:{parts}"):
        encoder, _ = load_encoder(str(folder))
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), features_of(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_whole_vit_mae_gives_their_loss_with_their_noise(tmp_path, norm_pix):
    model = built("ViTMAE")
    model.config.norm_pix_loss, model.config.mask_ratio = norm_pix, 0.75
    images, noise = images_for(model), torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    autoencoder = load_autoencoder(saved(model, tmp_path))
    with torch.no_grad():
        found, wanted = autoencoder(images, random_masking(2, 16, 0.75, noise=noise)), model(images, noise=noise)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.prediction, wanted.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["SwinForMaskedImageModeling", "Swinv2, masked", "ViTForMaskedImageModeling"])
def test_a_whole_model_for_masked_image_modeling_gives_their_loss(tmp_path, name):
    model = built(name)
    autoencoder = load_autoencoder(saved(model, tmp_path))
    encoder, images = autoencoder.encoder, images_for(model)
    masking = encoder.sample_masking(2, 0.6)
    side = encoder.unit_size // model.config.patch_size
    hidden = masking.is_masked.view(2, *encoder.grid).repeat_interleave(side, 1).repeat_interleave(side, 2)
    with torch.no_grad():
        found, wanted = autoencoder(images, masking), model(images, bool_masked_pos=hidden.flatten(1))
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-5)


def test_normalization_and_class_names_come_with_the_folder(tmp_path):
    model = built("ViTForImageClassification")
    model.config.id2label = {i: f"class {i}" for i in range(5)}
    source = saved(model, tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    weights = read_weights(source)
    assert weights.class_names == [f"class {i}" for i in range(5)]
    assert weights.spec.mean == (0.1, 0.2, 0.3) and weights.spec.std == (0.4, 0.5, 0.6)
    assert weights.head["head.weight"].shape == (5, 24)


def test_a_folder_of_the_hub_is_read_from_its_copy(tmp_path, monkeypatch):
    """In the layout of huggingface_hub's cache, without a network."""
    model = built("SwinModel")
    commit = "0" * 40
    repo = tmp_path / "models--someone--swin"
    saved(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("hf-hub:someone/swin", f"hf-hub:someone/swin@{commit}"):
        weights = read_weights(name)
        assert (weights.source, weights.kind) == (name, "hf-swin")
        encoder, _ = load_encoder(name)
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), features_of(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (LocalEntryNotFoundError("An error happened while trying to locate the file"), "trying to locate the file"),
        (EntryNotFoundError("404"), None),
    ],
)
def test_what_the_hub_does_not_give_is_said(tmp_path, monkeypatch, error, said):
    """All but a file that the repository does not have."""
    source = Path(saved(built("ViTModel"), tmp_path))

    def download(repo: str, file: str, revision: str | None) -> str:
        if file == "config.json" or (said is None and file == "model.safetensors"):
            return str(source / file)
        raise error

    monkeypatch.setattr(read_transformers, "hf_hub_download", download)
    if said is None:
        assert read_weights("hf-hub:someone/vit").kind == "hf-vit"
        return
    with pytest.raises(
        InputError, match=f"init hf-hub:someone/vit@v1: the Hub does not give model.safetensors .*{said}"
    ):
        read_weights("hf-hub:someone/vit@v1")


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act is relu, and timm's model has gelu"),
        ({"model_type": "deit"}, "a distilled DeiT has a second class token"),
        ({"model_type": "bert"}, "a transformers model of type bert; these load: vit_mae, vit"),
        ({"num_attention_heads": 5}, "timm cannot build vit_base_patch16_224 .*num_heads"),
        ({"image_size": 64}, "its image_size 64 x 64 is not that of its positions, 32 x 32"),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_refused(tmp_path, values, said):
    source = saved(built("ViTModel"), tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(InputError, match=said) as caught:
        load_encoder(source)
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_refused(tmp_path):
    source = Path(saved(built("ViTModel"), tmp_path / "x", max_shard_size="20KB"))
    index = next(source.glob("*.index.json"))
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(InputError, match="names no files of its own folder"):
        load_encoder(str(source))
    index.unlink()
    with pytest.raises(InputError, match="config.json of transformers, but none of model.safetensors"):
        load_encoder(str(source))
    (source / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_encoder(str(source))
    (source / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: cannot be read"):
        load_encoder(str(source))
