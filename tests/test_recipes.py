"""The recipes of configs/finetune against the published numbers, and that each builds what it names."""

from pathlib import Path

import pytest
import timm
import torch

from quarterlight.finetune.config import FinetuneConfig
from quarterlight.finetune.heads import layer_decay_groups
from quarterlight.finetune.partial import freeze
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.optim import build_schedule
from quarterlight.ssl.released import encoder_spec

RECIPES = Path(__file__).parents[1] / "configs" / "finetune"
IMAGENET = 1_281_167
ADAM, SCRATCH_ADAM = (0.9, 0.999), (0.9, 0.95)
# Batch size, peak rate, last rate, weight decay, betas, layer decay, drop path, epochs, of these warm-up, clipping.
MAE = {  # FINETUNE.md of facebookresearch/mae
    "vit_base": (1024, 2e-3, 1e-6, 0.05, ADAM, 0.65, 0.1, 100, 5, None),
    "vit_large": (1024, 4e-3, 1e-6, 0.05, ADAM, 0.75, 0.2, 50, 5, None),
    "vit_huge": (1024, 4e-3, 1e-6, 0.05, ADAM, 0.75, 0.3, 50, 5, None),
}
MAE_SCRATCH = {  # table 11 of its paper
    "vit_base_scratch": (4096, 1.6e-3, 0.0, 0.3, SCRATCH_ADAM, 1.0, 0.1, 300, 20, None),
    "vit_large_scratch": (4096, 1.6e-3, 0.0, 0.3, SCRATCH_ADAM, 1.0, 0.2, 200, 20, None),
    "vit_huge_scratch": (4096, 1.6e-3, 0.0, 0.3, SCRATCH_ADAM, 1.0, 0.2, 200, 20, None),
}
SIMMIM = {  # configs of microsoft/SimMIM and Swin-Transformer; rates are for 512 images there, the last one too
    "simmim_swin_base": (2048, 4 * 1.25e-3, 4 * 2.5e-7, 0.05, ADAM, 0.9, 0.1, 100, 20, 5.0),
    "simmim_swin_base_800ep": (2048, 4 * 1.25e-3, 4 * 2.5e-7, 0.05, ADAM, 0.8, 0.1, 100, 20, 5.0),
    "simmim_swin_large": (2048, 4 * 1.25e-3, 4 * 2.5e-7, 0.05, ADAM, 0.7, 0.2, 100, 20, 5.0),
    "simmim_swinv2_base": (2048, 4 * 1.25e-3, 4 * 2.5e-7, 0.05, ADAM, 0.75, 0.2, 100, 20, 5.0),
}
SUPERVISED = {  # configs of microsoft/Swin-Transformer
    "swin_tiny_scratch": (1024, 2 * 5e-4, 2 * 5e-6, 0.05, ADAM, 1.0, 0.2, 300, 20, 5.0),
    "swin_small_scratch": (1024, 2 * 5e-4, 2 * 5e-6, 0.05, ADAM, 1.0, 0.3, 300, 20, 5.0),
    "swin_base_scratch": (1024, 2 * 5e-4, 2 * 5e-6, 0.05, ADAM, 1.0, 0.5, 300, 20, 5.0),
    "swin_large_22k": (1024, 2 * 2e-5, 2 * 2e-7, 1e-8, ADAM, 1.0, 0.2, 30, 5, 5.0),
}
PUBLISHED = MAE | MAE_SCRATCH | SIMMIM | SUPERVISED
SIZES = {"simmim_swin_base": 192}
WINDOWS = {"simmim_swin_base_800ep": 7, "simmim_swin_large": 14, "simmim_swinv2_base": 14}
ENCODERS = {
    "vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224", "vit_huge": "vit_huge_patch14_224",
    "vit_base_r50": "vit_base_r50_s16_224", "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224", "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224", "swin_large_22k": "swin_large_patch4_window7_224",
    "simmim_swin_base": "swin_base_patch4_window7_224", "swinv2_base_256": "swinv2_base_window8_256",
}  # fmt: skip  # of recipes that take theirs from --init


