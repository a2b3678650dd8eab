"""A head on a frozen encoder: its optimizer, its release, and the command, killed and continued by two processes."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TINY, TINY_PRETRAIN, arguments
from ranks import Nursery, wait_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quarterlight.finetune.features import digest_of
from quarterlight.finetune.frozen import FrozenClassifier, build_head, fold
from quarterlight.finetune.lars import build_head_optimizer
from quarterlight.finetune.probe_config import ProbeOptimConfig, TrainProbeConfig
from quarterlight.finetune.train_probe import train_probe
from quarterlight.ssl.augment import CenterCrop, Normalize, random_crop_box
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import DataConfig, PretrainConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.index import open_index
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.pretrain import pretrain
from quarterlight.ssl.released import read_weights

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
CODE = (
    "from quarterlight.finetune.probe_config import TrainProbeConfig\n"
    "from quarterlight.finetune.train_probe import train_probe\n"
    'run_command(lambda: parse_config(TrainProbeConfig, ""), train_probe)'
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(run_dir), "steps": "40"}
    run_command(lambda: parse_config(PretrainConfig, "", arguments(given)), pretrain)
    return run_dir


def options(shards: tuple[str, str], init: Path, run_dir: Path, **more: str) -> dict[str, str]:
    given = {key: value for key, value in TINY.items() if not key.startswith(("encoder", "data.img"))}
    return given | {
        "init": str(init), "data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir),
        "batch_size": "20", "micro_batch_size": "5", "steps": "30", "optim.base_lr": "5", "optim.warmup_steps": "2",
        "save_every_steps": "5", "log_every_steps": "5", "evaluate_every_steps": "10",
    } | more  # fmt: skip


def start(shards: tuple[str, str], init: Path, run_dir: Path, **more: str) -> Path:
    words = arguments(options(shards, init, run_dir, **more))
    run_command(lambda: parse_config(TrainProbeConfig, "", words), train_probe)
    return run_dir


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = sorted((run_dir / "state").iterdir())[-1]
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def test_lars_is_the_papers_and_maes_with_plain_steps_for_a_bias():
    """The update as You et al. 2017 and MAE's README describe it, written down once more in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    optimizer = build_head_optimizer(layer, ProbeOptimConfig(name="lars"))
    for step in range(20):
        images = torch.randn(16, 7, dtype=torch.float64)
        nn.functional.cross_entropy(layer(images), torch.arange(16) % 5).backward()
        lr = 6.4 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients = [layer.weight.grad.clone(), layer.bias.grad.clone()]
        optimizer.step()
        optimizer.zero_grad()
        gradients[0] *= 0.001 * weight.norm() / gradients[0].norm()
        for i, value in enumerate((weight, bias)):
            moments[i] = 0.9 * moments[i] + gradients[i]
            value -= lr * moments[i]
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-7)  # timm adds 1e-8 to a norm
    torch.testing.assert_close(layer.bias.detach(), bias, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_step_that_is_skipped_on_the_device_leaves_everything_as_it_is(name: str):
    def trained(skips: tuple[int, ...]) -> tuple[nn.Module, list[torch.Tensor]]:
        torch.manual_seed(0)
        layer = nn.Linear(7, 5)
        optimizer = build_head_optimizer(layer, ProbeOptimConfig(name=name))
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        images = torch.randn(4, 16, 7)
        for step in [step for i in range(4) for step in ([-1, i] if i in skips else [i])]:
            layer(images[step] * (float("nan") if step < 0 else 1.0)).square().mean().backward()
            optimizer.found_inf = torch.tensor(float(step < 0))
            optimizer.step()
            optimizer.zero_grad()
        return layer, [x for p in layer.parameters() for x in optimizer.state[p].values()]

    layer, moments = trained((0, 2))
    wanted, wanted_moments = trained(())
    for ours, other in zip([*layer.parameters(), *moments], [*wanted.parameters(), *wanted_moments], strict=True):
        assert torch.equal(ours, other)


def test_crops_are_drawn_once_and_clipped_as_in_maes_probe():
    """Against the distribution written down with numpy, over images that are wide, high and square."""
    random = np.random.default_rng(0)
    for height, width in ((375, 500), (64, 64), (500, 100)):
        u = random.uniform(size=(4_000, 22))
        boxes = np.array([random_crop_box(height, width, row, (0.08, 1.0), (3 / 4, 4 / 3), True) for row in u])
        area = height * width * random.uniform(0.08, 1, 4_000)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 4_000))
        wide = np.minimum(np.round(np.sqrt(area * aspect)), width)
        high = np.minimum(np.round(np.sqrt(area / aspect)), height)
        top, left, h, w = boxes.T
        assert ((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width) & (h > 0) & (w > 0)).all()
        for ours, wanted in ((h, high), (w, wide), (h * w, high * wide)):
            shares = [0.1, 0.3, 0.5, 0.7, 0.9]
            np.testing.assert_allclose(np.quantile(ours, shares), np.quantile(wanted, shares), rtol=0.1)
            assert ours.mean() == pytest.approx(wanted.mean(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "args", "given"),
    [
        ("vit_tiny_patch16_224", VIT, {}),
        ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2}, {"pool": "avg"}),
        ("vit_tiny_patch16_224", VIT, {"head": "attentive"}),
        ("vit_medium_patch16_rope_reg1_gap_256", VIT, {"pool": "avg"}),
        ("vit_medium_patch16_rope_reg1_gap_256", VIT, {"head": "attentive"}),
        ("swin_tiny_patch4_window7_224", SWIN, {}),
    ],
)
def test_what_is_released_computes_what_was_trained(name: str, args: dict, given: dict):
    torch.manual_seed(0)
    encoder = build_encoder(name, **args).eval()
    spec = ModelSpec(name, args, (0.5,) * 3, (0.5,) * 3)
    config = TrainProbeConfig(run_dir="x", data=DataConfig(train="x"), **given)
    head, pool, built = build_head(config, encoder, spec, 5)
    classifier = FrozenClassifier(encoder, head, pool, b"digest")
    assert [key for key in classifier.state_dict() if not key.startswith(("head.", "_extra"))] == []
    if config.head == "attentive":
        with torch.no_grad():
            for layer in (head[0].q, head[0].kv):
                layer.weight.mul_(5)  # so that it matters what is attended to
    images = torch.randn(6, 3, *encoder.img_size)
    for _ in range(30):  # so that batch norm has measured something
        classifier.train()(images + torch.randn_like(images))
    with torch.no_grad():
        torch.testing.assert_close(fold(classifier, built)(images), classifier.eval()(images), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "more", [{"optim.name": "sgd"}, {"head": "attentive", "optim.name": "adamw", "optim.base_lr": "0.05"}]
)
def test_it_learns_colors_and_its_classifier_is_timms(shards, pretrained, tmp_path, more):
    run_dir = start(shards, pretrained, tmp_path / "run", **more)
    found = result(run_dir)
    assert found["finished"] and found["val_images"] == 21 and found["val_top1"] > 50  # four classes
    low, high = found["val_top1_interval"]
    assert low < found["val_top1"] <= high
    assert not any("blocks" in key and "attn_pool" not in key for key in state(run_dir))  # the encoder is in no state
    weights = read_weights(str(run_dir / "classifier.safetensors"))
    model = timm.create_model(weights.spec.name, num_classes=4, **weights.spec.timm_args()).eval()
    model.load_state_dict(load_file(run_dir / "classifier.safetensors"), strict=True)
    index = open_index(shards[1])
    batch = Samples(index, FileOrder(np.arange(21)), CenterCrop((16, 16), 1.0), 0).batch(0, 21)
    with torch.no_grad():
        said = model(Normalize(weights.spec.mean, weights.spec.std)(batch.images)).argmax(dim=1)
    assert found["val_top1"] == pytest.approx(100 * float((said == batch.labels).float().mean()), abs=1e-3)


