"""Images to look at, with labels where there are any: from folders, files, scikit-learn's digits or local shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from quarterlight.ssl.addresses import is_remote, shown
from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.decode import ImageFile, UnreadableImage
from quarterlight.ssl.entries import UNLABELLED
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex, class_names, open_index
from quarterlight.ssl.shard_names import sources
from quarterlight.ssl.sources import InShard, SourceImage, is_image, read_source

BY_NAME = ("digits", "cifar10")  # sources that are no folders; ./digits is one


@dataclass(frozen=True)
class Images:
    """Center crops of images, evenly spaced over what was given."""

    pixels: UInt8[Tensor, "n H W C"]
    labels: Int[np.ndarray, " n"]  # UNLABELLED where there is none
    names: list[str]  # path below the folder, or key
    classes: list[str] | None  # names in label order
    total: int  # of which these are some
    unreadable: list[tuple[str, str]]  # name and reason; left out

    def evenly(self, count: int) -> Int[np.ndarray, " k"]:
        """Returns the numbers of `count` of them, or of all, evenly spaced."""
        return _evenly(len(self.names), count)

    def class_name(self, label: int) -> str:
        """Returns what a class is called."""
        return self.classes[label] if self.classes is not None and 0 <= label < len(self.classes) else str(label)


def read_images(given: str | list[str], *, count: int, crop: CenterCrop, in_chans: Literal[1, 3]) -> Images:
    """Returns at most `count` images of what `given` names, evenly spaced over it.

    Raises InputError when there is none, or none of them can be read.
    """
    found, classes = _find(given)
    pixels, labels, names, unreadable = [], [], [], []
    for i in _evenly(len(found), count).tolist():
        image = found[i]
        try:
            pixels.append(crop(_open(image, in_chans), np.empty(0)))
        except (UnreadableImage, OSError) as error:
            unreadable.append((image.name, str(error)))
            continue
        labels.append(UNLABELLED if image.label is None else image.label)
        names.append(image.name)
    if not names:
        name, reason = unreadable[0]
        raise InputError(f"images {given}: none of {len(unreadable)} can be read ({name}: {reason})")
    return Images(torch.stack(pixels), np.array(labels), names, classes, len(found), unreadable)


def _evenly(total: int, count: int) -> Int[np.ndarray, " k"]:
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


def _open(image: SourceImage, in_chans: Literal[1, 3]) -> ImageFile:
    content = image.content
    if isinstance(content, np.ndarray):
        pixels = content if content.ndim == 3 else content[:, :, None]
        if pixels.shape[2] == in_chans:
            return ImageFile.of_pixels(pixels)
        if in_chans == 3:
            return ImageFile.of_pixels(pixels.repeat(3, axis=2))
        raise UnreadableImage("it is in color, and the encoder takes grey images")
    return ImageFile(content.read() if isinstance(content, InShard) else content.read_bytes(), in_chans)


def _find(given: str | list[str]) -> tuple[list[SourceImage], list[str] | None]:
    """Returns the images that are named, and the names of their classes."""
    words = [given] if isinstance(given, str) else given
    if not words:
        raise InputError("images is empty: give a folder, image files, or shards")
    paths = {word: Path(word).expanduser() for word in words}
    loose = [word in BY_NAME or path.is_dir() or is_image(path) for word, path in paths.items()]
    tars = [str(path / "*.tar") for word, path in paths.items() if word not in BY_NAME and _holds_tars(path)]
    if not any(loose) or len(tars) == len(paths):
        return _in_shards(tars or words)
    if not all(loose) or tars:
        raise InputError(f"images {given}: give folders and image files, or shards, not both")
    found: list[SourceImage] = []
    classes: list[str] | None = None
    for word, path in paths.items():
        if is_image(path) and not path.is_dir():
            if not path.is_file():
                raise InputError(f"images {path}: no such file")
            found.append(SourceImage(path.name, None, path))
            continue
        source = read_source(word, labels="auto", val_share=None, seed=0)
        classes = source.classes if len(paths) == 1 else None  # labels of two folders are not of one kind
        images = source.splits.get("val", source.splits["train"])
        found += images if len(paths) == 1 else [image._replace(label=None) for image in images]
    return found, classes


def _holds_tars(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.tar")) and not any(is_image(path) for path in folder.iterdir())


def _in_shards(patterns: list[str]) -> tuple[list[SourceImage], list[str] | None]:
    if remote := next(filter(is_remote, sources(patterns)), None):
        raise InputError(f"images {shown(remote)}: pictures are of local shards: copy one of these to a local disk")
    index = open_index(patterns)
    return [_in_shard(index, i) for i in range(len(index))], class_names(index)


def _in_shard(index: ShardIndex, i: int) -> SourceImage:
    label = int(index.label[i])
    place = InShard(index.paths[int(index.shard[i])], int(index.offset[i]), int(index.size[i]))
    return SourceImage(index.key(i), None if label == UNLABELLED else label, place)
