"""Released .pth files: tensors and plain values out of a pickle, none of whose code runs.

`weights_only` makes torch read tensors and containers only, and refuse whatever else a pickle names. Beside them stand,
by name, the few kinds of plain data that released files carry in their training arguments.
"""

import argparse
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


class Inert:
    """Stands for a value that is of no use here: it takes what a pickle gives it and does nothing."""

    def __new__(cls, *args: Any) -> "Inert":
        """Returns an object without content."""
        del args
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        del state


# What a name in a pickle becomes. The classes of these names are never imported.
PLAIN: list[Any] = [
    argparse.Namespace,  # MAE's, DINO's and timm's arguments
    (OrderedDict, "yacs.config.CfgNode"),  # Swin's and SimMIM's; a dictionary
    *(
        (Inert, name)
        for name in (
            "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType",
            "numpy.dtypes.Float32DType", "numpy.dtypes.Int64DType", "pathlib.PosixPath", "pathlib._local.PosixPath",
        )
    ),
]  # fmt: skip
# Where state dicts lie in a file, the first that is there; averages of weights first, as timm reads them.
PLACES = (
    "state_dict_ema", "model_ema", "model", "state_dict", "model_state", "teacher", "target_encoder", "student",
    "encoder", "backbone", "net", "module",
)  # fmt: skip
MOST_DEEP = 4  # such places inside one another


def read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a .pth or .bin file by name, and its training arguments, as far as they are plain.

    Raises InputError for what is no such file, holds anything but data (which is not run), or holds no tensors.
    """
    try:
        with torch.serialization.safe_globals(PLAIN):
            # mapped, so that an optimizer beside the model is not read; files of before torch 1.6 are no archives
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many kinds for what is not its own format
        named = re.search(r"GLOBAL ([\w.]+)|blocked module (\w+)|from module ([\w.]+)", str(error))
        code = named and next(x for x in named.groups() if x)
        why = f"it names {code}, which is code and was not run" if code else type(error).__name__
        raise InputError(f"{path}: not a .safetensors file, nor a .pth file of plain tensors ({why})") from error
    arguments = _arguments(content) if isinstance(content, dict) else {}
    tensors, place = _state_dict(content)
    if not tensors:
        optimizer = isinstance(content, dict) and {"optimizer", "param_groups"} & content.keys()
        raise InputError(f"{path}: holds no tensors by name" + (", but an optimizer's state" if optimizer else ""))
    if place:
        arguments["place"] = place
    return tensors, arguments


def _state_dict(content: Any) -> tuple[dict[str, Tensor], str]:
    place = []
    for _ in range(MOST_DEEP):
        inside = next((key for key in PLACES if isinstance(content, dict) and _has_tensors(content.get(key))), None)
        if inside is None:
            break
        content = content[inside]
        place.append(inside)
    tensors = content if isinstance(content, dict) else {}
    found = {key: x.detach() for key, x in tensors.items() if isinstance(key, str) and isinstance(x, Tensor)}
    return found, ".".join(place)


def _has_tensors(content: Any, deep: int = MOST_DEEP) -> bool:
    if not isinstance(content, dict):
        return False
    values = content.values()
    return any(isinstance(x, Tensor) or (deep > 0 and _has_tensors(x, deep - 1)) for x in values)


def _arguments(content: dict[Any, Any]) -> dict[str, Any]:
    """Returns the training arguments (argparse's) that stand beside the weights.

    Of SimMIM's settings "norm_target", the side of the windows in which its target is normalized, 0 for plain pixels.
    """
    args = content.get("args")
    found = dict(vars(args)) if isinstance(args, argparse.Namespace) else {}
    settings = content.get("config")
    for key in ("MODEL", "SIMMIM", "NORM_TARGET"):
        settings = settings.get(key) if isinstance(settings, dict) else None
    if isinstance(settings, dict) and isinstance(side := settings.get("PATCH_SIZE"), int):
        found["norm_target"] = side if settings.get("ENABLE") is True else 0
    return found
