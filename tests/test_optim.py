"""Schedules and parameter groups against plain restatements of facebookresearch/mae's."""

import math
import re

import pytest
import timm
import torch
from torch import nn

from quarterlight.finetune.config import FinetuneOptimConfig
from quarterlight.finetune.heads import layer_decay_groups
from quarterlight.ssl.augment import Normalize
from quarterlight.ssl.config import DecoderConfig, OptimConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import build_autoencoder
from quarterlight.ssl.optim import Schedule, build_adamw, build_schedule, decay_groups, set_lr
from quarterlight.ssl.pretrain import PretrainTask

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def mae_lr(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """facebookresearch/mae, util/lr_sched.py, restated; `epoch` is fractional."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def mae_fine_tuning(
    name: str, ndim: int, *, depth: int, layer_decay: float, weight_decay: float
) -> tuple[float, float]:
    """facebookresearch/mae, util/lr_decay.py, restated: (lr_scale, weight_decay) of a ViT's parameter."""
    decay = 0.0 if ndim == 1 or name in ("pos_embed", "cls_token") else weight_decay
    block = re.match(r"blocks\.(\d+)\.", name)
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        layer = 0
    elif block:
        layer = int(block[1]) + 1
    else:
        layer = depth + 1
    return layer_decay ** (depth + 1 - layer), decay


def classifier(pool: str) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, global_pool=pool, **SHAPE)


def group_of(optimizer_groups: list[dict], model: nn.Module) -> dict[str, dict]:
    """Returns each trainable parameter's group by name; fails when one is in none or in two."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict] = {}
    for group in optimizer_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.fixture(scope="module")
def task() -> PretrainTask:
    autoencoder = build_autoencoder(
        "vit_tiny_patch16_224", decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2), **SHAPE
    )
    return PretrainTask(autoencoder, Normalize((0.5,) * 3, (0.5,) * 3))


STEPS_PER_EPOCH, EPOCHS, WARMUP_EPOCHS = 7, 10, 2
SCHEDULE = Schedule(3e-3, 1e-5, WARMUP_EPOCHS * STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH)
REFERENCE = {"lr": 3e-3, "min_lr": 1e-5, "warmup_epochs": WARMUP_EPOCHS, "epochs": EPOCHS}


def test_after_the_warm_up_the_rate_is_that_of_mae():
    for step in range(SCHEDULE.warmup_steps, SCHEDULE.total_steps):
        assert SCHEDULE.lr_at(step) == pytest.approx(mae_lr(step / STEPS_PER_EPOCH, **REFERENCE), rel=1e-12)


def test_in_the_warm_up_the_rate_is_that_of_mae_one_step_later():
    for step in range(SCHEDULE.warmup_steps):
        assert SCHEDULE.lr_at(step) == pytest.approx(mae_lr((step + 1) / STEPS_PER_EPOCH, **REFERENCE), rel=1e-12)


def test_the_rate_is_never_zero_and_peaks_at_the_end_of_the_warm_up():
    rates = [SCHEDULE.lr_at(step) for step in range(SCHEDULE.total_steps)]
    assert min(rates) > 0
    assert max(rates) == rates[SCHEDULE.warmup_steps - 1] == rates[SCHEDULE.warmup_steps] == 3e-3
    assert rates[: SCHEDULE.warmup_steps] == sorted(rates[: SCHEDULE.warmup_steps])
    assert rates[SCHEDULE.warmup_steps :] == sorted(rates[SCHEDULE.warmup_steps :], reverse=True)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert Schedule(1.0, 0.0, 0, 4).lr_at(0) == 1.0


def test_a_run_shorter_than_its_warm_up_has_rates():
    rates = [Schedule(1.0, 0.0, 10, 4).lr_at(step) for step in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert Schedule(1.0, 0.0, 4, 4).lr_at(3) == 1.0


def test_the_peak_rate_is_scaled_by_the_batch_size_and_the_floor_is_not():
    schedule = build_schedule(OptimConfig(base_lr=1e-3, min_lr=1e-5), total_steps=9, samples=100, batch_size=64)
    assert schedule == Schedule(1e-3 * 64 / 256, 1e-5, 0, 9)


def test_a_warm_up_in_epochs_is_counted_in_steps():
    config = OptimConfig(warmup_epochs=2.0)
    assert build_schedule(config, total_steps=99, samples=100, batch_size=64).warmup_steps == 4
    assert build_schedule(OptimConfig(warmup_steps=3), total_steps=99, samples=100, batch_size=64).warmup_steps == 3


def test_a_warm_up_given_twice_is_refused():
    with pytest.raises(InputError, match="warmup_steps=3.*warmup_epochs=1"):
        build_schedule(OptimConfig(warmup_steps=3, warmup_epochs=1.0), total_steps=9, samples=100, batch_size=64)


def test_every_trainable_parameter_is_in_exactly_one_group(task: PretrainTask):
    assert len(group_of(decay_groups(task, 0.05), task)) > 40


def test_biases_and_norms_are_not_decayed(task: PretrainTask):
    for name, group in group_of(decay_groups(task, 0.05), task).items():
        if name.endswith(".bias") or ".norm" in name or "decoder.norm" in name:
            assert group["weight_decay"] == 0.0, name


def test_matrices_class_token_and_mask_token_are_decayed(task: PretrainTask):
    groups = group_of(decay_groups(task, 0.05), task)
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    assert {"autoencoder.encoder.timm.cls_token", "autoencoder.decoder.mask_token"} <= decayed
    assert {
        name for name in groups if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight"))
    } <= decayed


def test_fixed_positions_are_in_no_group(task: PretrainTask):
    assert not any("pos_embed" in name for name in group_of(decay_groups(task, 0.05), task))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layer_decay_is_that_of_mae(pool: str):
    model = classifier(pool)
    groups = layer_decay_groups(model, FinetuneOptimConfig(layer_decay=0.75))
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    for name, group in group_of(groups, model).items():
        expected = mae_fine_tuning(name, shapes[name], depth=2, layer_decay=0.75, weight_decay=0.05)
        assert (group["lr_scale"], group["weight_decay"]) == pytest.approx(expected), name


def test_the_rate_of_a_layer_is_the_schedules_times_its_scale():
    model = classifier("avg")
    groups = layer_decay_groups(model, FinetuneOptimConfig(layer_decay=0.5))
    optimizer = build_adamw(groups, OptimConfig())
    for lr in (1e-3, 2e-4):
        set_lr(optimizer, lr)
        rates = {name: group["lr"] for name, group in group_of(optimizer.param_groups, model).items()}
        assert rates["head.weight"] == pytest.approx(lr)
        assert rates["blocks.1.mlp.fc1.weight"] == pytest.approx(lr / 2)
        assert rates["blocks.0.mlp.fc1.weight"] == pytest.approx(lr / 4)
        assert rates["pos_embed"] == pytest.approx(lr / 8)


def test_groups_without_a_scale_get_the_rate_itself(task: PretrainTask):
    optimizer = build_adamw(decay_groups(task, 0.05), OptimConfig())
    set_lr(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_the_optimizer_steps_as_plain_adamw_does():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    mine = build_adamw(decay_groups(ours, 0.1), OptimConfig(betas=(0.8, 0.99)))
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.8, 0.99), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    set_lr(mine, 1e-2)
    x = torch.randn(7, 5)
    for _ in range(5):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-6)
