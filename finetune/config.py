"""The settings of fine-tuning and of the linear probe. Only the standard library is imported, for a quick `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quarterlight.ssl.config import DataConfig, OptimConfig, RunConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer-wise learning-rate decay, and its schedule."""

    base_lr: float = 5e-4
    """Learning rate for 256 images a step; the peak rate is base_lr * batch_size / 256."""
    min_lr: float = 1e-6
    """Rate at the end of the cosine (not scaled by the batch size)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moments."""
    layer_decay: float = 0.75
    """Learning rate of a block / that of the block after it; 1: the same everywhere."""


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """What makes labels soft."""

    mixup: float = 0.8
    """Alpha of mixup's beta distribution; 0: no mixup."""
    cutmix: float = 1.0
    """Alpha of cutmix's beta distribution; 0: no cutmix."""
    label_smoothing: float = 0.1
    """Share of the label spread over all classes."""
    random_erasing: float = 0.25
    """Probability that a rectangle of an image is replaced by noise."""


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """Which images, and how they are cropped."""

    train: str | list[str] | None = None  # type: ignore[assignment]  # checked where it is used
    """Shards to train on: a tar, a glob ('shards/train-*.tar'), braces ('train-{00..09}.tar'), several of these joined
    by '::' or in a list; on a local disk or at https://, s3://, gs:// or hf://. Not needed with eval_only."""
    crop_pct: float | None = None  # type: ignore[assignment]  # 0.875 in training
    """For evaluation: side of the center crop / shorter side of the resized image. null: 0.875, and with eval_only what
    --init was evaluated with (the config.yaml of its run, its config.json, or timm's)."""
    balanced: bool = False
    """Show every class equally often: an epoch is as long as before, with small classes several times in it."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Supervised classification on top of an encoder, all of it or its last blocks trained."""

    init: str | None = None
    """Weights: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:. none or null: train from
    scratch."""
    eval_only: bool = False
    """Train nothing: evaluate the classifier that --init names on data.val."""
    untrained: bool = False
    """Take only the architecture from --init and start from initial weights: the baseline to compare with."""
    num_classes: int | None = None
    """Outputs of the classifier; null: what dataset.json beside the shards says, else the largest label + 1."""
    pool: Literal["avg", "token"] = "avg"
    """avg: mean of the patch tokens, then a norm of its own (MAE's). token: the class token after the final norm."""
    trainable_blocks: float | None = None
    """Train only the last so many blocks, with the norm and the head behind them; what lies below has no backward pass.
    0: the head alone. 0.5 more: also the MLP of the block below. null, or as many as there are: everything."""
    drop_path: float = 0.1
    """Probability that the last block is skipped in training; it grows linearly over the blocks."""
    class_weights: Literal["balanced"] | list[float] | None = None
    """How much an image of each class counts in the loss: a number a class, of which only the ratios matter. balanced:
    1 / (images of the class); null: all alike."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """Mixup, cutmix, label smoothing and random erasing."""
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    """AdamW with layer-wise learning-rate decay, and its schedule."""
    evaluate_every_steps: int | None = None
    """Steps between two evaluations on data.val; null: once an epoch."""
    check_duplicates: bool = True
    """Warn when an image of data.val is in data.train as well, byte for byte (local shards)."""
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    """Which images, and how they are cropped."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(RunConfig):
    """Linear classifiers and nearest neighbors on frozen features."""

    init: str | None = None
    """Encoder weights: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:; null: none."""
    untrained: bool = False
    """Take only the architecture from --init and use initial weights: the baseline to compare with."""
    extract_batch_size: int = 256
    """Images in one forward pass of one process."""
    epochs: int = 90
    """Passes of the linear classifiers over the cached features."""
    batch_size: int = 1024
    """Features in one step of the linear classifiers."""
    base_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Learning rates for 256 features a step; classifiers are trained with each, all in one pass."""
    weight_decay: float = 0.0
    """Penalty w / 2 * |weight|^2 on every classifier, as the C of a logistic regression: 1 / (w * images)."""
    inputs: tuple[Literal["avg", "token", "both", "last4", "last4_avg"], ...] = (
        "avg", "token", "both", "last4", "last4_avg",
    )  # fmt: skip
    """What classifiers look at. avg: mean of the patch tokens. token: the class token. both: these side by side. last4:
    class tokens of the last four blocks (averages of the four stages of a Swin). last4_avg: these and avg. Those that
    an encoder does not have are left out."""
    batch_norm: tuple[bool, ...] = (True, False)
    """Whether features are normalized over the batch first; one classifier is trained with each."""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """How features are kept on disk and in memory; float16 halves both and changes accuracies by some hundredths."""
    holdout_share: float = 0.1
    """Share of data.train that chooses among the classifiers; data.val is only reported on."""
    neighbors: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of nearest neighbors that vote."""
    check_duplicates: bool = True
    """Warn when an image of data.val is in data.train as well, byte for byte (local shards)."""
    temperature: float = 0.07
    """A neighbor's vote weighs exp(cosine similarity / temperature)."""
    stall_timeout_s: float = 900.0
    """Seconds in which nothing moves until the run ends, and says where it hangs."""
