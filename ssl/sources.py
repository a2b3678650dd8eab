"""Where images come from before they are new shards: a folder, scikit-learn's digits, CIFAR-10, or other shards."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .addresses import folder_of, shard_name, shown
from .dataset_file import DATASET_FILE, read_dataset
from .entries import UNLABELLED
from .errors import InputError
from .index import ShardIndex, open_index
from .randoms import hashes

FILE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test")


class InShard(NamedTuple):
    """Where the bytes of an image lie in a tar."""

    path: str
    offset: int  # bytes from the start of the tar
    size: int  # bytes

    def read(self) -> bytes:
        """Returns the bytes of the image file. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends {self.size - len(data)} bytes before the image does")
        return data


class SourceImage(NamedTuple):
    """An image before it is in a shard."""

    name: str  # path below the source, or a number, or SHARD/KEY
    label: int | None
    content: Path | np.ndarray | InShard  # a file, or uint8 pixels [H, W] or [H, W, 3], or a part of a tar


@dataclass(frozen=True)
class Source:
    """All images of a source, by split ("train", and "val" where there is one)."""

    splits: dict[str, list[SourceImage]]
    classes: list[str] | None  # names in label order; None: unlabelled, or labels without names
    damaged: list[dict[str, str]] = field(default_factory=list)  # parts of shards that cannot be read: file and reason


def read_source(
    source: str, *, labels: Literal["auto", "folders", "none"], val_share: float | None, seed: int
) -> Source:
    """Returns what `source` ("digits", "cifar10" or a folder) holds, split by share or by its own folders.

    Raises InputError when there is nothing, or when the split or the labels asked for are not to be had.
    """
    _check_share(val_share)
    if source == "digits":
        images, names = _digits(), [str(i) for i in range(10)]
        return Source(_split_by_share(images, 0.2 if val_share is None else val_share, seed), names)
    if source == "cifar10":
        return _cifar10(val_share, seed)
    return _folder(Path(source).expanduser(), labels, val_share, seed)


def read_shards(paths: dict[str, str], *, val_share: float | None, seed: int) -> Source:
    """Returns the images in shards: {path or address: the local file that it is, or was fetched to}.

    Samples of shards that the dataset.json beside them lists as val are "val"; all others are "train".
    Raises InputError when there is no image, a label has no class, or a share is asked for of what is split already.
    """
    _check_share(val_share)
    index = open_index(list(paths.values()))
    datasets = {folder: read_dataset(folder) for folder in dict.fromkeys(folder_of(path) for path in paths)}
    val_shards = {f"{folder}/{name}" for folder, dataset in datasets.items() for name in _val_shards(dataset)}
    splits: dict[str, list[SourceImage]] = {"train": [], "val": []}
    for path, images in _images_in(index, paths):
        splits["val" if f"{folder_of(path)}/{shard_name(path)}" in val_shards else "train"] += images
    splits = {split: images for split, images in splits.items() if images}
    if val_share is not None and "val" in splits:
        raise InputError(
            f"{len(splits['val'])} of the images are val images by their {DATASET_FILE}: leave val_share out, or name "
            "the train shards only"
        )
    if val_share:
        splits = _split_by_share(splits["train"], val_share, seed)
    shard_names = {local: shard_name(path) for path, local in paths.items()}
    damaged = [
        {"file": shard_names[x.shard], "reason": f"{x.reason} (byte {x.offset}, {x.size} bytes lost)"}
        for x in index.defects
        if x.size
    ]
    return Source(splits, _class_names(index, list(paths), datasets), damaged)


def _images_in(index: ShardIndex, paths: dict[str, str]) -> Iterator[tuple[str, list[SourceImage]]]:
    """Yields each shard's path or address, and the images in it."""
    first = 0
    counts = np.bincount(index.shard, minlength=len(paths)).tolist()
    for (path, local), count in zip(paths.items(), counts, strict=True):
        stop = first + count
        shard = shard_name(path)
        rows = zip(*(x[first:stop].tolist() for x in (index.label, index.offset, index.size)), strict=True)
        images = []
        for i, (label, offset, size) in enumerate(rows, first):
            known_label = None if label == UNLABELLED else label
            images.append(SourceImage(f"{shard}/{index.key(i)}", known_label, InShard(local, offset, size)))
        yield path, images
        first = stop


def _val_shards(dataset: dict[str, Any]) -> set[str]:
    """Returns the names of the shards that dataset.json lists as val; none when it is of another kind."""
    try:
        return {shard["name"] for shard in dataset["splits"]["val"]["shards"]}
    except (KeyError, TypeError):
        return set()


def _class_names(index: ShardIndex, paths: list[str], datasets: dict[str, dict[str, Any]]) -> list[str] | None:
    """Returns the class names in which all labelled shards agree; None when one of them has none."""
    labelled = np.unique(index.shard[index.label != UNLABELLED]).tolist()
    folders = dict.fromkeys(folder_of(paths[i]) for i in labelled)
    named = {folder: datasets[folder].get("classes") for folder in folders}
    lists = [names for names in named.values() if names]
    if any(names != lists[0] for names in lists):
        raise InputError(f"the shards in {' and '.join(map(shown, named))} have different classes: reshard them apart")
    if not lists or len(lists) < len(named):
        return None
    if (largest := int(index.label.max())) >= len(lists[0]):
        key = index.key(int(index.label.argmax()))
        raise InputError(
            f"{shown(next(iter(folders)))}/{DATASET_FILE} names {len(lists[0])} classes, but {key} has the label "
            f"{largest}: mend the names, or delete the file to go without"
        )
    return lists[0]


def _check_share(val_share: float | None) -> None:
    if val_share is not None and not 0 <= val_share < 1:
        raise InputError(f"val_share {val_share} is not in [0, 1): it is a share of the images")


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
    found = {split: list(files_below(folder)) for split, folder in roots.items()}
    files = {split: list(filter(is_image, paths)) for split, paths in found.items()}
    others = Counter(x.suffix.lower() or "no suffix" for paths in found.values() for x in paths if not is_image(x))
    if others and any(files.values()):
        listed = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(8))
        print(f"left aside {sum(others.values())} files that are no images by their names ({listed})", file=sys.stderr)
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


def is_image(path: Path) -> bool:
    """Returns whether a file is an image by its name."""
    return path.name.lower().endswith(FILE_SUFFIXES)


def files_below(root: Path) -> Iterator[Path]:
    """Yields the paths of files relative to `root`, sorted, hidden ones left out, links to folders followed."""
    visited = {os.path.realpath(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name, path in real.items() if not name.startswith(".") and path not in visited]
        visited.update(real[name] for name in subfolders)
        for name in sorted(names):
            if not name.startswith("."):
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