def recipe(name: str, *more: str) -> FinetuneConfig:
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--run_dir", "x", "--data.train", "x", *more]
    return parse_config(FinetuneConfig, "", words)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_numbers_are_the_published_ones(name: str):
    config = recipe(name)
    batch, lr, min_lr, decay, betas, layer_decay, drop_path, epochs, warmup, clip = PUBLISHED[name]
    assert (config.batch_size, config.epochs) == (batch, epochs)
    steps = -(-IMAGENET * epochs // batch)
    schedule = build_schedule(config.optim, total_steps=steps, samples=IMAGENET, batch_size=batch)
    assert (schedule.peak_lr, schedule.min_lr) == pytest.approx((lr, min_lr))
    assert schedule.warmup_steps == -(-IMAGENET * warmup // batch)
    optim = config.optim
    assert (optim.weight_decay, tuple(optim.betas), optim.layer_decay) == (decay, betas, layer_decay)
    assert (config.drop_path, optim.clip_grad) == (drop_path, clip)
    mixing = config.mixing
    assert (mixing.mixup, mixing.cutmix, mixing.label_smoothing, mixing.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    data = config.data
    assert (data.auto_augment, data.crop_scale, data.hflip) == ("rand-m9-mstd0.5-inc1", (0.08, 1.0), 0.5)
    assert data.img_size == SIZES.get(name, 224) and data.crop_pct == 224 / 256
    assert config.pool == "avg" and config.ema_decay == (0.9999 if name in MAE_SCRATCH else None)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_builds_with_its_sizes_and_every_parameter_learns(path: Path):
    given = [] if path.stem not in ENCODERS else ["--encoder.name", ENCODERS[path.stem]]
    if path.stem.startswith(("cifar10", "digits")):  # sizes come from --init
        given = ["--encoder.name", "vit_tiny_patch16_224"]
    config = recipe(path.stem, *given)
    spec = encoder_spec(config.encoder, config.data, None)
    with torch.device("meta"):
        model = timm.create_model(spec.name, **spec.timm_args(), num_classes=1000, drop_path_rate=config.drop_path)
        assert freeze(model, config.trainable_blocks) == ""
        groups = layer_decay_groups(model, config.optim)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    size = config.data.img_size or 224
    assert tuple(model.patch_embed.img_size) == (size, size)
    if path.stem in WINDOWS:
        assert model.layers[0].blocks[0].window_size == (WINDOWS[path.stem],) * 2
    if path.stem == "simmim_swinv2_base":
        sizes = [stage.blocks[0].attn.pretrained_window_size for stage in model.layers]
        assert sizes == [(12, 12), (12, 12), (12, 12), (6, 6)]
    assert max(group["lr_scale"] for group in groups) == 1.0


def test_every_recipe_is_held_to_something():
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    ours = {"swin_tiny", "swin_small", "swin_base", "swin_large", "swinv2_base_256", "vit_base_r50", "digits"}
    assert names == PUBLISHED.keys() | ours | {"cifar10_vit_tiny", "cifar10_swin_tiny", "cifar10_vit_cpu"}


def test_training_from_scratch_is_said_by_none():
    for said in ("none", "null"):
        assert recipe("vit_base_scratch", "--init", said).init in ("none", None)


# What facebookresearch/mae (lr_decay.py) and SimMIM (optimizer.py) multiply rates by, from the input to the head.
VIT_B_SCALES = {  # 0.65 ** (13 - layer)
    "patch_embed": 0.003697, "blocks.0": 0.005688, "blocks.1": 0.008751, "blocks.2": 0.013463, "blocks.3": 0.020712,
    "blocks.4": 0.031864, "blocks.5": 0.049022, "blocks.6": 0.075419, "blocks.7": 0.116029, "blocks.8": 0.178506,
    "blocks.9": 0.274625, "blocks.10": 0.4225, "blocks.11": 0.65, "norm": 1.0, "head": 1.0,
}  # fmt: skip
SWIN_B_SCALES = {  # 0.9 ** (25 - layer); a merging of patches, timm's layers.s.downsample, with the block before it
    "patch_embed": 0.071790, "layers.0.blocks.0": 0.079766, "layers.0.blocks.1": 0.088629,
    "layers.1.downsample": 0.088629, "layers.1.blocks.0": 0.098477, "layers.1.blocks.1": 0.109419,
    "layers.2.downsample": 0.109419, "layers.2.blocks.0": 0.121577, "layers.2.blocks.8": 0.282430,
    "layers.2.blocks.17": 0.729, "layers.3.downsample": 0.729, "layers.3.blocks.0": 0.81, "layers.3.blocks.1": 0.9,
    "norm": 1.0, "head": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "table"), [("vit_base", VIT_B_SCALES), ("swin_base", SWIN_B_SCALES)])
def test_layer_decay_is_that_of_the_published_code(name: str, table: dict[str, float]):
    config = recipe(name, "--encoder.name", ENCODERS[name])
    with torch.device("meta"):
        model = timm.create_model(ENCODERS[name], num_classes=1000)
        groups = layer_decay_groups(model, config.optim)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    found = {n: scales[parameter] for n, parameter in model.named_parameters()}
    for part, scale in table.items():
        of_part = {found[n] for n in found if n.startswith(f"{part}.")}
        assert len(of_part) == 1 and of_part.pop() == pytest.approx(scale, rel=2e-4), part
    if name == "vit_base":
        assert found["pos_embed"] == found["cls_token"] == found["patch_embed.proj.weight"]
