"""Weights that come in: a run, a file, timm or the Hub, read and recognised, under timm's names."""

import inspect
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from . import read_transformers
from .architectures import Architecture, architecture_of
from .checkpoint import MODEL_FILE, state_folders
from .config import DecoderConfig
from .encoders import refuse_family, wrap
from .errors import InputError
from .export import CLASSIFIER_FILE, ENCODER_FILE, ModelSpec
from .kinds import KINDS, Found, MergeOrder, recognise
from .patches import pair
from .pickles import read_pickled

# A classifier's own layers: never taken from an encoder, and never missed when one is loaded into a classifier.
HEAD = ("head.", "fc_norm.")
OF_CREATE_MODEL = frozenset(inspect.signature(timm.create_model).parameters)  # files, addresses and the like
WINDOWS_BEFORE = "pretrained_window_sizes"
TARGET_NOT_TOLD = (
    "whether it predicts normalized pixels or, as MAE's files for pictures, plain ones is told by nothing in it"
)
NORM_TARGET_NOT_TOLD = (
    "whether it predicts plain pixels or, as SimMIM's settings for Swin V2 say, ones normalized in windows "
    "(NORM_TARGET), which no target here does, is told by nothing in it"
)


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder's tensors under the names of `MaskedAutoencoder`, and what builds it again."""

    tensors: dict[str, Tensor]
    config: DecoderConfig
    target: Literal["norm_pix", "pixels", "pca", "hog"] = "norm_pix"
    loss: Literal["mse", "l1"] = "mse"
    encode_masked: bool = False
    pca_components: int = 96
    notes: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Returns the arguments of `mae.attach_decoder` that build it."""
        names = ("target", "loss", "encode_masked", "pca_components")
        return {"decoder": self.config} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Weights:
    """Tensors under timm's keys, and what is known of the model they belong to."""

    source: str
    tensors: dict[str, Tensor]  # of the encoder
    spec: ModelSpec | None  # None: a file that does not say
    head: dict[str, Tensor] = field(default_factory=dict)  # a classifier's own layers; empty: there is none
    class_names: list[str] | None = None
    kind: str = ""  # one of kinds.KINDS
    origin: str = ""  # the kind that a file of ours was converted from, or the stage that wrote it
    decoder: DecoderWeights | None = None
    crop_pct: float | None = None  # of timm's evaluation; None: not known
    hint: str = ""  # what shapes tell of a model that they do not tell whole
    notes: tuple[str, ...] = ()  # remarks for the report
    unused: tuple[str, ...] = ()  # names in the file that are in none of the above
    guessed_size: bool = False  # the image size is that of a square with as many patches
    allow_partial: bool = False  # tensors of the encoder may be missing

    def described(self) -> str:
        """Returns the source, with its kind and the model that it holds where it had to be told."""
        model = "" if self.spec is None else f", {self.spec.name}"
        return self.source if self.kind in ("", "quarterlight") else f"{self.source} ({KINDS[self.kind]}{model})"


def read_weights(init: str, *, with_decoder: bool = False, merge_order: MergeOrder | None = None) -> Weights:
    """Returns the weights that `init` names: a run folder, a .safetensors or .pth file, timm's, hf-hub: or local-dir:.

    Files are recognised by the names and shapes of their tensors (`kinds.recognise`, which takes `merge_order`). A
    decoder in a file comes along; that of a run lies in its states, and comes `with_decoder`, together with the encoder
    of the same step. Raises InputError when there is nothing of that name or it cannot be read or used.
    """
    path = Path(init).expanduser()
    if init.startswith("hf-hub:") and (folder := read_transformers.hub_folder(init)) is not None:
        return replace(_read_folder(folder), source=init)
    if path.is_dir():
        return (
            _read_state(path, state_folders(path)[-1]) if with_decoder and state_folders(path) else _read_folder(path)
        )
    if path.is_file() and (run_dir := _run_of_state(path)) is not None:
        return _read_state(run_dir, path.parent)
    if path.is_file():
        return read_safetensors(path, merge_order) if path.suffix == ".safetensors" else _read_pth(path, merge_order)
    if init.startswith("local-dir:") and (folder := Path(init.removeprefix("local-dir:"))).is_dir():
        return replace(_read_folder(folder, own=False), source=init)
    if init.startswith(("hf-hub:", "local-dir:")) or timm.is_model(init.split(".")[0]):
        return _read_timm(init)
    raise InputError(f"init {init}: no such file or folder, and timm has no model of that name")


