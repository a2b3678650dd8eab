"""Weights that come in: a run, a file, timm or the Hub, and a report of what matched."""

import argparse
import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from .config import DataConfig, EncoderConfig
from .encoder import Encoder
from .encoders import build_encoder, create_timm_model, wrap
from .errors import InputError
from .export import CLASSIFIER_FILE, ENCODER_FILE, ModelSpec
from .patches import pair
from .relative_tables import resize_table

# A classifier's own layers: never taken from an encoder, and never missed when one is loaded into a classifier.
HEAD = ("head.", "fc_norm.")
PARAMETERS = (".weight", ".bias")
# What a stage decides, or --init; encoder.args would change what is exported without a word.
NOT_OF_AN_ENCODER = {
    "pretrained": "give --init NAME to start from timm's weights",
    "checkpoint_path": "give --init FILE to start from weights",
    "num_classes": "an encoder has no classes; fine-tuning takes num_classes",
    "global_pool": "an encoder has no pooling; fine-tuning takes pool",
}
OF_CREATE_MODEL = frozenset(inspect.signature(timm.create_model).parameters)  # files, addresses and the like


@dataclass(frozen=True)
class Weights:
    """Tensors under timm's keys, and what is known of the model they belong to."""

    source: str
    tensors: dict[str, Tensor]  # of the encoder
    spec: ModelSpec | None  # None: a file that does not say
    head: dict[str, Tensor] = field(default_factory=dict)  # a classifier's own layers; empty: there is none
    class_names: list[str] | None = None


def read_weights(init: str) -> Weights:
    """Returns the weights that `init` names: a run folder, a .safetensors or .pth file, timm's, hf-hub: or local-dir:.

    Decoder weights are left out. Raises InputError when there is nothing of that name or it
    cannot be read.
    """
    path = Path(init).expanduser()
    if path.is_dir():
        for name in (ENCODER_FILE, CLASSIFIER_FILE):
            if (path / name).is_file():
                return _read_safetensors(path / name)
        if (path / "config.json").is_file():
            return _read_timm(f"local-dir:{path}")
        raise InputError(
            f"init {init}: the folder holds no {ENCODER_FILE} and no {CLASSIFIER_FILE}; a run writes them"
            " with its states"
        )
    if path.is_file():
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    if init.startswith(("hf-hub:", "local-dir:")) or timm.is_model(init.split(".")[0]):
        return _read_timm(init)
    raise InputError(f"init {init}: no such file or folder, and timm has no model of that name")


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
            metadata = file.metadata() or {}
        spec = _spec_in(metadata) if "architecture" in metadata else None
        names = json.loads(metadata.get("class_names", "null"))
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"init {path}: not a readable safetensors file ({error})") from error
    return Weights(str(path), *_split(tensors, spec), names if _are_names(names) else None)


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _spec_in(metadata: dict[str, str]) -> ModelSpec:
    """Returns the model that a file says it is of. Raises KeyError, ValueError or RecursionError when it does not.

    What a file says reaches `timm.create_model`: it may shape the model, but not name other files or addresses.
    """
    args, mean, std = (json.loads(metadata[key]) for key in ("timm_args", "mean", "std"))
    if not isinstance(args, dict):
        raise ValueError("its timm_args are no arguments by name")
    if foreign := [key for key in args if key in OF_CREATE_MODEL or key.startswith("pretrained")]:
        raise ValueError(f"its timm_args hold {foreign[0]}, which is not for a file to say")
    size = args.get("img_size") or 1
    if not all(isinstance(side, int) for side in (size if isinstance(size, list) and len(size) == 2 else [size])):
        raise ValueError("its img_size is no size")
    for name, values in (("mean", mean), ("std", std)):
        least = 0.0 if name == "std" else -math.inf
        numbers = isinstance(values, list) and values and all(isinstance(x, int | float) for x in values)
        if not numbers or not all(least < x < math.inf for x in values):
            raise ValueError(f"its {name} is not one number a channel")
    return ModelSpec(metadata["architecture"], _headless(args), tuple(mean), tuple(std))


