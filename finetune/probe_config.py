"""The settings of the probes that are trained, and of the few-shot table. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quarterlight.ssl.config import OptimConfig, RunConfig, StageConfig


@dataclass(frozen=True, kw_only=True)
class ProbeOptimConfig(OptimConfig):
    """The optimizer of a head, and its schedule."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """lars: MAE's, for large batches. sgd: with momentum. adamw: what attentive probes are usually trained with."""
    base_lr: float = 0.1
    """Learning rate for 256 images a step; the peak rate is base_lr * batch_size / 256."""
    weight_decay: float = 0.0
    """Weight decay of parameters with two or more dimensions; decoupled with adamw."""
    momentum: float = 0.9
    """Of lars and sgd."""
    trust_coeff: float = 0.001
    """Of lars: length of a step / length of a weight, at rate 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw's decay of the first and second moments."""


@dataclass(frozen=True, kw_only=True)
class TrainProbeConfig(StageConfig):
    """A head trained on a frozen encoder, over random crops."""

    init: str | None = None
    """Encoder weights: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:; null: none."""
    untrained: bool = False
    """Take only the architecture from --init and use initial weights: the baseline to compare with."""
    num_classes: int | None = None
    """Outputs of the head; null: what dataset.json beside the shards says, else the largest label + 1."""
    head: Literal["linear", "attentive"] = "linear"
    """linear: batch norm without scale and shift, then a linear layer. attentive: one query attends to the patches."""
    pool: Literal["token", "avg"] | None = None
    """What a linear head looks at: the class token, or the mean of the patch tokens, both behind the encoder's norm.
    null: the class token where there is one."""
    batch_size: int = 16384
    """Images in one optimizer step over all processes and accumulation steps."""
    optim: ProbeOptimConfig = field(default_factory=ProbeOptimConfig)
    """The optimizer of a head, and its schedule."""
    check_duplicates: bool = True
    """Warn when an image of data.val is in data.train as well, byte for byte (local shards)."""
    evaluate_every_steps: int | None = None
    """Steps between two evaluations on data.val; null: once an epoch."""


@dataclass(frozen=True, kw_only=True)
class FewShotConfig(RunConfig):
    """Accuracy with few labels a class, over several draws of them."""

    init: str | None = None
    """Encoder weights: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:; null: none."""
    untrained: bool = False
    """Take only the architecture from --init and use initial weights: the baseline to compare with."""
    method: Literal["linear", "finetune", "both"] = "linear"
    """linear: logistic regression on frozen features. finetune: launch/finetune.py, once for each draw."""
    shots: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of labelled images of each class."""
    draws: int = 5
    """How often the labelled images are drawn, with seeds seed, seed + 1, ..."""
    input: Literal["avg", "token", "both"] | None = None
    """What logistic regression looks at: mean of the patch tokens, class token, or both. null: avg."""
    regression_c: float = 1.0
    """Inverse strength of logistic regression's penalty, scikit-learn's C."""
    extract_batch_size: int = 256
    """Images in one forward pass of one process."""
    check_duplicates: bool = True
    """Warn when an image of data.val is in data.train as well, byte for byte (local shards)."""
    finetune_config: list[str] = field(default_factory=list)
    """YAML files with the options of launch/finetune.py, such as configs/finetune/cifar10_vit_tiny.yaml."""
    launcher: str = ""
    """What starts launch/finetune.py, such as 'accelerate launch --config_file configs/accelerate/gpu8.yaml'; empty:
    this Python, as one process."""
    stall_timeout_s: float = 900.0
    """Seconds in which nothing moves until the run ends, and says where it hangs."""
