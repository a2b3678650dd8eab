"""The settings of launch/convert.py, as documented dataclasses like those of `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How released weights become a file of this project."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Which timm model the weights are of, where they do not say."""
    in_chans: int | None = None
    """Channels of the images. null: what the weights say."""
    mean: tuple[float, ...] | None = None
    """Channel means that the weights expect; null: what they say, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations that the weights expect; null: what they say, else ImageNet's."""
    head: bool = True
    """Keep a classifier's head, where there is one: the file then is a classifier. false: the encoder only."""
    merge_order: Literal["swin", "greenmim2022"] | None = None
    """For GreenMIM only: greenmim2022 for files released in May 2022, swin for those trained with code since 2023."""
    allow_partial: bool = False
    """Take weights that lack some of the encoder's tensors, which then have initial values. false: refuse them."""
