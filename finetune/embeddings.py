"""Files of features: a .safetensors with a row for each image, written and read without holding all of it in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex

from .parts import Parts
from .rows import row_names

DTYPES = {"float32": "F32", "float16": "F16"}  # as the format calls them
BYTES = {"I64": 8, "F32": 4, "F16": 2, "U8": 1}


class Embeddings:
    """A file of launch/embed.py, opened: where its images lie, and their features a block at a time.

    Attributes: `path`, `key` and `label` of every image (label -1: none), `metadata`, `dim` (numbers in a feature).
    """

    def __init__(self, file: str) -> None:
        """Reads all but the features. Raises InputError for what is no such file."""
        self.file = Path(file).expanduser()
        try:
            with safe_open(self.file, framework="pt") as opened:
                self.metadata: dict[str, str] = opened.metadata() or {}
                self.path, self.key = (_strings(opened.get_tensor(name)) for name in ("path", "key"))
                self.label = opened.get_tensor("label")
                count, self.dim = opened.get_slice("features").get_shape()
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such file") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{file} is no file of embeddings, as launch/embed.py writes them ({error})") from error
        if not count == len(self.path) == len(self.key) == len(self.label):
            raise InputError(f"{file}: holds {count} features of {len(self.path)} images: make it anew")

    def __len__(self) -> int:
        return len(self.path)

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[Tensor, "n D"]]]:
        """Yields (number of the first image, float32 features) for `rows` images at a time."""
        with safe_open(self.file, framework="pt") as opened:
            features = opened.get_slice("features")
            for start in range(0, len(self), rows):
                yield start, features[start : start + rows].float()


def _strings(lines: Tensor) -> list[str]:
    return lines.numpy().tobytes().decode("utf-8", "surrogateescape").split("\n")


def write_embeddings(index: ShardIndex, parts: Parts, partial: Path, metadata: dict[str, str], dtype: str) -> None:
    """Writes a .safetensors without holding all features in memory.

    Its tensors: features [n, D], NaN where an image could not be read; label [n], -1 where there is none; and path and
    key, the UTF-8 bytes of n lines each.
    """
    lines = {column: _lines(index, column) for column in ("path", "key")}
    width = parts.width("features")
    shapes = {"label": ("I64", [len(index)]), "features": (DTYPES[dtype], [len(index), width])}
    shapes |= {key: ("U8", [len(value)]) for key, value in lines.items()}
    metadata = metadata | {"unreadable": json.dumps(parts.unreadable())}
    with partial.open("wb") as file:
        file.write(_header(shapes, metadata))
        file.write(index.label.astype("<i8").tobytes())
        for part in parts:
            features = part.tensors["features"]
            features[[row - part.start for row in part.unreadable]] = torch.nan
            file.write(features.numpy().tobytes())
        for value in lines.values():
            file.write(value)


def _lines(index: ShardIndex, column: str) -> bytes:
    return "\n".join(row_names(index, i)[column] for i in range(len(index))).encode("utf-8", "surrogateescape")


def _header(shapes: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    """Returns what a .safetensors file begins with, for tensors that follow in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in shapes.items():
        stop = at + BYTES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor begins at a multiple of eight
    return len(text).to_bytes(8, "little") + text