def _read_folder(path: Path, *, own: bool = True) -> Weights:
    for name in (ENCODER_FILE, CLASSIFIER_FILE) if own else ():
        if (path / name).is_file():
            return read_safetensors(path / name)
    if (config := read_transformers.read_config(path)) is not None:
        return _read_transformers(path, config)
    if (path / "config.json").is_file():
        return _read_timm(f"local-dir:{path}")
    raise InputError(
        f"init {path}: the folder holds no {ENCODER_FILE} and no {CLASSIFIER_FILE}; a run writes them with its states"
    )


def read_safetensors(path: Path, merge_order: MergeOrder | None = None) -> Weights:
    """Returns the weights in a safetensors file, whatever its name ends in; as `read_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
            metadata = file.metadata() or {}
        spec = _spec_in(metadata) if "architecture" in metadata else None
        names = json.loads(metadata.get("class_names", "null"))
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"init {path}: not a readable safetensors file ({error})") from error
    if spec is None:
        return _recognised(str(path), tensors, merge_order)
    encoder = {name: x for name, x in tensors.items() if not name.startswith(("decoder", "mask_token", *HEAD))}
    head = {name: x for name, x in tensors.items() if name.startswith(HEAD)}
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    origin = metadata.get("source_kind", metadata.get("stage", ""))
    return Weights(str(path), encoder, spec, head, names if named else None, kind="quarterlight", origin=origin)


def _read_pth(path: Path, merge_order: MergeOrder | None) -> Weights:
    try:
        tensors, arguments = read_pickled(path)
    except InputError as error:
        raise InputError(f"init {error}") from error
    found = _recognised(str(path), tensors, merge_order)
    if found.decoder is not None and isinstance(said := arguments.get("norm_pix_loss"), bool):
        notes = tuple(note for note in found.decoder.notes if note != TARGET_NOT_TOLD)
        decoder = replace(found.decoder, target="norm_pix" if said else "pixels", notes=notes)
        found = replace(found, decoder=decoder)
    if found.decoder is not None and isinstance(side := arguments.get("norm_target"), int):
        note = f"it predicts pixels normalized in windows of {side} x {side} (NORM_TARGET), which no target here does"
        found = replace(found, decoder=replace(found.decoder, notes=(note,) if side else ()))
    averaged = [f"the averaged weights in it ({place})" for place in [arguments.get("place", "")] if "ema" in place]
    return replace(found, notes=(*averaged, *found.notes))


def _recognised(source: str, tensors: dict[str, Tensor], merge_order: MergeOrder | None) -> Weights:
    """Returns the weights of a file that says nothing of its model."""
    try:
        found = recognise(tensors, merge_order)
        guess = architecture_of(found.encoder, found.buffers, pooled="fc_norm.weight" in found.head)
    except InputError as error:
        raise InputError(f"init {source}: {error}") from error
    if found.num_heads is not None:
        note = f"{found.num_heads} attention heads, as MoCo v3's ViT-S has them"
        guess = replace(guess, args=guess.args | {"num_heads": found.num_heads}, notes=(note,))
    return replace(_weights(source, found, guess, guess.notes), guessed_size=True)


def _weights(source: str, found: Found, guess: Architecture, notes: tuple[str, ...] = ()) -> Weights:
    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    return Weights(
        source,
        found.encoder,
        None if guess.name is None else ModelSpec(guess.name, guess.args, mean, std),
        found.head,
        kind=found.kind,
        decoder=_decoder(found),
        hint=guess.hint,
        notes=(*notes, *found.notes),
        unused=tuple(found.unused),
    )


def _decoder(found: Found) -> DecoderWeights | None:
    """Returns the decoder in a file, with what its shapes and kind tell of it."""
    pred = found.decoder.get("decoder.pred.weight")
    if pred is None:
        return None
    embed, blocks = (
        found.decoder.get("decoder.embed.weight"),
        [int(name.split(".")[2]) for name in found.decoder if name.startswith("decoder.blocks.")],
    )
    if embed is None:
        is_v2 = found.kind == "simmim" and any(name.endswith(".logit_scale") for name in found.encoder)
        linear = DecoderConfig(name="linear")
        notes = (NORM_TARGET_NOT_TOLD,) if is_v2 else ()
        return DecoderWeights(found.decoder, linear, "pixels", "l1", encode_masked=True, notes=notes)
    width, fc1 = len(embed), found.decoder.get("decoder.blocks.0.mlp.fc1.weight")
    config = DecoderConfig(
        embed_dim=width,
        depth=1 + max(blocks, default=-1),
        num_heads=max(1, width // 32),  # MAE's are 32 wide, and heads leave no trace in the tensors
        mlp_ratio=4.0 if fc1 is None else len(fc1) / width,
    )
    heads = f"{config.num_heads} attention heads in the decoder by convention (32 wide)"
    way_out = ("give the run's folder, which says both",) if found.kind == "quarterlight" else ()
    return DecoderWeights(found.decoder, config, notes=(TARGET_NOT_TOLD, heads, *way_out))


def _read_transformers(folder: Path, config: dict[str, Any]) -> Weights:
    tensors = read_transformers.read_folder(folder, config)
    try:
        found = recognise(tensors)
        guess = architecture_of(found.encoder, found.buffers, pooled=False)
        guess, notes = read_transformers.with_config(guess, config)
    except InputError as error:
        raise InputError(f"init {folder}: {error}") from error
    weights = _weights(str(folder), found, guess, tuple(notes))
    if weights.head:
        weights = replace(weights, class_names=read_transformers.class_names(config))
    if weights.spec is not None and (said := read_transformers.normalization(folder)) is not None:
        weights = replace(weights, spec=replace(weights.spec, mean=said[0], std=said[1]))
    heads = config.get("decoder_num_attention_heads")
    if weights.decoder is not None and weights.kind == "hf-vit-mae" and isinstance(heads, int):
        target = "norm_pix" if config.get("norm_pix_loss") else "pixels"
        decoder = replace(weights.decoder.config, num_heads=heads)
        weights = replace(weights, decoder=replace(weights.decoder, config=decoder, target=target, notes=()))
    return weights


def _run_of_state(path: Path) -> Path | None:
    """Returns the folder of the pretraining run whose state this file is of; None if it is none, or was moved."""
    folder = path.absolute().parent
    run_dir = folder.parent.parent
    if path.name != MODEL_FILE or folder not in state_folders(run_dir) or not (run_dir / ENCODER_FILE).is_file():
        return None
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return run_dir if isinstance(config, dict) and "decoder" in config else None


def _read_state(run_dir: Path, state: Path) -> Weights:
    """Returns encoder and decoder of a state of a pretraining run."""
    encoder = _read_folder(run_dir)
    path = state / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        found = recognise(tensors)
        if not found.decoder:
            raise InputError("no run of pretraining has saved it")
        options = {key: config[key] for key in ("target", "loss", "encode_masked", "pca_components")}
        decoder = DecoderWeights(found.decoder, DecoderConfig(**config["decoder"]), **options)
    except (SafetensorError, OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, InputError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"init {run_dir}: holds no decoder that can be read ({path}: {why})") from error
    return replace(encoder, source=str(path.parent), tensors=found.encoder, decoder=decoder)


def _spec_in(metadata: dict[str, str]) -> ModelSpec:
    """Returns the model that a file says it is of. Raises KeyError, ValueError or RecursionError when it does not.

    What a file says reaches `timm.create_model`: it may shape the model, but not name other files or addresses.
    """
    args, mean, std = (json.loads(metadata[key]) for key in ("timm_args", "mean", "std"))
    if not isinstance(args, dict):
        raise ValueError("its timm_args are no arguments by name")
    windows = args.get(WINDOWS_BEFORE, [])
    if not isinstance(windows, list) or not all(_is_window(window) for window in windows):
        raise ValueError(f"its {WINDOWS_BEFORE} are no list of windows")
    given = args.keys() - {WINDOWS_BEFORE}  # of a Swin V2; all else of that beginning is of files and addresses
    if foreign := [key for key in sorted(given) if key in OF_CREATE_MODEL or key.startswith("pretrained")]:
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


def _is_window(value: Any) -> bool:
    """Returns whether it is the side of a window, or its height and width."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side >= 0 for side in sides)


def _read_timm(name: str) -> Weights:
    refuse_family(name)  # before gigabytes are fetched
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
    tensors = model.state_dict()
    encoder = {name: x for name, x in tensors.items() if not name.startswith(HEAD)}
    head = {name: x for name, x in tensors.items() if name.startswith(HEAD)}
    names, crop_pct = cfg.get("label_names"), cfg.get("crop_pct")
    return Weights(name, encoder, spec, head, names, kind="timm", crop_pct=crop_pct)


def _headless(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the encoder below a classifier: the same without its classes."""
    return {key: value for key, value in args.items() if key != "num_classes"}
