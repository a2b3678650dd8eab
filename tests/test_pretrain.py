"""The pretraining command as users start it: real processes, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TINY_PRETRAIN, arguments, command
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig, LinearProbeConfig
from quarterlight.finetune.linear_probe import linear_probe
from quarterlight.ssl.augment import Normalize, random_crop
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import DataConfig, PretrainConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.index import open_index
from quarterlight.ssl.masking import Masking
from quarterlight.ssl.order import ShuffledOrder
from quarterlight.ssl.pos_embed import sincos_pos_embed
from quarterlight.ssl.pretrain import pretrain
from quarterlight.ssl.small_images import find_small_images
from quarterlight.ssl.targets import PCATarget


def options(shards: tuple[str, str], run_dir: Path, **more: str) -> dict[str, str]:
    return TINY_PRETRAIN | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir)} | more


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples(run_dir: Path) -> list[tuple]:
    """Returns what a run has seen, in the order of steps, whichever process saw it."""
    lines = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in lines)


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> Path:
    """A run of one process, never disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = options(shards, run_dir, record_samples="true")
    subprocess.run(command("pretrain.py", given), check=True, env=environment, capture_output=True)
    return run_dir


def test_a_run_leaves_what_the_design_says(reference):
    names = {path.name for path in reference.iterdir()}
    wanted = {"config.yaml", "environment.json", "metrics.jsonl", "encoder.safetensors", "hub", "result.json", "state"}
    assert wanted | {"reconstructions.png"} <= names
    assert not [
        path for path in reference.rglob("*") if path.name.endswith((".partial", ".old", ".bin", ".pkl", ".pt"))
    ]
    assert [path.name for path in sorted((reference / "state").iterdir())] == ["step-00000008", "step-00000012"]
    result = json.loads((reference / "result.json").read_text())
    assert result["finished"] and result["steps"] == 12 and result["loss"] > 0
    assert [x["step"] for x in records(reference)] == [2, 4, 6, 8, 10, 12]


def test_released_weights_load_strictly_into_timm(reference):
    tensors = load_file(reference / "encoder.safetensors")
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    model.load_state_dict(tensors, strict=True)
    hub = timm.create_model(f"local-dir:{reference / 'hub'}", pretrained=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), hub.eval()(images), atol=1e-6, rtol=0)
    assert hub.pretrained_cfg["crop_pct"] == 1  # the run's, where timm has 0.9 for this model
    larger = timm.create_model(f"local-dir:{reference / 'hub'}", pretrained=True, img_size=24)
    assert larger.eval()(torch.randn(1, 3, 24, 24)).shape == (1, 24)


