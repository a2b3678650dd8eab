"""The settings of launch/export.py. Only the standard library is imported, for a quick `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .config import EncoderConfig

PartName = Literal["encoder", "classifier", "autoencoder"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes weights in the form that other libraries read, and checks what it has written."""

    to: Literal["timm", "transformers", "mae", "onnx", "torch"]
    """timm: a folder for local-dir: and hf-hub:, or one file under timm's keys if OUT ends in .safetensors.
    transformers: a folder for from_pretrained. mae: facebookresearch/mae's .pth. onnx: .onnx. torch: torch.export's
    .pt2."""
    part: PartName | None = None
    """encoder; classifier: with its head; autoencoder: with the decoder, which is in a pretraining run's states (to
    transformers and mae). null: a classifier if there is a head, else the encoder."""
    half: Literal["fp16", "bf16"] | None = None
    """Weights of two bytes; how far the output moves is measured and told. Of onnx and torch the computation, too.
    null: float32."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face Hub, made if need be: the same files, and a model card, go there."""
    private: bool = False
    """Whether a repository that --push makes is private."""
    crop_pct: float | None = None
    """Side of the center crop / shorter side, told to whom prepares images. null: the run's data.crop_pct, or 0.875."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Which timm model the weights are of, where they do not say; another img_size resizes positions."""
