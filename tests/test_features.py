"""Features of frozen encoders against timm's, their cache, and two processes. As a script: one rank of two."""

import copy
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import write_tars
from safetensors.torch import load_file, save_file
from torch import Tensor

from quarterlight.finetune import features as features_module
from quarterlight.finetune.features import extract_table
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError, Stopped
from quarterlight.ssl.index import open_index
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.pooling import pooled, pooled_layers
from quarterlight.ssl.processes import build_accelerator
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.vit import ViTEncoder

NAME, COUNT = "vit_tiny_patch16_224", 13
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NORMALIZE = Normalize((0.5, 0.25, 0.75), (0.25, 0.5, 0.125))


@functools.cache
def encoder(**changes: object) -> ViTEncoder:
    torch.manual_seed(0)
    built = build_encoder(NAME, **(ARGS | changes))
    built.init_weights()
    return built.eval()


def samples(patterns: str, *, crop_pct: float = 1.0) -> Samples:
    index = open_index(patterns)
    return Samples(index, FileOrder(np.arange(len(index))), CenterCrop((32, 32), crop_pct), 0)


def extract(*given: Any, **loading: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Returns features and labels of all samples."""
    table = extract_table(*given, **loading)
    return table.load(), table.labels()


def extracted(
    patterns: str, accelerator: Accelerator, cache: Path, *, batch_size: int = 4
) -> tuple[dict[str, Tensor], Tensor]:
    loading = {"batch_size": batch_size, "num_workers": 0}
    return extract(encoder(), NORMALIZE, samples(patterns), accelerator, cache, **loading)


def plain(patterns: str) -> tuple[dict[str, Tensor], Tensor]:
    """The same features, image by image, through timm's own forward."""
    model, read = encoder().timm, samples(patterns)
    batches = [read.batch(i, i + 1) for i in range(len(read.order))]
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(NORMALIZE(batch.images)) for batch in batches])
    return {"avg": tokens[:, 1:].mean(dim=1), "token": tokens[:, 0]}, torch.cat([batch.labels for batch in batches])


