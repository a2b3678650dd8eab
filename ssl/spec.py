"""Which encoder to build: what the options say, and what weights say where these are silent."""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .config import DataConfig, EncoderConfig
from .encoders import create_timm_model
from .errors import InputError
from .export import ModelSpec
from .patches import pair
from .weights import Weights

RGB = 3  # channels that others can be made from
# What a stage decides, or --init; encoder.args would change what is exported without a word.
NOT_OF_AN_ENCODER = {
    "pretrained": "give --init NAME to start from timm's weights",
    "checkpoint_path": "give --init FILE to start from weights",
    "num_classes": "an encoder has no classes; fine-tuning takes num_classes",
    "global_pool": "an encoder has no pooling; fine-tuning takes pool",
}


def encoder_spec(config: EncoderConfig, data: DataConfig, weights: Weights | None) -> ModelSpec:
    """Returns the encoder to build: what the config says, and for what it leaves open, what the weights say.

    Raises InputError when neither names a model, and when two options give different image sizes.
    """
    known = weights.spec if weights is not None else None
    name = config.name or (known.name if known else None)
    if name is None:
        hint = f" (it is of {weights.hint})" if weights is not None and weights.hint else ""
        said = f"{weights.source} does not say which model it is{hint}: " if weights is not None else ""
        raise InputError(f"{said}give encoder.name, a timm model such as vit_base_patch16_224")
    sizes = {pair(size) for size in (config.img_size, data.img_size) if size is not None}
    if len(sizes) > 1:
        raise InputError(
            f"encoder.img_size is {config.img_size} and data.img_size is {data.img_size}: give one of them"
        )
    for key in NOT_OF_AN_ENCODER.keys() & config.args.keys():
        raise InputError(f"encoder.args.{key}: {NOT_OF_AN_ENCODER[key]}")
    args = {**(known.args if known and known.name == name else {}), **config.args}
    if args.get("num_heads", 0) is None and weights is not None:
        raise InputError(
            f"{weights.source} does not say how many attention heads it has (it is of {weights.hint}): give "
            f"--encoder.args.num_heads, a number that divides {args['embed_dim']}"
        )
    if sizes:
        args["img_size"] = list(sizes.pop())
    if known is not None and name.startswith("swinv2_") and "pretrained_window_sizes" not in config.args:
        args |= _pretrained_windows(ModelSpec(name, args, known.mean, known.std), known)
    if args.get("in_chans") == RGB and "in_chans" not in config.args:
        args["in_chans"] = data.in_chans  # the patch embedding follows, as in timm
    if args.setdefault("in_chans", data.in_chans) != data.in_chans:
        raise InputError(f"the encoder takes {args['in_chans']} channels and data.in_chans is {data.in_chans}")
    mean = data.mean or (known.mean if known else IMAGENET_DEFAULT_MEAN)
    std = data.std or (known.std if known else IMAGENET_DEFAULT_STD)
    return ModelSpec(name, args, _per_channel(mean, data.in_chans), _per_channel(std, data.in_chans))


def _pretrained_windows(spec: ModelSpec, known: ModelSpec) -> dict[str, Any]:
    """Returns the argument that has a SwinV2 measure offsets by the windows that `known` was trained with, if needed.

    Its bias is a function of offsets that are divided by the size of a window: in other windows, without this argument,
    the same two tokens would get another bias.
    """
    measured = []
    for each in (spec, known):
        with torch.device("meta"):
            model: Any = create_timm_model(each.name, **each.timm_args())
        attentions = [stage.blocks[0].attn for stage in getattr(model, "layers", ())]
        if not all(hasattr(attn, "pretrained_window_size") for attn in attentions):
            return {}  # other weights, which are refused when they are loaded
        measured.append(
            [
                attn.pretrained_window_size if any(attn.pretrained_window_size) else attn.window_size
                for attn in attentions
            ]
        )
    new, old = measured
    return {} if new == old else {"pretrained_window_sizes": [list(pair(window)) for window in old]}


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Returns one value a channel; a single value serves all, and grey images take the mean of three."""
    if len(values) == in_chans:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * in_chans
    if in_chans == 1:
        return (sum(values) / len(values),)
    raise InputError(f"data.mean and data.std have {len(values)} values for {in_chans} channels: give 1 or {in_chans}")
