"""Every setting of the commands, as documented dataclasses. The text under a field is its `--help`.

Only the standard library is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import InputError

# What a model's argument may be. Were anything allowed, jsonargparse would make an object of {class_path: ...}, and a
# YAML file could run whatever it names.
Plain = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are cropped."""

    train: str | list[str]
    """Shards to train on: a tar, a glob ('shards/train-*.tar'), braces ('train-{00..09}.tar'), several of these joined
    by '::' or in a list; on a local disk or at https://, s3://, gs:// or hf://."""
    train_weights: list[float] | None = None
    """How often an epoch shows the samples of each source in data.train: 2 twice, 0.5 every other epoch. null: once."""
    val: str | list[str] | None = None
    """Shards to evaluate on, in the same forms."""
    img_size: int | tuple[int, int] | None = None
    """Image side, or height and width, in pixels after cropping. null: what the encoder is built for."""
    in_chans: Literal[1, 3] = 3
    """Channels decoded: 3 for color, 1 for grey."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, smallest and largest."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of a random crop, smallest and largest."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    auto_augment: str | None = None
    """A policy of timm's, such as rand-m9-mstd0.5-inc1, applied after crop and flip. null: none (MAE pretrains so)."""
    crop_pct: float = 0.875
    """For evaluation: side of the center crop / shorter side of the resized image."""
    samples_per_class: int | None = None
    """Train on this many samples of each class only, drawn by the seed; null: on all."""
    mean: tuple[float, ...] | None = None
    """Channel means subtracted after scaling to [0, 1]; null: those the weights in --init expect, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations divided by; null: those the weights in --init expect, else ImageNet's."""
    repeats: int = 1
    """Crops and masks in a row from one decoding of an image (repeated augmentation); a pass over all images then takes
    as many epochs."""
    block_samples: int | None = None
    """Shuffle whole shards, and samples only among about this many at a time. null: among all of them, or among 16384
    of remote shards."""
    lanes: int | None = None
    """Parts of a batch that go through stretches of the data of their own, so that each machine fetches its part only.
    null: 1, or 8 for remote shards."""
    cache_dir: str | None = None
    """Folder on a local disk for remote shards, and for indexes and decoded images of shards in folders that cannot be
    written. null: quarterlight/shards in $XDG_CACHE_HOME, or in ~/.cache."""
    cache_gb: float = 100.0
    """How much of remote shards is kept there, in gigabytes (10^9 bytes), train and val together."""
    max_bad_share: float = 0.01
    """Share of the samples read so far that may be unreadable before the run stops (ten always may)."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which timm model encodes the images."""

    name: str | None = None
    """A timm model name, such as vit_base_patch16_224. null: the one that --init names."""
    img_size: int | tuple[int, int] | None = None
    """Image side, or height and width, in pixels. null: data.img_size, or else timm's size for the name."""
    args: dict[str, Plain | list[Plain] | dict[str, Plain]] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as {patch_size: 4, embed_dim: 192, depth: 6, num_heads: 6}."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which units of an image are hidden from the encoder."""

    strategy: Literal["random", "block", "grid"] = "random"
    """random: uniformly, without replacement. block: in rectangles (BEiT's). grid: a regular pattern, shifted."""
    ratio: float = 0.75
    """Share of the units that is hidden, 0 <= ratio < 1."""
    unit: int | None = None
    """Side in pixels of what is hidden as a whole. null: a ViT's patch, or what ends as one token of a Swin (32)."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The light network that predicts the hidden patches; thrown away after pretraining."""

    name: Literal["transformer", "cross", "linear"] = "transformer"
    """transformer: MAE's, over visible and mask tokens. cross: mask tokens look at visible ones. linear: SimMIM's."""
    multi_scale: bool = False
    """Feed it the tokens of all stages of a Swin, not of the last only."""
    embed_dim: int = 512
    """Width of the decoder's tokens, a multiple of 4."""
    depth: int = 8
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads in a block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP / embed_dim."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and a cosine schedule with linear warm-up, both counted in steps."""

    base_lr: float = 1.5e-4
    """Learning rate for 256 images a step; the peak rate is base_lr * batch_size / 256."""
    min_lr: float = 0.0
    """Rate at the end of the cosine (not scaled by the batch size)."""
    weight_decay: float = 0.05
    """Decoupled weight decay of parameters with two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and second moments."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up in epochs; give this or warmup_steps."""
    warmup_steps: int | None = None
    """Length of the linear warm-up in steps; give this or warmup_epochs."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; null: no clipping."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage has: a folder, images and an encoder."""

    run_dir: str
    """Folder of this run; the same command continues the run that is in it."""
    seed: int = 0
    """Decides the sample order, crops, masks and initial weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue what is in run_dir, if anything. never: refuse a run_dir that holds a run."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Autocast type of the forward pass; weights and optimizer stay in float32. no: float32 everywhere."""
    num_workers: int = 4
    """Loader processes for each training process; 0 decodes in the training process itself."""
    data: DataConfig
    """Which images, and how they are cropped."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Which timm model encodes the images."""
    allow_partial: bool = False
    """Take weights in --init that lack some of the encoder's tensors, which then start afresh. false: refuse them."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(RunConfig):
    """What pretraining and fine-tuning share: a length, batches and records."""

    compile: bool = False
    """torch.compile the model: worth its minutes on a GPU; on a CPU, if at all, in long runs of small encoders."""
    batch_size: int = 256
    """Images in one optimizer step over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Images in one forward pass of one process; null: batch_size / processes (no accumulation)."""
    epochs: float | None = None
    """Length of the run in passes over data.train; give this or steps."""
    steps: int | None = None
    """Length of the run in optimizer steps; give this or epochs."""
    save_every_steps: int = 1000
    """Steps between two saved states."""
    keep_states: int = 2
    """How many of the newest states stay on disk."""
    log_every_steps: int = 20
    """Steps between two log lines."""
    ema_decay: float | None = None
    """Also keep and release an exponential moving average of the weights, such as 0.9999 of it a step. null: none."""
    max_skipped_steps: int = 5
    """Steps in a row whose loss or gradients are not finite, each skipped, before the run stops."""
    stall_timeout_s: float = 900.0
    """Seconds in which no step, save or batch of an evaluation ends, until the run does, and says where it hangs."""
    grad_checkpointing: bool = False
    """Compute the blocks anew in the backward pass instead of keeping what they have computed: slower, less memory."""
    record_samples: bool = False
    """Write key, pixel hash and mask hash of every sample to samples-rankN.jsonl, to audit what a run has seen."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Looks at how well the encoder's features tell classes apart; they change nothing of what a run computes."""

    every_steps: int = 0
    """Steps between two looks, each a forward pass over `images` whole images of both sets; 0: none."""
    train: str | list[str] | None = None
    """Labelled shards whose features are neighbors and fitted to, in the forms of data.train. null: data.train."""
    val: str | list[str] | None = None
    """Labelled shards to report on. null: data.val."""
    images: int = 10_000
    """The most images of either set that are looked at, drawn by the seed."""
    neighbors: int = 20
    """Number of nearest neighbors that vote."""
    temperature: float = 0.07
    """A neighbor's vote weighs exp(cosine similarity / temperature)."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """Masked-autoencoder pretraining."""

    init: str | None = None
    """Weights to start the encoder from: a run folder, a file, a timm name, hf-hub: or local-dir:; null: none. What
    loads is told in docs/weights.md."""
    init_decoder: bool = False
    """Start the decoder from --init as well: a full MAE or SimMIM file, a Hugging Face folder, or a run with states."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Which units of an image are hidden from the encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The light network that predicts the hidden patches."""
    target: Literal["norm_pix", "pixels", "pca", "hog"] = "norm_pix"
    """Predict pixels normalized within a patch, pixels, their principal components, or histograms of gradients."""
    pca_components: int = 96
    """Number of principal components with target pca."""
    loss: Literal["mse", "l1"] = "mse"
    """Squared or absolute error."""
    pred_share: float = 1.0
    """Share of the hidden patches that a step predicts; below 1 steps are faster, most with decoder.name cross."""
    encode_masked: bool = False
    """Let the encoder see mask tokens instead of leaving hidden patches out: SimMIM's way, and several times slower."""
    positions: Literal["sincos", "learned", "none"] | None = None
    """A ViT's absolute positions. null: those in --init, else sincos."""
    train_positions: bool | None = None
    """Whether pretraining changes them. null: yes with positions learned, else no (those of --init neither)."""
    picture_every_steps: int = 1000
    """Steps between two pictures of reconstructions; 0: only at the end."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Looks at how well the encoder's features tell classes apart, by k-NN and a linear classifier."""


