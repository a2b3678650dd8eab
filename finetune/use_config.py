"""The settings of the commands that use a network: predict, embed, evaluate, neighbors. Only the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quarterlight.ssl.config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How images are made ready for the network."""

    img_size: int | tuple[int, int] | None = None
    """Image side, or height and width, in pixels after cropping. null: what the weights were trained at."""
    crop_pct: float | None = None
    """Side of the center crop / shorter side of the resized image. null: what --init was evaluated with (the
    config.yaml of its run, or timm's), else 0.875."""
    mean: tuple[float, ...] | None = None
    """Channel means subtracted after scaling to [0, 1]; null: those the weights expect, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations divided by; null: those the weights expect, else ImageNet's."""
    cache_dir: str | None = None
    """Folder on a local disk for remote shards. null: quarterlight/shards in $XDG_CACHE_HOME, or in ~/.cache."""
    cache_gb: float = 100.0
    """How much of remote shards is kept there, in gigabytes (10^9 bytes)."""


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(CropConfig):
    """Which labelled images, and how they are made ready."""

    val: str | list[str]
    """Shards to evaluate on: a tar, a glob ('shards/val-*.tar'), braces ('val-{00..09}.tar'), several of these joined
    by '::' or in a list; on a local disk or at https://, s3://, gs:// or hf://."""


@dataclass(frozen=True, kw_only=True)
class UseConfig:
    """A network with its weights, and how fast it is run."""

    init: str
    """The network: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Which timm model it is, where the weights do not say."""
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Autocast type of the forward pass. no: float32 everywhere."""
    batch_size: int = 256
    """Images in one forward pass of one process."""
    num_workers: int = 4
    """Loader processes for each process; 0 decodes in the process itself."""


@dataclass(frozen=True, kw_only=True)
class OutConfig(UseConfig):
    """What the commands that write a row for each image share."""

    data: CropConfig = field(default_factory=CropConfig)
    """How images are made ready for the network."""
    part_images: int = 8192
    """At most so many images have their results written together in OUT.parts (a 64th of all, if that is fewer, but
    not below 256); a command that was killed goes on behind them."""
    strict: bool = False
    """End with status 1 when an image could not be read. The file is written all the same."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(OutConfig):
    """The most probable classes of each image."""

    out: str
    """File to write, .csv or .parquet (which needs pyarrow): a row for each image, in the order of the input."""
    top_k: int | None = None
    """Classes for each image, the most probable one first. null: 5, or all where there are fewer."""
    class_names: str | None = None
    """Text file with the name of a class in each line. null: the names that the classifier was saved with, if any."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(OutConfig):
    """The features of each image."""

    out: str
    """File to write, .safetensors or .parquet (which needs pyarrow): a row for each image, in the order of the
    input."""
    pool: Literal["avg", "token"] = "avg"
    """avg: mean of the patch tokens. token: the class token."""
    layers: tuple[int, ...] | None = None
    """Blocks of a ViT, or stages of a Swin, whose features are put side by side, as [-4, -3, -2, -1] for the last
    four; counted from 0, or from the end with -1. null: the last one."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers in the file."""


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(UseConfig):
    """Accuracy of a classifier when parts of the images are dropped or shuffled (Naseer et al. 2021)."""

    data: LabelledConfig
    """Which images, and how they are made ready for the network."""
    run_dir: str
    """Folder for robustness.csv, robustness.png and result.json."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same evaluation is done again in its folder. never: refuse a run_dir that holds one."""
    seed: int = 0
    """Decides which patches are dropped at random, and how tiles are shuffled."""
    drop_shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Shares of the patches that are dropped, one curve point each (0 is always measured)."""
    drop_orders: tuple[Literal["random", "salient", "non_salient"], ...] = ("random", "salient", "non_salient")
    """Which patches are dropped first: any, those most attended to, those least attended to."""
    patch: int | None = None
    """Side in pixels of what is dropped as a whole. null: a ViT's patch, or what ends as one token of a Swin (32)."""
    fill: Literal["black", "mean"] = "black"
    """Color of dropped patches: black, as in the paper's code, or the mean color (zero after normalization)."""
    leave_out: bool = False
    """Also measure with dropped patches left out of the encoder, which then runs on the visible ones only."""
    saliency: str | None = None
    """Weights of the network whose attention says what is salient, in the forms of --init (the paper takes DINO's
    ViT-S for all models). null: the evaluated one itself."""
    shuffle_grids: tuple[int, ...] | None = None
    """Tiles a side of the grids that are shuffled. null: 2, 4, 8, ... down to the size of `patch`."""


@dataclass(frozen=True, kw_only=True)
class NeighborsConfig:
    """The nearest neighbors of images, by cosine similarity of their features."""

    embeddings: str
    """The .safetensors file of launch/embed.py to search in."""
    queries: list[str] | str | None = None
    """What neighbors are looked for: another such file, or images, folders or shards, which are then embedded by the
    same network in the same way. null: every image of the embeddings, among the others."""
    out: str
    """Folder for neighbors.csv, neighbors.png and result.json."""
    top_k: int = 5
    """Neighbors of each query, the nearest first."""
    pictures: int = 8
    """Queries that the picture shows, spread evenly over all; 0: no picture."""
    init: str | None = None
    """Where the network lies that made the embeddings. null: where it was then."""
    precision: Literal["bf16", "fp16", "no"] | None = None
    """Autocast type of the forward pass over queries that are images. null: that of the embeddings."""
    batch_size: int = 256
    """Images in one forward pass."""
    num_workers: int = 4
    """Loader processes; 0 decodes in the process itself."""
    cache_dir: str | None = None
    """Folder on a local disk for remote shards. null: quarterlight/shards in $XDG_CACHE_HOME, or in ~/.cache."""
