"""timm models by name, wrapped as encoders, and the choice of attention kernel."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .errors import InputError, did_you_mean
from .vit import ViTEncoder

Encoder = ViTEncoder  # what pretraining and fine-tuning ask of an encoder is what this class documents


def create_timm_model(name: str, *, img_size: int | tuple[int, int] | None = None, **timm_args: Any) -> nn.Module:
    """Returns `timm.create_model(name, img_size=..., **timm_args)`.

    Raises InputError, with the nearest names, when timm knows no such model, and when it refuses the arguments.
    """
    if img_size is not None:
        timm_args["img_size"] = img_size
    if not timm.is_model(name.split(".")[0]):
        raise InputError(f"timm {timm.__version__} has no model {name}{did_you_mean(name, timm.list_models(), most=3)}")
    try:
        return timm.create_model(name, **timm_args)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        given = ", ".join(f"{key}={value}" for key, value in timm_args.items())
        raise InputError(f"timm cannot build {name} with {given}: {error}") from error


def build_encoder(name: str, *, img_size: int | tuple[int, int] | None = None, **timm_args: Any) -> Encoder:
    """Returns the headless timm model `name` as an encoder, with timm's initial weights.

    `img_size` is a side or (height, width) in pixels; `timm_args` go to `timm.create_model` as they are.
    Raises InputError when the model does not exist or cannot encode visible patches only.
    """
    try:
        model = create_timm_model(name, img_size=img_size, **{"num_classes": 0, **timm_args})
    except InputError as error:  # arguments of a ViT given to another family: the family is what is wrong
        family = (
            timm.model_entrypoint(name).__module__.rpartition(".")[2] if timm.is_model(name) else "vision_transformer"
        )
        if not family.startswith(("vision_transformer", "deit")):
            raise InputError(
                f"encoder {name}: a {family} is not supported; use one of timm's plain vit_* models"
            ) from error
        raise
    if type(model) is not VisionTransformer:
        raise InputError(
            f"encoder {name}: a {type(model).__name__} is not supported; use one of timm's plain vit_* models"
        )
    try:
        return ViTEncoder(model)
    except InputError as error:
        raise InputError(f"encoder {name}: {error}") from error


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Picks the attention kernel of every timm block in `model` for where it will run.

    On a CPU in bf16, matmul, softmax, matmul makes a whole step 1.26 times as fast as torch's fused kernel.
    """
    fused = not (device.type == "cpu" and precision == "bf16")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # type: ignore[assignment]  # a plain attribute of timm's attention