def test_two_processes_killed_and_continued_end_with_the_same_bits(shards, pretrained, tmp_path):
    nursery = Nursery(tmp_path)
    given = options(shards, pretrained, tmp_path / "wanted", steps="12", save_every_steps="3")
    try:
        with nursery.run(2, given, code=CODE) as ranks:
            assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].said()
        given["run_dir"] = str(tmp_path / "ours")
        with nursery.run(2, given, code=CODE) as ranks:
            wait_until((tmp_path / "ours" / "state" / "step-00000003").exists, alive=ranks)
            for rank in ranks:
                os.kill(rank.pid, signal.SIGKILL)
        with nursery.run(2, given, code=CODE) as ranks:
            assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].said()
            assert "continuing from step" in ranks[0].said()
    finally:
        nursery.close()
    ours, wanted = state(tmp_path / "ours"), state(tmp_path / "wanted")
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    figures = [result(tmp_path / name) for name in ("ours", "wanted")]
    assert figures[0]["val_top1"] == figures[1]["val_top1"] and figures[0]["val_loss"] == figures[1]["val_loss"]
    released = [load_file(tmp_path / name / "classifier.safetensors") for name in ("ours", "wanted")]
    assert all(torch.equal(released[0][name], released[1][name]) for name in released[1])