def test_tensorboard_holds_curves_and_pictures(reference):
    events = EventAccumulator(str(reference), size_guidance={"images": 0})
    events.Reload()
    assert {"loss", "lr", "images_per_s"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == 1


@pytest.mark.parametrize("more", [{"num_workers": "2"}, {"micro_batch_size": "2"}], ids=["workers", "accumulation"])
def test_workers_and_accumulation_change_nothing_seen(reference, shards, tmp_path, launch, more):
    launch("pretrain.py", options(shards, tmp_path / "run", record_samples="true", **more))
    assert samples(tmp_path / "run") == samples(reference)
    for ours, wanted in zip(records(tmp_path / "run"), records(reference), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-4)


def test_two_processes_see_and_learn_the_same_as_one(reference, shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run", record_samples="true", num_workers="1"), processes=2)
    assert samples(tmp_path / "run") == samples(reference)
    for ours, wanted in zip(records(tmp_path / "run"), records(reference), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    assert done.stdout.count("step 12/12") == 1


def test_killed_at_any_moment_the_run_ends_with_the_same_bits(reference, shards, tmp_path):
    run_dir = tmp_path / "run"
    given = options(shards, run_dir, record_samples="true", log_every_steps="1", save_every_steps="1")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for after in (0, 2, 7):  # killed once so many steps are logged, so in the middle of one or of its saving
        process = subprocess.Popen(
            command("pretrain.py", given), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        metrics = run_dir / "metrics.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > after:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command("pretrain.py", given), check=True, env=environment, capture_output=True)
    ours, wanted = load_file(run_dir / "encoder.safetensors"), load_file(reference / "encoder.safetensors")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    moments = "state/step-00000012/optimizer.safetensors"
    ours, wanted = load_file(run_dir / moments), load_file(reference / moments)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert [x["step"] for x in records(run_dir)] == list(range(1, 13))
    assert set(samples(run_dir)) == set(samples(reference))


def test_the_same_command_after_the_end_changes_nothing(reference, shards, launch):
    before = load_file(reference / "encoder.safetensors")
    launch("pretrain.py", options(shards, reference, record_samples="true"))
    after = load_file(reference / "encoder.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((reference / "result.json").read_text())["loss"] > 0


def test_bf16_runs_work(shards, tmp_path, launch):
    launch("pretrain.py", options(shards, tmp_path / "run", precision="bf16", steps="3"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim.base_lrr": "1"}, "Did you mean optim.base_lr?"),
        ({"data.train": "nowhere/train-*.tar"}, "matches no file"),
        ({"data.train": "nowhere/train-0.tar"}, "does not exist"),
        ({"data.img_size": "18"}, "not a multiple of the patch size 4: use 16 or 20"),
        ({"encoder.name": "vit_tny_patch16_224"}, "Did you mean vit_tiny_patch16_224"),
        ({"encoder.name": "resnet50", "encoder.args": "{}"}, "a resnet is not supported"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": "{}"}, "use 32 pixels"),
        ({"init": "nowhere"}, "no such file or folder"),
        ({"micro_batch_size": "3"}, "use 1, 2, 4"),
        ({"mask.ratio": "1"}, "not in [0, 1)"),
        ({"steps": "null"}, "(now steps=None, epochs=None): give one"),
        ({"epochs": "3"}, "take one back, as by --epochs null"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"run_dir": "/proc/quarterlight"}, "/proc/quarterlight"),
        ({"mask.unit": "6"}, "mask.unit 6 is not a multiple of the encoder's 4 pixels: use 4 or 8"),
        ({"mask.strategy": "blocks"}, "mask.strategy"),
        ({"mask.ratio": "0"}, "hides none of the 16 units"),
        ({"target": "pca"}, "pca_components is 96, and a unit has 48 values: give at most those"),
        ({"target": "hog", "data.img_size": "24", "encoder.args": "{patch_size: 12, depth: 1}"}, "not 12"),
        ({"decoder.name": "linear"}, "set encode_masked true"),
        ({"decoder.name": "cross", "encode_masked": "true"}, "cannot be had with encode_masked"),
        ({"decoder.multi_scale": "true"}, "needs an encoder with several stages"),
        ({"decoder": "{embed_dim: 16, depth: 1, num_heads: 3}"}, "not a multiple of decoder.num_heads 3"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_mistake_gets_one_sentence(shards, tmp_path, capsys, change, said):
    words = arguments(options(shards, tmp_path / "run") | change)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: parse_config(PretrainConfig, "", words), pretrain)
    assert ended.value.code in (1, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_mistake_ends_the_process_without_a_traceback(shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run") | {"data.train": "nowhere/*.tar"}, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: shards: nowhere/*.tar matches no file")
    assert len(done.stderr.splitlines()) == 1


def test_a_batch_that_does_not_divide_is_refused_once(shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run", batch_size="7"), processes=2, check=False)
    assert done.returncode
    assert done.stderr.count("batch_size 7 is not a multiple of the 2 processes: use 6 or 8") == 1


def test_other_data_in_the_same_run_folder_is_refused(reference, shards, launch):
    done = launch("pretrain.py", options((shards[1], shards[1]), reference, record_samples="true"), check=False)
    assert "was trained on other shards" in done.stderr and done.returncode == 1


# --- what may be predicted, hidden and how: runs in this process, which saves the seconds of a start


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Path]]:
    """Returns a function that runs a stage in this process, in one thread as the launched ones; it returns run_dir."""

    def run(given: dict[str, str], stage: Callable[..., Any] = pretrain, config_class: type = PretrainConfig) -> Path:
        try:
            stage(parse_config(config_class, "", arguments(given)))
        finally:
            for state in (AcceleratorState, PartialState, GradientState):
                state._reset_state()
        return Path(given["run_dir"])

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("variants")


def tuning_options(shards: tuple[str, str], init: Path, run_dir: Path) -> dict[str, str]:
    return {
        "init": str(init), "data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir), "precision": "no",
        "num_workers": "0", "batch_size": "8", "steps": "4", "optim.warmup_steps": "1", "evaluate_every_steps": "4",
    }  # fmt: skip


def state_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "state" / f"step-{step:08d}" / "model.safetensors")


def same_weights(run_dir: Path, other: Path) -> bool:
    ours, wanted = (load_file(x / "encoder.safetensors") for x in (run_dir, other))
    return ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def timm_args(run_dir: Path) -> dict[str, Any]:
    with safe_open(run_dir / "encoder.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["timm_args"])


def crops(shards: tuple[str, str], config: DataConfig, size: int, count: int) -> torch.Tensor:
    """Returns the normalized training crops of the first positions of a run with seed 0."""
    index = open_index(shards[0])
    order = ShuffledOrder(np.arange(len(index)), 0)
    small = find_small_images(index, 3, Path(index.paths[0]).parent)
    samples = Samples(index, order, random_crop(config, (size, size)), 0, small=small)
    return Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(samples.batch(0, count).images)


PCA = {"target": "pca", "pca_components": "12", "optim.base_lr": "1e-1"}


@pytest.fixture(scope="module")
def pca_run(start, shards, folder) -> Path:
    return start(options(shards, folder / "pca", **PCA))


def test_principal_components_are_those_of_the_runs_own_crops(pca_run, shards):
    found = load_file(pca_run / "pca.safetensors")
    assert found["components"].shape == (12, 48) and found["mean"].shape == (48,)
    wanted = PCATarget(4, 3, num_components=12)
    wanted.fit([crops(shards, DataConfig(train=shards[0]), 16, 60)])
    torch.testing.assert_close(found["mean"], wanted.mean, atol=1e-5, rtol=0)
    cosines = (found["components"] * wanted.components).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(12), atol=1e-3, rtol=0)
    state = state_of(pca_run, 12)
    assert torch.equal(state["autoencoder.target.components"], found["components"])
    assert state["autoencoder.decoder.pred.weight"].shape == (12, 16)
    assert not [name for name in load_file(pca_run / "encoder.safetensors") if "components" in name]


def test_a_run_with_principal_components_learns_and_leaves_a_picture(pca_run):
    losses = [x["loss"] for x in records(pca_run)]
    assert losses[-1] < 0.9 * losses[0]
    picture = np.asarray(Image.open(pca_run / "reconstructions.png"))
    assert picture.shape[2] == 3 and picture.std() > 10


@pytest.mark.parametrize("states", ["the newest lost", "none yet"])
def test_a_stopped_run_with_principal_components_continues_with_the_same_ones(start, pca_run, shards, tmp_path, states):
    run_dir = tmp_path / "run"
    shutil.copytree(pca_run, run_dir)
    shutil.rmtree(run_dir / "state" / "step-00000012")
    for name in ("result.json", "encoder.safetensors"):
        (run_dir / name).unlink()
    if states == "none yet":
        shutil.rmtree(run_dir / "state")
    components = run_dir / "pca.safetensors"
    before, written_at = components.read_bytes(), components.stat().st_mtime_ns
    start(options(shards, run_dir, **PCA))
    assert components.read_bytes() == before
    assert (components.stat().st_mtime_ns == written_at) == (states == "the newest lost")  # else fitted anew
    assert same_weights(run_dir, pca_run)
    assert [x["step"] for x in records(run_dir)] == [2, 4, 6, 8, 10, 12]


def test_components_of_an_attempt_that_saved_no_state_do_not_serve_another_configuration(
    start, pca_run, shards, tmp_path
):
    other = PCA | {"data.mean": "[0.1,0.2,0.3]", "steps": "1", "optim.warmup_steps": "0"}
    fresh = start(options(shards, tmp_path / "fresh", **other))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml", "environment.json", "pca.safetensors"):
        shutil.copy(pca_run / name, run_dir / name)
    start(options(shards, run_dir, **other))
    found, wanted = (load_file(x / "pca.safetensors") for x in (run_dir, fresh))
    torch.testing.assert_close(found["mean"], wanted["mean"])
    torch.testing.assert_close(found["components"], wanted["components"])


SHAPED = {"target": "hog", "mask.strategy": "block", "mask.unit": "8", "positions": "learned", "record_samples": "true"}


@pytest.fixture(scope="module")
def shaped_run(start, shards, folder) -> Path:
    return start(options(shards, folder / "shaped", **SHAPED))


def test_masks_of_blocks_of_larger_units_are_what_a_run_hides(shaped_run):
    lines = [json.loads(x) for x in (shaped_run / "samples-rank0.jsonl").read_text().splitlines()]
    encoder = build_encoder("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    sampler = encoder.mask_sampler(0.75, strategy="block", mask_unit=8)
    masking = sampler.sample(0, np.arange(len(lines)))
    assert masking.ids_keep.shape == (12 * 8, 4)
    assert [x["mask"] for x in lines] == [zlib.crc32(mask.tobytes()) for mask in masking.ids_keep.numpy()]


def test_histograms_of_gradients_are_learned(shaped_run):
    losses = [x["loss"] for x in records(shaped_run)]
    assert losses[-1] < 0.9 * losses[0]
    assert state_of(shaped_run, 12)["autoencoder.decoder.pred.weight"].shape == (27, 16)  # one cell of 4 pixels
    assert (shaped_run / "reconstructions.png").stat().st_size > 100


def test_learned_positions_are_trained(shaped_run, reference):
    name = "autoencoder.encoder.timm.pos_embed"
    before, after = (state_of(shaped_run, step)[name] for step in (8, 12))
    assert (before != after).float().mean() > 0.9
    exported = load_file(shaped_run / "encoder.safetensors")["pos_embed"]
    assert torch.equal(exported, after)
    assert (exported - sincos_pos_embed(24, (4, 4), num_prefix_tokens=1)).abs().max() > 0.1
    fixed = load_file(reference / "encoder.safetensors")["pos_embed"]  # by default
    assert torch.equal(fixed, sincos_pos_embed(24, (4, 4), num_prefix_tokens=1))


CROSS = {"positions": "none", "decoder": "{name: cross, embed_dim: 16, depth: 1, num_heads: 2}", "pred_share": "0.5"}


@pytest.fixture(scope="module")
def cross_run(start, shards, folder) -> Path:
    return start(options(shards, folder / "cross", **CROSS))


def test_a_run_with_a_cross_decoder_learns_from_half_of_the_hidden_patches(cross_run):
    losses = [x["loss"] for x in records(cross_run)]
    assert losses[-1] < 0.9 * losses[0]
    assert "autoencoder.decoder.blocks.0.kv.weight" in state_of(cross_run, 12)
    assert np.asarray(Image.open(cross_run / "reconstructions.png")).std() > 10  # a picture predicts every patch


def test_without_positions_there_are_none_in_what_is_released_and_fine_tuned(cross_run, start, shards, tmp_path):
    tensors = load_file(cross_run / "encoder.safetensors")
    assert "pos_embed" not in tensors and timm_args(cross_run)["pos_embed"] == "none"
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "pos_embed": "none"}
    timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).load_state_dict(tensors, strict=True)
    assert timm.create_model(f"local-dir:{cross_run / 'hub'}", pretrained=True).pos_embed is None
    tuned = start(tuning_options(shards, cross_run, tmp_path / "tuned"), finetune, FinetuneConfig)
    assert "pos_embed" not in load_file(tuned / "classifier.safetensors")
    assert json.loads((tuned / "result.json").read_text())["val_images"] == 21


def test_a_run_in_simmims_way_releases_an_encoder_without_mask_token(start, shards, folder):
    simmim = {"encode_masked": "true", "decoder.name": "linear", "loss": "l1", "target": "pixels"}
    run_dir = start(options(shards, folder / "simmim", **simmim))
    losses = [x["loss"] for x in records(run_dir)]
    assert losses[-1] < losses[0]
    tensors, state = load_file(run_dir / "encoder.safetensors"), state_of(run_dir, 12)
    decoder = {name for name in state if name.startswith("autoencoder.decoder.")}
    assert decoder == {"autoencoder.decoder.pred.weight", "autoencoder.decoder.pred.bias"}
    assert state["autoencoder.mask_token"].shape == (24,)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).load_state_dict(tensors, strict=True)


def test_a_hybrids_released_batch_norms_are_those_of_whole_images(start, shards, folder):
    args = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    given = {"encoder.name": "vit_small_resnet26d_224", "encoder.args": json.dumps(args), "data.img_size": "64"}
    run_dir = start(options(shards, folder / "hybrid", **given, steps="3", batch_size="4"))
    prefix = "autoencoder.encoder.timm."
    state = {key.removeprefix(prefix): x for key, x in state_of(run_dir, 3).items() if key.startswith(prefix)}
    released = load_file(run_dir / "encoder.safetensors")
    statistics = {key for key in state if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert released.keys() == state.keys() and len(statistics) > 60
    assert all(torch.equal(released[key], state[key]) for key in state.keys() - statistics)
    model = timm.create_model("vit_small_resnet26d_224", num_classes=0, img_size=64, **args)
    model.load_state_dict(state, strict=True)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, x, y, name=name: seen.update({name: x[0].transpose(0, 1)}))
    with torch.no_grad():
        model.train().patch_embed(crops(shards, DataConfig(train=shards[0]), 64, 60))
    for name, x in seen.items():
        mean, var = x.flatten(1).mean(dim=1), x.flatten(1).var(dim=1)
        torch.testing.assert_close(released[f"{name}.running_mean"], mean, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(released[f"{name}.running_var"], var, atol=1e-4, rtol=1e-2)
        assert not torch.allclose(state[f"{name}.running_mean"], mean, atol=1e-4, rtol=1e-1)
    hub = load_file(run_dir / "hub" / "model.safetensors")  # to load it, timm would fetch a resnet26d from the network
    assert hub.keys() == released.keys() and all(torch.equal(x, released[key]) for key, x in hub.items())


# --- a small Swin

SWIN_ARGS = {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
SWIN = {
    "encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": json.dumps(SWIN_ARGS), "data.img_size": "64",
    "steps": "6", "save_every_steps": "2", "log_every_steps": "1", "record_samples": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def swin_run(start, shards, folder) -> Path:
    """A Swin pretrained by one process, never disturbed."""
    return start(options(shards, folder / "swin", **SWIN))


def same_course(run_dir: Path, wanted: Path) -> None:
    assert samples(run_dir) == samples(wanted)
    ours, theirs = records(run_dir), records(wanted)
    assert [x["step"] for x in ours] == [x["step"] for x in theirs] == list(range(1, 7))
    assert [x["loss"] for x in ours] == pytest.approx([x["loss"] for x in theirs], rel=1e-5)
    assert [x["mask_redraws"] for x in ours] == pytest.approx([x["mask_redraws"] for x in theirs])


def test_a_swin_sees_and_learns_the_same_in_other_micro_batches(swin_run, start, shards, tmp_path):
    same_course(start(options(shards, tmp_path / "run", **SWIN, micro_batch_size="2")), swin_run)
    losses = [x["loss"] for x in records(swin_run)]
    assert losses[-1] < losses[0]


def test_a_swin_sees_and_learns_the_same_in_two_processes(swin_run, launch, shards, tmp_path):
    launch("pretrain.py", options(shards, tmp_path / "run", **SWIN), processes=2)
    same_course(tmp_path / "run", swin_run)


def test_the_masks_of_a_swin_are_those_its_sampler_draws(swin_run):
    lines = [json.loads(x) for x in (swin_run / "samples-rank0.jsonl").read_text().splitlines()]
    encoder = build_encoder("swin_tiny_patch4_window7_224", img_size=64, **SWIN_ARGS)
    masking = encoder.mask_sampler(0.75).sample(0, np.arange(len(lines)))
    assert isinstance(masking, Masking) and masking.ids_keep.shape == (48, 4)
    assert [x["mask"] for x in lines] == [zlib.crc32(mask.tobytes()) for mask in masking.ids_keep.numpy()]


def test_a_swin_killed_and_continued_ends_with_the_same_bits(swin_run, start, shards, tmp_path):
    given = options(shards, tmp_path / "run", **SWIN | {"save_every_steps": "1"})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        command("pretrain.py", given), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any((tmp_path / "run" / "state").glob("step-*2/progress.json")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_dir = start(given)
    assert same_weights(run_dir, swin_run)
    moments = "state/step-00000006/optimizer.safetensors"
    ours, wanted = load_file(run_dir / moments), load_file(swin_run / moments)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert set(samples(run_dir)) == set(samples(swin_run)) and [x["step"] for x in records(run_dir)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_released_swin_is_timms(swin_run):
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=64, **SWIN_ARGS).eval()
    model.load_state_dict(load_file(swin_run / "encoder.safetensors"), strict=True)
    hub = timm.create_model(f"local-dir:{swin_run / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(hub.forward_features(images), model.forward_features(images), atol=1e-6, rtol=0)
        assert hub(images).shape == (2, 192)


def test_a_swin_is_fine_tuned_and_probed(swin_run, start, shards, tmp_path):
    tuned = start(tuning_options(shards, swin_run, tmp_path / "tuned"), finetune, FinetuneConfig)
    assert json.loads((tuned / "result.json").read_text())["val_images"] == 21
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, img_size=64, **SWIN_ARGS)
    model.load_state_dict(load_file(tuned / "classifier.safetensors"), strict=True)
    given = {
        key: value
        for key, value in tuning_options(shards, swin_run, tmp_path / "probed").items()
        if key.startswith(("init", "data", "run_dir", "precision", "num_workers"))
    } | {"epochs": "10", "batch_size": "16", "holdout_share": "0.2", "neighbors": "[5]"}
    result = json.loads((start(given, linear_probe, LinearProbeConfig) / "result.json").read_text())
    assert set(result["best_by_input"]) == {"avg", "last4"} and result["val_images"] == 21
    assert result["encoder"].endswith("encoder tensors loaded")
