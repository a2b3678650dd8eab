"""The settings of launch/shards.py, as documented dataclasses like those of `config`.

Only the standard library is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How images become shards."""

    val_share: float | None = None
    """Share of the images set aside as val shards. null: SOURCE's own train/ and val/ (or test/) folders, else none."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """folders: the first folder below SOURCE is the class. none: no labels. auto: folders, if every image is in one."""
    resize: int | None = None
    """Shrink images with a longer shorter side to this many pixels, stored as JPEG; null: files as they are. What this
    costs and saves is told by reshard --help."""
    quality: int = 90
    """JPEG quality of resized images, 1-100."""
    shard_size_mb: float = 256
    """A shard is closed when it reaches this many megabytes (10^6 bytes)."""
    seed: int = 0
    """Decides the shuffled order and the split."""
    num_workers: int = 2
    """Processes that read, check and resize images."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Reads every shard whole, decodes every image, and lists what is damaged; ends with status 1 if anything is.

    Shards at an address are fetched one at a time. What is odd but whole (keys that several shards have, duplicate
    images, missing labels) is told in notes, and the status stays 0.
    """

    report: str | None = None
    """JSON-lines file for all that is found (shard, key, byte, reason); null: the first twenty on the screen."""
    num_workers: int = 2
    """Processes that read and decode images; 0 does it in this process."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Rewrites in place those shards that hold damage or unreadable images, without these.

    All files of every good sample stay as they are, byte for byte and in order. The damaged shard is kept as
    NAME.tar.damaged, dataset.json is brought up to date, and what was left out is listed in left_out.jsonl beside it.
    A sample that touches damage and lacks a file that most others have is left out, too.
    """

    num_workers: int = 2
    """Processes that read and decode images; 0 does it in this process."""


@dataclass(frozen=True, kw_only=True)
class ReshardConfig:
    """New shards out of shards: shuffled over all of them, resized if asked, unreadable images left out and listed.

    Labels and the class names in dataset.json are kept; other files of a sample, such as captions, are not. Shards that
    dataset.json lists as val become val shards again, all others train shards. The same command continues an
    interrupted one. Shards at an address are fetched into OUT_DIR first, and deleted at the end.
    """

    val_share: float | None = None
    """Share of the images set aside as val shards. null: the shards that dataset.json lists as val, or else none."""
    resize: int | None = None
    """Shrink images with a longer shorter side to this many pixels, stored as JPEG; null: files as they are. For crops
    of 224 pixels from ImageNet's originals (110 kB, decoded and cropped at 890 images/s per core): 400 halves the
    bytes, is 1.6 times as fast and keeps 98 % of the gradient energy; 256 takes 30 kB, is 2.6 times as fast and keeps
    85 % (66 % in crops of less than 40 % of the area, which it blurs)."""
    quality: int = 90
    """JPEG quality of resized images, 1-100."""
    shard_size_mb: float = 256.0
    """A shard is closed when it reaches this many megabytes (10^6 bytes)."""
    seed: int = 0
    """Decides the shuffled order and the split."""
    num_workers: int = 2
    """Processes that read, check and resize images; 0 does it in this process."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Writes index.npz, where every sample of the shards lies, from a fresh scan of all of them.

    Training makes it on first use, but for shards at an address it has to fetch each of them once. index.npz is
    written beside the shards where that can be done, or else into the current folder.
    """

    out: str | None = None
    """File, or folder for index.npz. null: beside the shards, or in the current folder if that cannot be written."""


SHARD_COMMANDS: dict[str, type] = {
    "verify": VerifyConfig, "repair": RepairConfig, "reshard": ReshardConfig, "index": IndexConfig
}  # fmt: skip
