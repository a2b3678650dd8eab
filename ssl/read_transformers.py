"""Folders of Hugging Face transformers, on disk or on the Hub: their tensors, and what their JSON says of the model.

transformers itself is not needed, and none of a folder's code is run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .architectures import Architecture
from .errors import InputError
from .kinds import UNSUPPORTED
from .patches import pair
from .pickles import read_pickled

FAMILIES = ("vit_mae", "vit", "swin", "swinv2", "dinov2", "dinov2_with_registers", "ijepa")  # by model_type
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PREPROCESSOR = "preprocessor_config.json"


def read_config(folder: Path) -> dict[str, Any] | None:
    """Returns config.json of a transformers folder; None where there is none, or one of timm's. Raises InputError."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = _json(path)
    is_transformers = isinstance(config, dict) and "model_type" in config and "pretrained_cfg" not in config
    return config if is_transformers and "architecture" not in config else None


def hub_folder(name: str) -> Path | None:
    """Returns the local copy of the transformers folder `hf-hub:OWNER/NAME[@REVISION]`; None if it is not one.

    Also where the Hub cannot be asked: timm, which is asked next, says why.
    """
    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    try:
        folder = Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent
    except Exception:  # huggingface_hub and the network raise many kinds
        return None
    if read_config(folder) is None:
        return None
    for file in WEIGHTS:
        if _fetched(repo, file, revision):
            for part in _parts(folder / file)[1:]:
                _fetched(repo, part.name, revision)
            break
    _fetched(repo, PREPROCESSOR, revision)
    return folder


def _fetched(repo: str, file: str, revision: str) -> bool:
    """Fetches a file and returns whether the repository has it; without a network, whether its copy is here.

    Raises InputError where the Hub does not give it: too many requests, no right to it, a full disk.
    """
    try:
        hf_hub_download(repo, file, revision=revision or None)
    except Exception as error:  # huggingface_hub, the network and the disk raise many kinds
        unknown = isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if isinstance(error, EntryNotFoundError) and not unknown:
            return False
        at = f"@{revision}" if revision else ""
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"init hf-hub:{repo}{at}: the Hub does not give {file} ({why})") from error
    return True


def _parts(path: Path) -> list[Path]:
    """Returns the file itself or, of an index, itself and the files it names. Raises InputError."""
    if path.suffix != ".json":
        return [path]
    index = _json(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    parts = set(named.values()) if isinstance(named, dict) else set()
    if not parts or any(not isinstance(x, str) or Path(x).name != x for x in parts):
        raise InputError(f"init {path}: names no files of its own folder")
    return [path, *(path.parent / part for part in sorted(parts))]


def read_folder(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the tensors of a transformers folder, of all its parts. Raises InputError, which names the folder."""
    family = config.get("model_type")
    if family == "deit":  # transformers has it distilled only
        raise InputError(f"init {folder}: {UNSUPPORTED['dist_token']}")
    if family not in FAMILIES:
        raise InputError(f"init {folder}: a transformers model of type {family}; these load: {', '.join(FAMILIES)}")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"init {folder}: holds a config.json of transformers, but none of {', '.join(WEIGHTS)}")
    files = _parts(path)[1:] or [path]
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file) if file.suffix == ".safetensors" else read_pickled(file)[0]
        except (SafetensorError, OSError) as error:
            raise InputError(f"init {file}: not a readable safetensors file ({error})") from error
        except InputError as error:
            raise InputError(f"init {error}") from error
    return found


def with_config(guess: Architecture, config: dict[str, Any]) -> tuple[Architecture, list[str]]:
    """Returns the model that shapes tell, with what config.json adds (heads, windows, image size), and remarks.

    Raises InputError for a kind of layer that timm's model does not have.
    """
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise InputError(f"its hidden_act is {act}, and timm's model has gelu")
    if config.get("use_absolute_embeddings"):
        raise InputError("this Swin has absolute positions, which timm's Swin lacks")
    args, notes = dict(guess.args), []
    if not args.get("reg_tokens") and args.pop("no_embed_class", False):
        args.pop("img_size", None)  # theirs always have a position for the class token, but beside registers
    if _is_size(config.get("image_size")):
        size, patch = pair(config["image_size"]), config.get("patch_size", 1)
        told = args.get("img_size", size)
        if "window_size" not in config and isinstance(patch, int) and _patches(size, patch) != _patches(told, patch):
            raise InputError(
                f"its image_size {size[0]} x {size[1]} is not that of its positions, {told[0]} x {told[1]}"
            )
        args["img_size"] = list(size)
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and not isinstance(heads, bool):
        args["num_heads"] = heads
    else:
        notes += guess.notes
    name = guess.name
    window = config.get("window_size")
    if name is None and config.get("model_type") == "swinv2" and isinstance(window, int):
        args |= {
            "in_chans": config.get("num_channels", 3), "patch_size": config.get("patch_size", 4),
            "embed_dim": config.get("embed_dim"), "depths": config.get("depths"), "window_size": window,
            "num_heads": config.get("num_heads"), "mlp_ratio": config.get("mlp_ratio", 4.0),
        }  # fmt: skip
        name = "swinv2_tiny_window8_256"
    before = config.get("pretrained_window_sizes")
    if isinstance(before, list) and any(before):
        args["pretrained_window_sizes"] = before
    eps = config.get("layer_norm_eps")
    ours = 1e-5 if "window_size" in config else 1e-6
    if isinstance(eps, float) and abs(eps - ours) > 1e-8:
        notes.append(f"layer_norm_eps is {eps:g} there and {ours:g} in timm, which moves features by about as much")
    return Architecture(name, args, guess.hint), notes


def normalization(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and standard deviation of the images, as preprocessor_config.json says; None if it does not."""
    path = folder / PREPROCESSOR
    said = _json(path) if path.is_file() else None
    values = [said.get(key) if isinstance(said, dict) else None for key in ("image_mean", "image_std")]
    if not all(isinstance(x, list) and x and all(isinstance(y, int | float) for y in x) for x in values):
        return None
    mean, std = (tuple(float(y) for y in x) for x in values if x is not None)
    return (mean, std) if min(std) > 0 else None


def class_names(config: dict[str, Any]) -> list[str] | None:
    """Returns the names of a classifier's classes in order, where they are more than LABEL_0, LABEL_1 ..."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not all(isinstance(x, str) for x in named.values()):
        return None
    try:
        names = [named[key] for key in sorted(named, key=int)]
    except ValueError:
        return None
    return None if all(x == f"LABEL_{i}" for i, x in enumerate(names)) else names


def _patches(size: Sequence[int], patch: int) -> int:
    return (size[0] // patch) * (size[1] // patch)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"init {path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
