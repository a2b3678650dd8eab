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
from .patches import check_grid, pair
from .rope import RotaryEncoder
from .swin import SwinEncoder
from .vit import ViTEncoder

SUPPORTED = "use one of timm's vit_* (plain, hybrid such as vit_*_r50_*, or vit_*_rope_*), swin_* or swinv2_*"
MOST_SHOWN = 300  # characters of arguments, which a file may have named
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
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in timm_args.items())[:MOST_SHOWN]
        reason = " ".join(str(error).split())[:MOST_SHOWN] or "it gives no reason"
        raise InputError(f"timm cannot build {name} with {given}: {reason}") from error


def build_encoder(name: str, *, img_size: int | tuple[int, int] | None = None, **timm_args: Any) -> Encoder:
    """Returns the headless timm model `name` as an encoder, with timm's initial weights and no drop path.

    `img_size` is a side or (height, width) in pixels; `timm_args` go to `timm.create_model` as they are.
    Raises InputError when the model does not exist or cannot encode visible patches only.
    """
    args = {"num_classes": 0, "drop_path_rate": 0.0, **timm_args}  # timm's Swins would come with 0.1
    try:
        model = create_timm_model(name, img_size=img_size, **args)
    except InputError:  # arguments of a ViT given to another family: the family is what is wrong
        refuse_family(name)
        if img_size is not None:
            _refuse_size(name, pair(img_size), args)
        raise
    return wrap(model, name)


def refuse_family(name: str) -> None:
    """Raises InputError for a timm name, with a tag or without, of a family that has no encoder here."""
    plain = name.split(".")[0]
    family = timm.model_entrypoint(plain).__module__.rpartition(".")[2] if timm.is_model(plain) else FAMILIES[0]
    if not family.startswith(FAMILIES):
        raise InputError(f"encoder {name}: a {family} is not supported; {SUPPORTED}")


def _refuse_size(name: str, img_size: tuple[int, int], args: dict[str, Any]) -> None:
    """Raises InputError, with sizes that work, when the model cannot be built because its units do not tile the image.

    timm asserts so without a word in some stems; what units are, the model says at its own size.
    """
    try:
        unit = wrap(create_timm_model(name, **args), name).unit_size
    except InputError:
        return  # the size is not what is wrong
    try:
        check_grid(img_size, unit)
    except InputError as error:
        raise InputError(f"encoder {name}: {error}") from error


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