def _read_pickled(path: Path) -> Weights:
    """Reads tensors only: `weights_only` refuses code; argparse.Namespace, which MAE's files carry, is plain data."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for what is not its own format
        raise InputError(
            f"init {path}: not a .safetensors file, nor a .pth file of plain tensors ({type(error).__name__})"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise InputError(f"init {path}: holds no tensors by name")
    return Weights(str(path), *_split(tensors, None))


def _read_timm(name: str) -> Weights:
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the Hub, the network and timm raise many kinds
        raise InputError(
            f"init {name}: timm cannot load these weights ({' '.join(str(error).split())[:300]})"
        ) from error
    wrap(model, name)  # refuses what cannot be pretrained
    cfg: Any = model.pretrained_cfg
    args = _headless(getattr(model, "_model_args", None) or {})  # what a hub folder's config.json adds to the name
    args |= {"in_chans": cfg["input_size"][0], "img_size": list(pair(model.patch_embed.img_size))}
    spec = ModelSpec(cfg.get("architecture") or name, args, tuple(cfg["mean"]), tuple(cfg["std"]))
    return Weights(name, *_split(model.state_dict(), spec), cfg.get("label_names"))


def _headless(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the encoder below a classifier: the same without its classes."""
    return {key: value for key, value in args.items() if key != "num_classes"}


def _split(
    tensors: dict[str, Tensor], spec: ModelSpec | None
) -> tuple[dict[str, Tensor], ModelSpec | None, dict[str, Tensor]]:
    """Returns the encoder's tensors, `spec` and the classifier's own layers, in the order that `Weights` has them.

    A full MAE file also holds the decoder, which timm would take for DINOv2's: it is left out.
    """
    encoder = {name: x for name, x in tensors.items() if not name.startswith(("decoder", "mask_token", *HEAD))}
    return encoder, spec, {name: x for name, x in tensors.items() if name.startswith(HEAD)}


def encoder_spec(config: EncoderConfig, data: DataConfig, weights: Weights | None) -> ModelSpec:
    """Returns the encoder to build: what the config says, and for what it leaves open, what the weights say.

    Raises InputError when neither names a model, and when two options give different image sizes.
    """
    known = weights.spec if weights is not None else None
    name = config.name or (known.name if known else None)
    if name is None:
        said = f"{weights.source} does not say which model it is: " if weights is not None else ""
        raise InputError(f"{said}give encoder.name, a timm model such as vit_base_patch16_224")
    sizes = {pair(size) for size in (config.img_size, data.img_size) if size is not None}
    if len(sizes) > 1:
        raise InputError(
            f"encoder.img_size is {config.img_size} and data.img_size is {data.img_size}: give one of them"
        )
    for key in NOT_OF_AN_ENCODER.keys() & config.args.keys():
        raise InputError(f"encoder.args.{key}: {NOT_OF_AN_ENCODER[key]}")
    args = {**(known.args if known and known.name == name else {}), **config.args}
    if sizes:
        args["img_size"] = list(sizes.pop())
    if known is not None and name.startswith("swinv2_") and "pretrained_window_sizes" not in config.args:
        args |= _pretrained_windows(ModelSpec(name, args, known.mean, known.std), known)
    if args.setdefault("in_chans", data.in_chans) != data.in_chans:
        raise InputError(f"the encoder takes {args['in_chans']} channels and data.in_chans is {data.in_chans}")
    mean = data.mean or (known.mean if known else IMAGENET_DEFAULT_MEAN)
    std = data.std or (known.std if known else IMAGENET_DEFAULT_STD)
    return ModelSpec(name, args, _per_channel(mean, data.in_chans), _per_channel(std, data.in_chans))


def load_encoder(spec: ModelSpec, weights: Weights | None) -> tuple[Encoder, str]:
    """Returns the encoder with these weights, or with MAE's initial ones, and a sentence on what was loaded.

    Raises InputError when a tensor of the encoder is missing or has another shape.
    """
    encoder = build_encoder(spec.name, **spec.timm_args())
    if weights is None:
        encoder.init_weights()
        return encoder, f"encoder {spec.name}: initial weights"
    return encoder, load_weights(encoder.timm, weights)


