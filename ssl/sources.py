"""Where images come from before they are shards: a folder, scikit-learn's digits, or CIFAR-10."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .errors import InputError
from .randoms import hashes

FILE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test")


class SourceImage(NamedTuple):
    """An image before it is in a shard."""

    name: str  # path below the source, or a number
    label: int | None
    content: Path | np.ndarray  # a file, or uint8 pixels [H, W] or [H, W, 3]


@dataclass(frozen=True)
class Source:
    """All images of a source, by split ("train", and "val" where there is one)."""

    splits: dict[str, list[SourceImage]]
    classes: list[str] | None  # names in label order; None: unlabelled


def read_source(
    source: str, *, labels: Literal["auto", "folders", "none"], val_share: float | None, seed: int
) -> Source:
    """Returns what `source` ("digits", "cifar10" or a folder) holds, split by share or by its own folders.

    Raises InputError when there is nothing, or when the split or the labels asked for are not to be had.
    """
    if val_share is not None and not 0 <= val_share < 1:
        raise InputError(f"val_share {val_share} is not in [0, 1): it is a share of the images")
    if source == "digits":
        images, names = _digits(), [str(i) for i in range(10)]
        return Source(_split_by_share(images, 0.2 if val_share is None else val_share, seed), names)
    if source == "cifar10":
        return _cifar10(val_share, seed)
    return _folder(Path(source).expanduser(), labels, val_share, seed)


def _digits() -> list[SourceImage]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn: pip install 'quarterlight[demo]'") from error
    ink, labels = load_digits(return_X_y=True)  # 0-16
    pixels = (np.asarray(ink) * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return [SourceImage(f"{i:04d}", int(y), x) for i, (x, y) in enumerate(zip(pixels, labels, strict=True))]


def _cifar10(val_share: float | None, seed: int) -> Source:
    from torchvision.datasets import CIFAR10

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quarterlight" / "cifar10"
    splits = {}
    for split, train in (("train", True), ("val", False)):
        try:
            data = CIFAR10(str(cache), train=train, download=True)
        except Exception as error:  # urllib, ssl and torchvision raise many kinds
            raise InputError(
                f"cifar10 could not be downloaded to {cache} ({error}): give a folder of images instead"
            ) from error
        pairs = zip(data.data, data.targets, strict=True)
        splits[split] = [SourceImage(f"{split}-{i:05d}", int(y), x) for i, (x, y) in enumerate(pairs)]
    if val_share is not None:
        splits = _split_by_share(splits["train"] + splits["val"], val_share, seed)
    return Source(splits, list(data.classes))


def _folder(root: Path, labels: Literal["auto", "folders", "none"], val_share: float | None, seed: int) -> Source:
    if not root.is_dir():
        raise InputError(f"source {root}: no such folder (and not one of: digits, cifar10)")
    roots = _split_folders(root, val_share)
    files = {split: list(_images_below(folder)) for split, folder in roots.items()}
    for split, paths in files.items():
        if not paths:
            raise InputError(f"source {roots[split]}: no image inside (looked for {' '.join(FILE_SUFFIXES)})")
    loose = [path for paths in files.values() for path in paths if len(path.parts) == 1]
    if labels == "folders" and loose:
        raise InputError(f"labels folders: {loose[0]} lies in no class folder; move it into one, or --labels none")
    labelled = labels == "folders" or (labels == "auto" and not loose)
    classes = sorted({path.parts[0] for path in files["train"]}) if labelled else None
    number = {name: i for i, name in enumerate(classes or [])}
    if classes is not None and (strange := {p.parts[0] for p in files.get("val", [])} - number.keys()):
        raise InputError(f"source {roots['val']}: class folder {sorted(strange)[0]} is not in {roots['train']}")
    splits = {
        split: [SourceImage(str(p), number.get(p.parts[0]), roots[split] / p) for p in paths]
        for split, paths in files.items()
    }
    if "val" not in splits and val_share:
        splits = _split_by_share(splits["train"], val_share, seed)
    return Source(splits, classes)


def _split_folders(root: Path, val_share: float | None) -> dict[str, Path]:
    """Returns the folder of each split: train/ and val/ (or test/) where both are there, else one folder for all.

    Raises InputError when a share is asked for of images that are split already.
    """
    own = {child.name.lower(): child for child in sorted(root.iterdir()) if child.is_dir()}
    train = next((own[name] for name in TRAIN_FOLDERS if name in own), None)
    val = next((own[name] for name in VAL_FOLDERS if name in own), None)
    if train is None:
        return {"train": root}
    if val is None:
        return {"train": train if len(list(root.iterdir())) == 1 else root}
    if val_share is not None:
        raise InputError(
            f"source {root} has {train.name}/ and {val.name}/ of its own: leave val_share out, or give {train}"
        )
    return {"train": train, "val": val}


def _images_below(root: Path) -> Iterator[Path]:
    """Yields the paths of image files relative to `root`, sorted, links to folders followed."""
    visited = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name, path in real.items() if not name.startswith(".") and path not in visited]
        visited.update(real[name] for name in subfolders)
        for name in sorted(names):
            if name.lower().endswith(FILE_SUFFIXES) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root)


def _split_by_share(images: list[SourceImage], share: float, seed: int) -> dict[str, list[SourceImage]]:
    """Returns a random `share` of the images as "val" and the rest as "train"."""
    count = round(len(images) * share)
    if share and not 0 < count < len(images):
        raise InputError(
            f"val_share {share} of {len(images)} images leaves {len(images) - count} to train on and {count} for val"
        )
    rank = np.argsort(hashes(seed, "val share", np.arange(len(images)), 1)[:, 0], kind="stable")
    chosen = set(rank[:count].tolist())
    splits = {"train": [x for i, x in enumerate(images) if i not in chosen], "val": [images[i] for i in sorted(chosen)]}
    return {split: found for split, found in splits.items() if found}