def assert_same(found: tuple[dict[str, Tensor], Tensor], expected: tuple[dict[str, Tensor], Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield build_accelerator("no")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two tars of 7 and 6 images."""
    return write_tars(tmp_path / "shards", "val", COUNT, per_shard=7)


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}])
def test_pooled_features_are_timms(changes: dict):
    model, images = encoder(**changes), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, tokens = pooled(model(images), model), model.timm.forward_features(images)
        assert torch.equal(found["avg"], tokens[:, -16:].mean(dim=1))
        assert torch.equal(found["token"], model.timm.forward_head(tokens, pre_logits=True))


def test_without_a_class_token_there_is_the_average_only():
    model = encoder(class_token=False, global_pool="avg", fc_norm=False)
    with torch.no_grad():
        found = pooled(model(torch.rand(2, 3, 32, 32)), model)
    assert found.keys() == {"avg"}


def test_half_precision_tokens_are_pooled_in_float32():
    tokens = torch.rand(2, 17, 48).bfloat16()
    found = pooled(tokens, encoder())
    assert {x.dtype for x in found.values()} == {torch.float32}
    torch.testing.assert_close(found["avg"], tokens[:, 1:].float().mean(dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 4, COUNT, 100])
def test_features_are_those_of_a_plain_loop_in_file_order(
    shards: str, accelerator: Accelerator, tmp_path: Path, batch_size: int
):
    assert_same(extracted(shards, accelerator, tmp_path / "cache", batch_size=batch_size), plain(shards))


def test_features_need_no_gradient(shards: str, accelerator: Accelerator, tmp_path: Path):
    features, _ = extracted(shards, accelerator, tmp_path / "cache")
    assert not any(x.requires_grad for x in features.values())


def test_a_second_time_nothing_is_computed(shards: str, accelerator: Accelerator, tmp_path: Path):
    first = extracted(shards, accelerator, tmp_path / "cache")
    (part,) = (tmp_path / "cache").glob("*/*")
    marked = {name: x.clone() for name, x in load_file(part).items()}  # of the file that is about to be replaced
    save_file(marked | {"avg": marked["avg"] + 1}, part)
    second = extracted(shards, accelerator, tmp_path / "cache")
    torch.testing.assert_close(second[0]["avg"], first[0]["avg"] + 1, rtol=0, atol=0)
    assert torch.equal(second[1], first[1])


def test_other_weights_means_crops_and_samples_are_computed_anew(shards: str, accelerator: Accelerator, tmp_path: Path):
    loading = {"batch_size": 4, "num_workers": 0}
    cache, other = tmp_path / "cache", copy.deepcopy(encoder())
    with torch.no_grad():
        other.timm.cls_token.add_(1e-3)
    whole, zoomed = samples(shards), samples(shards, crop_pct=0.5)
    few = dataclasses.replace(whole, order=FileOrder(np.arange(5)))
    found = [
        extract(encoder(), NORMALIZE, whole, accelerator, cache, **loading),
        extract(other, NORMALIZE, whole, accelerator, cache, **loading),
        extract(encoder(), Normalize((0.5,) * 3, (0.5,) * 3), whole, accelerator, cache, **loading),
        extract(encoder(), NORMALIZE, zoomed, accelerator, cache, **loading),
        extract(encoder(), NORMALIZE, few, accelerator, cache, **loading),
    ]
    assert len(list(cache.iterdir())) == 5
    assert [len(labels) for _, labels in found] == [COUNT] * 4 + [5]
    sums = [float(features["token"][:5].double().sum()) for features, _ in found]
    assert len(set(sums[:4])) == 4
    assert sums[4] == pytest.approx(sums[0], abs=1e-4)


def test_shards_that_moved_are_not_computed_anew(shards: str, accelerator: Accelerator, tmp_path: Path):
    first = extracted(shards, accelerator, tmp_path / "cache")
    shutil.move(tmp_path / "shards", tmp_path / "moved")
    assert_same(extracted(str(tmp_path / "moved" / "val-*.tar"), accelerator, tmp_path / "cache"), first)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_features_of_the_last_layers_are_those_of_single_blocks(shards: str, accelerator: Accelerator, tmp_path: Path):
    model = encoder(depth=5)
    read = samples(shards)
    table = extract_table(model, NORMALIZE, read, accelerator, tmp_path, layers=True, batch_size=4, num_workers=0)
    timm, x = model.timm, NORMALIZE(read.batch(0, COUNT).images)
    found = {}
    with torch.no_grad():
        x = timm._pos_embed(timm.patch_embed(x))
        for i, block in enumerate(timm.blocks):
            x = block(x)
            found[5 - i] = timm.norm(x)
    expected = {"avg": found[1][:, 1:].mean(dim=1), "token": found[1][:, 0]}
    expected |= {f"last{i}": found[i][:, 0] for i in (2, 3, 4)}
    torch.testing.assert_close(table.load(), expected, rtol=0, atol=1e-5)
    assert table.load(["last3"]).keys() == {"last3"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NAME, {"reg_tokens": 2}),
        (NAME, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        ("vit_medium_patch16_rope_reg1_gap_256", {"num_reg_tokens": 0}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}),
    ],
)
def test_the_last_layer_is_what_the_encoder_gives(name: str, changes: dict):
    model, images = build_encoder(name, **(ARGS | changes)).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, wanted = pooled_layers(model, images), pooled(model(images), model)
    assert found.keys() == wanted.keys() | {"last2"}  # of two blocks
    for key, x in wanted.items():
        torch.testing.assert_close(found[key], x, rtol=0, atol=1e-6)


def test_features_of_a_swin_are_those_of_its_stages():
    model = build_encoder("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1, 1, 1),
                          num_heads=(1, 1, 1, 1), window_size=2).eval()  # fmt: skip
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        found, x = pooled_layers(model, images), model.timm.patch_embed(images)
        for i, stage in zip((4, 3, 2), model.timm.layers, strict=False):
            x = stage(x)
            torch.testing.assert_close(found[f"last{i}"], x.mean(dim=(1, 2)), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["avg"], model.timm.forward_head(model.timm.forward_features(images)))
    assert found.keys() == {"avg", "last2", "last3", "last4"}


def test_half_precision_halves_the_cache_and_is_refused_where_it_does_not_hold_a_feature(
    shards: str, accelerator: Accelerator, tmp_path: Path
):
    given = {"batch_size": 4, "num_workers": 0}
    exact = extract_table(encoder(), NORMALIZE, samples(shards), accelerator, tmp_path, **given).load()
    half = extract_table(encoder(), NORMALIZE, samples(shards), accelerator, tmp_path, dtype="float16", **given).load()
    for name, x in half.items():
        assert x.dtype == torch.float16
        torch.testing.assert_close(x.float(), exact[name], rtol=1e-3, atol=1e-4)
    large = copy.deepcopy(encoder())
    with torch.no_grad():
        large.timm.norm.bias.add_(1e6)
    with pytest.raises(InputError, match="feature_dtype float16.*use float32"):
        extract_table(large, NORMALIZE, samples(shards), accelerator, tmp_path / "b", dtype="float16", **given)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_that_are_not_finite_are_refused_at_once(
    shards: str, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    for size in ("LEAST_CHUNK", "MOST_CHUNK"):
        monkeypatch.setattr(features_module, size, 3)
    broken, calls = copy.deepcopy(encoder()), []
    broken.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        broken.timm.norm.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="is not finite: these weights have diverged.*--precision bf16 or no"):
        given = {"batch_size": 3, "num_workers": 0, "dtype": dtype}
        extract_table(broken, NORMALIZE, samples(shards), accelerator, tmp_path, **given)
    assert len(calls) == 1  # not the four other chunks


def test_a_stopped_extraction_keeps_its_chunks_and_any_number_of_processes_goes_on(
    shards: str, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for size in ("LEAST_CHUNK", "MOST_CHUNK"):
        monkeypatch.setattr(features_module, size, 3)
    given = {"batch_size": 2, "num_workers": 0}

    class Later(StopSignals):  # asked to stop at the fifth look: behind the second of five chunks
        looks = 0

        @property
        def received(self) -> str | None:
            Later.looks += 1
            return "SIGTERM" if Later.looks > 4 else None

        @received.setter
        def received(self, value: object) -> None: ...

    with pytest.raises(Stopped):
        extract_table(encoder(), NORMALIZE, samples(shards), accelerator, tmp_path / "cache", signals=Later(), **given)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}
    assert sorted(kept) == ["000000000-000000003.safetensors", "000000003-000000006.safetensors"]
    found = extract(encoder(), NORMALIZE, samples(shards), accelerator, tmp_path / "cache", **given)
    assert_same(found, plain(shards))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}
    assert len(after) == 5 and kept.items() <= after.items()
    with pytest.raises(InputError, match="cannot be read.*delete it"):
        (path := sorted((tmp_path / "cache").glob("*/*"))[0]).write_bytes(path.read_bytes()[:50])
        extract(encoder(), NORMALIZE, samples(shards), accelerator, tmp_path / "cache", **given)


def test_an_unreadable_image_is_refused_and_nothing_is_kept(shards: str, accelerator: Accelerator, tmp_path: Path):
    tar = tmp_path / "shards" / "val-0001.tar"
    content = bytearray(tar.read_bytes())
    at = content.rindex(b"\x89PNG")
    content[at : at + 60] = bytes(60)
    tar.write_bytes(content)
    with pytest.raises(InputError, match=r"val-0001\.tar.*val00012"):
        extracted(shards, accelerator, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_two_processes_give_the_features_of_one(shards: str, tmp_path: Path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*launcher, __file__, str(tmp_path)], check=True, env=environment, capture_output=True, text=True, timeout=200
    )
    for rank in range(2):
        features = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert_same((features, features.pop("labels")), plain(shards))
        one = load_file(tmp_path / f"one-{rank}.safetensors")
        assert (len(one["avg"]), len(one["labels"])) == (1, 1)


def main(folder: Path) -> None:
    """Extracts on this rank of two, all images and one image, and writes what it got."""
    accelerator = build_accelerator("no")
    assert accelerator.num_processes == 2
    loading = {"batch_size": 4, "num_workers": 0}
    everything = samples(str(folder / "shards" / "val-*.tar"))
    one = dataclasses.replace(everything, order=FileOrder(np.arange(1)))
    for name, read in (("rank", everything), ("one", one)):
        features, labels = extract(encoder(), NORMALIZE, read, accelerator, folder / "cache", **loading)
        save_file(features | {"labels": labels}, folder / f"{name}-{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def test_features_do_not_hold_on_to_all_tokens():
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    for values in pooled(torch.randn(4, 17, 48), encoder).values():
        assert values.untyped_storage().nbytes() == values.numel() * 4
