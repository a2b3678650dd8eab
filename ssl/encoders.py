"""timm models by name, wrapped as encoders."""

from typing import Any

import timm
from timm.layers import HybridEmbed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .encoder import Encoder
from .errors import InputError, did_you_mean
from .hybrid import HybridEncoder
from .rope import RotaryEncoder
from .swin import SwinEncoder
from .vit import ViTEncoder

SUPPORTED = "use one of timm's vit_* (plain, hybrid such as vit_*_r50_*, or vit_*_rope_*), swin_* or swinv2_*"
FAMILIES = ("vision_transformer", "deit", "eva", "swin_transformer")  # beginnings of timm's modules


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
    """Returns the headless timm model `name` as an encoder, with timm's initial weights and no drop path.

    `img_size` is a side or (height, width) in pixels; `timm_args` go to `timm.create_model` as they are.
    Raises InputError when the model does not exist or cannot encode visible patches only.
    """
    try:
        args = {"num_classes": 0, "drop_path_rate": 0.0, **timm_args}  # timm's Swins would come with 0.1
        model = create_timm_model(name, img_size=img_size, **args)
    except InputError as error:  # arguments of a ViT given to another family: the family is what is wrong
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2] if timm.is_model(name) else FAMILIES[0]
        if not family.startswith(FAMILIES):
            raise InputError(f"encoder {name}: a {family} is not supported; {SUPPORTED}") from error
        raise
    return wrap(model, name)


def wrap(model: nn.Module, name: str) -> Encoder:
    """Returns a timm model as an encoder; `name` is for messages. Raises InputError when it cannot be one."""
    try:
        if type(model) is VisionTransformer:
            return HybridEncoder(model) if isinstance(model.patch_embed, HybridEmbed) else ViTEncoder(model)
        if type(model) is Eva:
            return RotaryEncoder(model)
        if isinstance(model, SwinTransformer | SwinTransformerV2):
            return SwinEncoder(model)
    except InputError as error:
        raise InputError(f"encoder {name}: {error}") from error
    raise InputError(f"encoder {name}: a {type(model).__name__} is not supported; {SUPPORTED}")