def steps_in(what: str, steps: int | None, epochs: float | None, *, samples: int, batch_size: int) -> int:
    """Returns a length in steps, given in steps or in epochs (rounded up, so that no sample is short of an epoch).

    Raises InputError unless exactly one of the two is given.
    """
    if (steps is None) == (epochs is None):
        prefix = "" if what == "the run" else "optim.warmup_"
        way_out = (
            "give one" if steps is None else f"take one back, as by --{prefix}epochs null"
        )  # a recipe gives epochs
        raise InputError(
            f"the length of {what} is given by {prefix}steps or by {prefix}epochs (now {prefix}steps={steps}, "
            f"{prefix}epochs={epochs}): {way_out}"
        )
    return steps if steps is not None else math.ceil(round(epochs * samples / batch_size, 6))  # type: ignore[operator]


def flat(config: object, prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.base_lr": 1e-4, ...}: a dataclass or nested dictionary with dotted keys."""
    items = vars(config) if dataclasses.is_dataclass(config) else config
    out: dict[str, Any] = {}
    for key, value in items.items():  # type: ignore[union-attr]
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and value):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


# What numbers an option takes, by the last part of its name: (smallest, largest), both allowed; None: no bound.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "num_workers": (0, None), "batch_size": (1, None), "micro_batch_size": (1, None), "extract_batch_size": (1, None),
    "epochs": (1e-9, None), "steps": (1, None), "warmup_epochs": (0, None), "warmup_steps": (0, None),
    "save_every_steps": (1, None), "keep_states": (1, None), "log_every_steps": (1, None),
    "picture_every_steps": (0, None), "evaluate_every_steps": (0, None), "samples_per_class": (1, None),
    "img_size": (1, None), "crop_scale": (1e-9, 1), "crop_ratio": (1e-9, None), "crop_pct": (1e-9, 1), "hflip": (0, 1),
    "std": (1e-9, None), "max_bad_share": (0, 1), "base_lr": (0, None), "min_lr": (0, None), "base_lrs": (0, None),
    "weight_decay": (0, None), "betas": (0, 0.9999999), "clip_grad": (1e-9, None), "layer_decay": (1e-9, 1),
    "unit": (1, None), "pca_components": (1, None), "pred_share": (1e-9, 1), "depth": (1, None),
    "embed_dim": (4, None), "num_heads": (1, None), "mlp_ratio": (1e-9, None),
    "drop_path": (0, 0.999), "mixup": (0, None), "cutmix": (0, None), "label_smoothing": (0, 0.999),
    "random_erasing": (0, 1), "num_classes": (1, None), "holdout_share": (0, 1), "neighbors": (1, None),
    "temperature": (1e-9, None), "train_weights": (1e-3, 1000), "repeats": (1, None), "block_samples": (1, None),
    "lanes": (1, None), "cache_gb": (1e-9, None), "max_skipped_steps": (0, None), "ema_decay": (0, 0.9999999),
    "stall_timeout_s": (1, None), "trainable_blocks": (0, None), "every_steps": (0, None), "images": (1, None),
    "momentum": (0, 0.9999999), "trust_coeff": (1e-9, None), "shots": (1, None), "draws": (1, None),
    "regression_c": (1e-9, None),
    "part_images": (1, None), "top_k": (1, None), "pictures": (0, None),
    "patch": (1, None), "drop_shares": (1e-9, 0.999), "shuffle_grids": (2, None),
    "num_images": (1, 64), "num_features": (1, None), "mask_ratios": (0, 0.9999999),
    "series_pictures": (1, None), "picture_width": (16, None), "port": (1, 65535),
}  # fmt: skip


def check_ranges(config: object) -> None:
    """Raises InputError for the first number in a config that is out of its range, or a pair in the wrong order."""
    for key, value in flat(config).items():
        name = key.rpartition(".")[2]
        if key.startswith("encoder.args") or name not in RANGES:
            continue
        low, high = RANGES[name]
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers:
            raise InputError(f"{key} is empty: give at least one number")
        for number in numbers:
            if isinstance(number, str):  # an option of another command with a name that there is a number's
                continue
            in_range = number is None or ((low is None or number >= low) and (high is None or number <= high))
            if number is not None and not (in_range and math.isfinite(number)):
                least = "above 0" if low == 1e-9 else f"at least {low}"
                most = "" if high is None else f" and at most {high}"
                finite = " and finite" if in_range else ""
                raise InputError(f"{key} is {number}: it must be {least}{most}{finite}")
        if name in ("crop_scale", "crop_ratio") and numbers[0] > numbers[1]:
            raise InputError(f"{key} is {list(numbers)}: the smallest comes first")
