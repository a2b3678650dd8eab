"""Weights that leave a run, read back by safetensors and by timm."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.export import ModelSpec, export_hub, export_weights, pair, run_facts

NAME = "vit_tiny_patch16_224"
ARGS = {"img_size": [32, 32], "in_chans": 3, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SPEC = ModelSpec(NAME, ARGS, (0.25, 0.5, 0.75), (0.125, 0.25, 0.5))
FACTS = {"step": 7, "stage": "pretraining", "mask_ratio": 0.75, "loss": 0.5}


def random_model(spec: ModelSpec = SPEC) -> nn.Module:
    model = build_encoder(spec.name, **spec.timm_args()).timm
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model()


@pytest.fixture(scope="module")
def hub(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "hub"
    export_hub(path, model, SPEC, title="A tiny model", facts=FACTS)
    return path


def images(height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_file_holds_timms_keys_and_nothing_else(tmp_path: Path, model: nn.Module):
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, FACTS)
    plain = timm.create_model(NAME, num_classes=0, **ARGS)
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plain.load_state_dict(found, strict=True)
    torch.testing.assert_close(plain.eval()(images()), model(images()), rtol=0, atol=0)


def test_the_metadata_builds_the_model_again(tmp_path: Path, model: nn.Module):
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, FACTS)
    found = metadata(tmp_path / "encoder.safetensors")
    assert found["format"] == "pt"
    assert found["architecture"] == NAME
    assert json.loads(found["timm_args"]) == ARGS
    assert json.loads(found["mean"]) == [0.25, 0.5, 0.75]
    assert json.loads(found["std"]) == [0.125, 0.25, 0.5]
    rebuilt = timm.create_model(found["architecture"], num_classes=0, **json.loads(found["timm_args"]))
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_the_metadata_holds_the_facts(tmp_path: Path, model: nn.Module):
    facts = run_facts("pretraining", {"step": 7, "samples_seen": 448, "figures": {}}, 5)
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, facts | {"target": "norm_pix", "mask_ratio": 0.75})
    found = metadata(tmp_path / "encoder.safetensors")
    assert (found["stage"], found["target"]) == ("pretraining", "norm_pix")
    assert {key: json.loads(found[key]) for key in ("step", "samples_seen", "seed", "mask_ratio")} == {
        "step": 7,
        "samples_seen": 448,
        "seed": 5,
        "mask_ratio": 0.75,
    }
    assert found["timm"] == timm.__version__
    assert found["made_by"].startswith("quarterlight ")
    assert found["git_commit"]


def test_a_second_export_replaces_the_first_and_leaves_nothing_beside_it(tmp_path: Path, model: nn.Module):
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, {"step": 1})
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, {"step": 2})
    assert metadata(tmp_path / "encoder.safetensors")["step"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_weights_in_a_transposed_layout_are_written(tmp_path: Path):
    model = random_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.data = model.blocks[0].mlp.fc1.weight.data.T.contiguous().T
    export_weights(tmp_path / "encoder.safetensors", model, SPEC, {})
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("blocks.0.mlp.fc1.weight"), model.blocks[0].mlp.fc1.weight)


def test_timm_loads_the_hub_folder_with_the_same_features(hub: Path, model: nn.Module):
    loaded = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.forward_features(images()), model.forward_features(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(48, 48), (64, 32)])
def test_timm_loads_the_hub_folder_at_another_image_size(hub: Path, model: nn.Module, size: tuple[int, int]):
    loaded = timm.create_model(f"local-dir:{hub}", pretrained=True, img_size=size).eval()
    expected = timm.create_model(NAME, num_classes=0, **(ARGS | {"img_size": size})).eval()
    grid = [size[0] // 8, size[1] // 8]
    positions = resample_abs_pos_embed(model.pos_embed.detach(), grid, [4, 4], num_prefix_tokens=1)
    expected.load_state_dict(model.state_dict() | {"pos_embed": positions})
    torch.testing.assert_close(loaded(images(*size)), expected(images(*size)), rtol=0, atol=1e-6)


def test_timm_loads_a_hub_folder_whose_images_are_not_square(tmp_path: Path):
    spec = ModelSpec(NAME, ARGS | {"img_size": [32, 64]}, SPEC.mean, SPEC.std)
    model = random_model(spec)
    export_hub(tmp_path / "hub", model, spec, title="t", facts={})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 64)
    torch.testing.assert_close(loaded(images(32, 64)), model(images(32, 64)), rtol=0, atol=1e-6)


def test_timm_loads_a_hub_folder_of_grey_images(tmp_path: Path):
    spec = ModelSpec(NAME, ARGS | {"in_chans": 1}, (0.5,), (0.25,))
    model = random_model(spec)
    export_hub(tmp_path / "hub", model, spec, title="t", facts={})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["input_size"] == (1, 32, 32)
    torch.testing.assert_close(loaded(images(channels=1)), model(images(channels=1)), rtol=0, atol=1e-6)


def test_the_hub_folder_gives_the_transform_of_the_training(hub: Path):
    loaded = timm.create_model(f"local-dir:{hub}", pretrained=True)
    config = timm.data.resolve_model_data_config(loaded)
    assert config["input_size"] == (3, 32, 32)
    assert (tuple(config["mean"]), tuple(config["std"])) == (SPEC.mean, SPEC.std)
    assert config["interpolation"] == "bicubic"


def test_tag_and_license_of_timms_own_weights_are_not_copied(hub: Path):
    known = timm.get_pretrained_cfg(NAME)
    found = json.loads((hub / "config.json").read_text())["pretrained_cfg"]
    assert known.tag not in (None, "", found["tag"])
    assert known.license not in (None, found["license"])
    assert "hf_hub_id" not in found
    assert "url" not in found
    assert found["num_classes"] == 0


def test_label_names_are_kept(tmp_path: Path):
    spec = ModelSpec(NAME, ARGS | {"num_classes": 3, "global_pool": "avg"}, SPEC.mean, SPEC.std)
    model = timm.create_model(NAME, **spec.args).eval()
    export_hub(tmp_path / "hub", model, spec, title="t", facts={}, labels=["ant", "bee", "cat"])
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", [None, ["ant", "bee"]])
def test_label_names_that_do_not_fit_are_left_out(tmp_path: Path, labels: list[str] | None):
    spec = ModelSpec(NAME, ARGS | {"num_classes": 3}, SPEC.mean, SPEC.std)
    export_hub(tmp_path / "hub", timm.create_model(NAME, **spec.args), spec, title="t", facts={}, labels=labels)
    assert "label_names" not in json.loads((tmp_path / "hub" / "config.json").read_text())


def test_the_hub_folder_holds_no_pickle(hub: Path):
    assert {path.name for path in hub.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_the_model_card_names_what_was_made_and_how(hub: Path):
    card = (hub / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for text in ("# A tiny model", NAME, "| mask_ratio | 0.75 |", "| step | 7 |", "[0.25, 0.5, 0.75]"):
        assert text in card


def test_a_second_hub_export_replaces_the_first(tmp_path: Path, model: nn.Module):
    for title in ("first", "second"):
        export_hub(tmp_path / "hub", model, SPEC, title=title, facts={})
    assert "# second" in (tmp_path / "hub" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_size_is_a_side_or_a_pair():
    assert pair(32) == (32, 32)
    assert pair((32, 48)) == pair([32, 48]) == (32, 48)
