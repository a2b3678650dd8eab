"""Features of images, against timm's own and transformers' way of taking them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import SWIN, classifier, images, prepared
from conftest import write_tars
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quarterlight.finetune.embed import embed
from quarterlight.finetune.embeddings import Embeddings
from quarterlight.finetune.use_config import CropConfig, EmbedConfig
from quarterlight.ssl.errors import InputError


def config(init: Path, out: Path, **more) -> EmbedConfig:
    given = {"precision": "no", "num_workers": 0, "data": CropConfig(crop_pct=1.0), "part_images": 3, "batch_size": 2}
    return EmbedConfig(init=str(init), out=str(out), **(given | more))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("encoder"), classes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("images")
    return str(where), images(where)


@torch.no_grad()
def layers_of(model, x: torch.Tensor, wanted: list[int]) -> list[torch.Tensor]:
    """Returns the tokens behind some blocks and the final norm, by calling timm's blocks one by one."""
    x, found = model.norm_pre(model._pos_embed(model.patch_embed(x))), []
    for i, block in enumerate(model.blocks):
        x = block(x)
        found += [(i, model.norm(x))] if i in wanted else []
    return [dict(found)[i] for i in wanted]


@pytest.mark.parametrize(
    ("options", "wanted", "pool"),
    [
        ({}, [2], "avg"),
        ({"pool": "token"}, [2], "token"),
        ({"layers": (-1, 0)}, [2, 0], "avg"),
        ({"layers": (1,), "pool": "token"}, [1], "token"),
    ],
)
def test_features_are_those_of_timms_blocks(encoder, folder, tmp_path, options, wanted, pool):
    assert embed([folder[0]], config(encoder[0], tmp_path / "e.safetensors", **options)) == 0
    tokens = layers_of(encoder[1], prepared(folder[1]), wanted)
    features = torch.cat([x[:, 0] if pool == "token" else x[:, 1:].mean(dim=1) for x in tokens], dim=1)
    found = load_file(tmp_path / "e.safetensors")
    torch.testing.assert_close(found["features"], features, atol=1e-5, rtol=1e-5)
    assert bytes(found["path"].numpy()).decode().split("\n") == list(map(str, folder[1]))
    assert found["label"].tolist() == [-1] * 7


def test_a_classifiers_features_are_what_its_head_is_given(folder, tmp_path):
    from classifiers import VIT

    file, model = classifier(tmp_path, args=VIT | {"global_pool": "avg"})
    embed([folder[0]], config(file, tmp_path / "e.safetensors"))
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(prepared(folder[1])), pre_logits=True)
    assert "fc_norm.weight" in model.state_dict()
    torch.testing.assert_close(load_file(tmp_path / "e.safetensors")["features"], wanted, atol=1e-5, rtol=1e-5)


def test_a_swins_features_are_those_of_timms_stages(tmp_path):
    file, swin = classifier(tmp_path, "swin_tiny_patch4_window7_224", SWIN, classes=0)
    paths = images(tmp_path / "images", 3, side=64)
    embed([str(tmp_path / "images")], config(file, tmp_path / "e.safetensors", layers=(1, -1)))
    with torch.no_grad():
        x = swin.patch_embed(prepared(paths))
        stages = []
        for stage in swin.layers:
            x = stage(x)
            stages.append(x.mean(dim=(1, 2)))
        wanted = torch.cat([stages[1], swin.norm(x).mean(dim=(1, 2))], dim=1)
    torch.testing.assert_close(load_file(tmp_path / "e.safetensors")["features"], wanted, atol=1e-5, rtol=1e-5)


def test_rows_of_unreadable_images_are_nan_and_the_file_says_why(encoder, tmp_path):
    paths = images(tmp_path / "images", 5)
    paths[1].write_bytes(b"no image")
    for dtype in ("float32", "float16"):
        embed([str(tmp_path / "images")], config(encoder[0], tmp_path / f"{dtype}.safetensors", dtype=dtype))
    read, half = (Embeddings(str(tmp_path / f"{dtype}.safetensors")) for dtype in ("float32", "float16"))
    features = torch.cat([block for _, block in read.blocks(2)])
    assert features.isnan().all(dim=1).tolist() == [False, True, False, False, False]
    assert "not an image" in json.loads(read.metadata["unreadable"])["1"]
    torch.testing.assert_close(next(half.blocks(9))[1], features, atol=2e-3, rtol=2e-3, equal_nan=True)
    assert load_file(tmp_path / "float16.safetensors")["features"].dtype == torch.float16


def test_shards_give_keys_and_labels_and_parquet_the_same_features(encoder, tmp_path):
    arrow = pytest.importorskip("pyarrow.parquet")
    glob = write_tars(tmp_path / "shards", "val", 25)
    for name in ("e.safetensors", "e.parquet"):
        embed([glob], config(encoder[0], tmp_path / name))
    read = Embeddings(str(tmp_path / "e.safetensors"))
    assert read.key == [f"val{i:05d}" for i in range(25)] and read.label.tolist() == [i % 4 for i in range(25)]
    rows = arrow.read_table(tmp_path / "e.parquet").to_pylist()
    assert [row["key"] for row in rows] == read.key and [row["label"] for row in rows] == read.label.tolist()
    assert [row["path"] for row in rows] == read.path
    assert np.array_equal(np.array([row["features"] for row in rows], np.float32), next(read.blocks(99))[1].numpy())


def test_blocks_and_what_was_there_already_change_no_number(encoder, folder, tmp_path):
    whole = tmp_path / "whole.safetensors"
    embed([folder[0]], config(encoder[0], whole, part_images=2))
    embed([folder[0]], config(encoder[0], tmp_path / "other.safetensors", part_images=100, batch_size=2))
    assert whole.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3,)}, "layers 3: there are 3 blocks, 0 to 2, or -1 to -3"),
        ({"out": "x.csv"}, "ends in .csv: give a name in .safetensors or .parquet"),
        ({"init": "nowhere"}, "init nowhere: no such file or folder"),
    ],
)
def test_what_is_wrong_is_named(encoder, folder, tmp_path, options, message):
    given = {"out": str(tmp_path / "e.safetensors"), "init": str(encoder[0])} | options
    with pytest.raises(InputError, match=message):
        embed([folder[0]], config(**given))


def test_features_beyond_float16_are_refused(encoder, folder, tmp_path):
    large = load_file(encoder[0])
    large["norm.bias"] += 1e6
    with safe_open(encoder[0], framework="pt") as file:
        save_file(large, tmp_path / "large.safetensors", file.metadata())
    given = config(tmp_path / "large.safetensors", tmp_path / "e.safetensors", dtype="float16")
    with pytest.raises(InputError, match="dtype float16: features goes beyond its range.*use float32"):
        embed([folder[0]], given)
    assert not (tmp_path / "e.safetensors").exists() and not list(tmp_path.glob("*.parts/0*"))


def test_a_swin_has_no_class_token(folder, tmp_path):
    file, _ = classifier(tmp_path, "swin_tiny_patch4_window7_224", SWIN, classes=0)
    with pytest.raises(InputError, match="pool token: a SwinTransformer without a class token; use pool avg"):
        embed([folder[0]], config(file, tmp_path / "e.safetensors", pool="token"))