def load_weights(model: Any, weights: Weights) -> str:
    """Loads an encoder's weights into a timm model, resizing positions to it. Returns a sentence on what matched.

    Absolute positions follow the grid of patches by timm's interpolation. Tables of relative ones follow the windows:
    bicubic, as Swin's code, where the weights came with a classifier's head, else by SimMIM's geometric rule.

    A classifier's own layers (`head`, `fc_norm`) keep their values; a final norm that moved behind the pooling (`norm`)
    is left out, as MAE does. Raises InputError when anything else is missing or has another shape.
    """
    wanted = {name: x for name, x in model.state_dict().items() if not name.startswith(HEAD)}
    given = dict(weights.tensors)
    note = ""
    if "pos_embed" in given and "pos_embed" in wanted:
        new, old = tuple(model.patch_embed.grid_size), _old_grid(weights, model)
        if old != new:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            given["pos_embed"] = resample_abs_pos_embed(
                given["pos_embed"], list(new), list(old), num_prefix_tokens=prefix
            )
            note = f"; positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
    tables = _resized_tables(model, weights, wanted)
    given |= tables
    note += f"; {len(tables)} tables of relative positions resized ({_rule(weights)})" if tables else ""
    unused = sorted(name for name in given.keys() - wanted.keys())
    matched = {name: x for name, x in given.items() if name in wanted and x.shape == wanted[name].shape}
    if len(matched) < len(wanted):
        missing = [
            f"{name} {'is missing' if name not in given else f'is {list(given[name].shape)}, not {list(x.shape)}'}"
            for name, x in wanted.items()
            if name not in matched
        ]
        raise InputError(
            f"init {weights.source}: {len(missing)} of the encoder's {len(wanted)} tensors did not load "
            f"({'; '.join(missing[:3])}{'; ...' if len(missing) > 3 else ''}): these weights are of another model; "
            "give the encoder.name and encoder.args they were made with"
        )
    foreign = [x for x in unused if x.startswith(("blocks.", "layers.")) and x.endswith(PARAMETERS)]
    if foreign:
        raise InputError(
            f"init {weights.source}: has {len(foreign)} tensors of blocks that the encoder lacks ({foreign[0]}, ...): "
            "give the encoder.args it was made with"
        )
    model.load_state_dict(matched, strict=False)
    note += f"; not used: {', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''}" if unused else ""
    return f"{weights.source}: {len(matched)} of {len(wanted)} encoder tensors loaded{note}"


def _resized_tables(model: Any, weights: Weights, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tables of relative positions (Swin) that were made for other windows, fitted to the model's.

    Raises InputError for a table of windows that are not square, from weights that do not say which model they are of.
    """
    suffix = ".relative_position_bias_table"
    names = [name for name in wanted.keys() & weights.tensors.keys() if name.endswith(suffix)]
    old: Any = None
    if names and weights.spec is not None:
        with torch.device("meta"):  # for its windows only
            old = create_timm_model(weights.spec.name, **weights.spec.timm_args())
    found = {}
    for name in names:
        table, new = weights.tensors[name], model.get_submodule(name.removesuffix(suffix)).window_size
        if old is None and table.shape == wanted[name].shape:
            continue
        side = (math.isqrt(len(table)) + 1) // 2
        window = pair(side) if old is None else old.get_submodule(name.removesuffix(suffix)).window_size
        if (2 * window[0] - 1) * (2 * window[1] - 1) != len(table):
            raise InputError(
                f"init {weights.source}: {name} has {len(table)} rows, which is no square window, and the weights do "
                "not say which it is: give encoder.args.window_size as they were trained"
            )
        if pair(window) != pair(new):
            found[name] = resize_table(table, pair(window), pair(new), _rule(weights))
    return found


def _rule(weights: Weights) -> Literal["geometric", "bicubic"]:
    """Returns how tables of relative positions are resized: a head says that the weights were trained with labels."""
    return "bicubic" if weights.head else "geometric"


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


def _old_grid(weights: Weights, model: Any) -> tuple[int, int]:
    """Returns the grid (high, wide) that the weights' positions were made for.

    Where they do not say, it is the model's own if the number fits, else a square one. Raises InputError when it is
    neither.
    """
    if weights.spec is not None and weights.spec.args.get("img_size") is not None:
        patch = model.patch_embed.feat_ratio(as_scalar=False)  # of patches, or of a stem and patches of its map
        height, width = (side // p for side, p in zip(pair(weights.spec.args["img_size"]), patch, strict=True))
        return height, width
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    count = weights.tensors["pos_embed"].shape[1] - prefix
    new = model.patch_embed.grid_size
    if new[0] * new[1] == count:
        return new[0], new[1]
    side = math.isqrt(max(0, count))
    if side * side != count:
        raise InputError(
            f"init {weights.source}: holds positions of {count} patches, which is no square grid, and does not say "
            f"which grid it is (the model has {new[0]} x {new[1]}): give encoder.img_size as the weights were trained"
        )
    return side, side


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Returns one value a channel; a single value serves all, and grey images take the mean of three."""
    if len(values) == in_chans:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * in_chans
    if in_chans == 1:
        return (sum(values) / len(values),)
    raise InputError(f"data.mean and data.std have {len(values)} values for {in_chans} channels: give 1 or {in_chans}")