def test_a_run_is_not_continued_on_another_encoder(shards, pretrained, tmp_path, capsys):
    init = tmp_path / "encoder.safetensors"
    shutil.copy(pretrained / "encoder.safetensors", init)
    run_dir = start(shards, init, tmp_path / "run", steps="5")
    with safe_open(init, framework="pt") as file:
        metadata = file.metadata()
    other = {name: x + 1e-3 if name == "norm.bias" else x for name, x in load_file(init).items()}
    save_file({name: x.clone() for name, x in other.items()}, init, metadata=metadata)
    with pytest.raises(SystemExit):
        start(shards, init, run_dir, steps="5")
    assert "not the weights that the run in run_dir began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.val": "null"}, "data.val is not given"),
        ({"ema_decay": "0.9"}, "ema_decay 0.9: only a head is trained"),
        ({"head": "attentive", "pool": "avg"}, "leave pool null"),
        ({"head": "attention"}, "it must be one of 'linear', 'attentive'"),
        ({"micro_batch_size": "1"}, "batch norm needs two images"),
        ({"num_classes": "2"}, "labels up to 3"),
        ({"optim.nam": "sgd"}, "Did you mean optim.name"),
        ({"optim.momentum": "1"}, "optim.momentum is 1.0: it must be at least 0 and at most"),
    ],
)
def test_a_mistake_gets_one_sentence(shards, pretrained, tmp_path, capsys, change, said):
    with pytest.raises(SystemExit):
        start(shards, pretrained, tmp_path / "run", **change)
    errors = capsys.readouterr().err
    assert said in errors and errors.startswith("error: ")


def test_the_digest_is_of_weights_and_of_normalization():
    torch.manual_seed(0)
    encoder, normalize = build_encoder("vit_tiny_patch16_224", **VIT), Normalize((0.5,) * 3, (0.5,) * 3)
    before = digest_of(encoder, normalize)
    assert before == digest_of(encoder, Normalize((0.5,) * 3, (0.5,) * 3))
    assert before != digest_of(encoder, Normalize((0.5,) * 3, (0.25,) * 3))
    classifier = FrozenClassifier(encoder, nn.Linear(2, 2), None, before)
    other = FrozenClassifier(encoder, nn.Linear(2, 2), None, bytes(32))
    with pytest.raises(InputError, match="give the same --init"):
        other.load_state_dict(classifier.state_dict())
