"""The settings of launch/visualize.py. Only the standard library is imported, for a quick `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quarterlight.ssl.config import EncoderConfig

PictureName = Literal[
    "reconstructions",
    "ratios",
    "strategies",
    "filters",
    "positions",
    "attention_distance",
    "rollout",
    "bias_tables",
    "window_mask",
    "features_map",
    "features_rgb",
    "neighbors",
    "curves",
]


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Pictures of what an encoder has learned."""

    init: str | None = None
    """Weights: a run folder, a .safetensors or .pth file, a timm name, hf-hub: or local-dir:; null: initial ones.
    Reconstructions need a decoder: the folder of a pretraining run, or a full file."""
    images: str | list[str] | None = None
    """Images to look at: folders (their class folders are labels), image files, digits, or local shards as data.train
    takes them. null: only what needs none is drawn."""
    out: str
    """Folder for the pictures, their captions in result.json, and TensorBoard's copy; files of the same names are
    replaced."""
    pictures: list[PictureName] | None = None
    """Which ones; null: all that this encoder and these images allow."""
    runs: list[str] | None = None
    """Run folders whose loss, learning rate, gradients and data wait are drawn on one plot; pictures [curves] of
    them need no encoder. null: the one in --init."""
    untrained: bool = False
    """Take only the architecture from --init and use initial weights: the picture to compare with."""
    num_images: int = 8
    """Images that are shown one by one."""
    num_features: int = 1000
    """Images whose features are mapped and searched, evenly spaced over --images."""
    mask_ratios: tuple[float, ...] = (0.75, 0.8, 0.85, 0.95)
    """Shares of hidden units to reconstruct from."""
    norm_pix_statistics: Literal["truth", "none"] = "truth"
    """How predictions of normalized patches become pixels: truth takes mean and contrast of each patch from the
    original, which flatters; none shows the predicted contrast alone, around grey."""
    crop_pct: float | None = None
    """Side of the center crop / shorter side of the resized image; null: the run's, else 0.875."""
    seed: int = 0
    """Decides masks, initial weights and the starting point of t-SNE."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The timm model, where --init does not say it or another image size is wanted."""
