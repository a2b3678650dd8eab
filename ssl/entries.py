"""The samples of one shard: which files of the tar belong together, and the label of each."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from .errors import InputError
from .tar_scan import Defect, Member, scan_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
PICTURES = tuple(f".{x}" for x in (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic"))
ENDINGS = "which ends in " + ", ".join(IMAGE_EXTENSIONS)
LABEL_EXTENSIONS = ("cls", "json", "txt")
LONGEST_LABEL = 1 << 20  # bytes; a JSON of captions is far below it
UNLABELLED = -1
WHOLE_NUMBER = re.compile(rb"\s*[+-]?[0-9]+\s*")  # int() takes 1_0 as well


@dataclass(frozen=True)
class ShardEntries:
    """The samples of one shard, in file order."""

    offset: Int[np.ndarray, " n"]  # of the image's bytes, from the start of the tar
    size: Int[np.ndarray, " n"]  # bytes
    label: Int[np.ndarray, " n"]  # class number, or UNLABELLED
    keys: list[str]
    defects: list[Defect]

    def digest(self) -> str:
        """Returns a hash of which samples lie where, with which labels: what reading the shard relies on."""
        found = hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape"))
        for column in (self.offset, self.size, self.label):
            found.update(column.astype("<i8").tobytes())
        return found.hexdigest()[:16]


Sample = dict[str, Member]  # the files of a sample by extension


def scan_shard(path: Path) -> ShardEntries:
    """Returns the samples of a tar that hold an image, and what is wrong with the tar. Raises InputError for no tar."""
    members, defects = scan_tar(path)
    if not members and (defects or not path.stat().st_size):
        with path.open("rb") as file:
            start = file.read(24)
        what = f"it begins with {start!r}" if start else "it is empty"
        raise InputError(f"{path}: not a tar ({what}); fetch or write it again, or leave it out")
    samples, odd = group(members)
    if not members:
        odd.append(Defect(0, 0, "no file inside"))
    elif not any(image_of(sample) for _, sample in samples):
        odd.append(Defect(0, 0, f"no {', '.join(IMAGE_EXTENSIONS)} inside"))
    elif not any(defect.size for defect in defects):  # else the images may be what was lost
        odd += _without_image(samples)
    taken = {image for _, sample in samples if (image := image_of(sample))}
    pictures = [
        x for x in members if x.name.lower().endswith(PICTURES) and not x.name.rpartition("/")[2].startswith(".")
    ]
    if spare := [x for x in pictures if x not in taken]:
        more = f", and {len(spare) - 1} like it" if len(spare) > 1 else ""
        odd.append(Defect(spare[0].offset, 0, f"{spare[0].name!r} is not read{more}: one image a sample, {ENDINGS}"))
    rows: list[tuple[int, int, int]] = []
    keys = []
    with path.open("rb") as file:
        for key, sample in samples:
            image = image_of(sample)
            if image is not None:
                label, defect = _label(file.fileno(), sample, key)
                rows.append((image.offset, image.size, label))
                keys.append(key)
                odd += [defect] if defect else []
    offset, size, label = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return ShardEntries(offset, size, label, keys, defects + odd)


def image_of(sample: Sample) -> Member | None:
    """Returns the file of a sample that is its image: the first of IMAGE_EXTENSIONS, else one that ends like them.

    So `cat.v2.jpg` is the image of `cat`, and `cat.seg.png` only where there is no `cat.jpg`.
    """
    exact = next((sample[x] for x in IMAGE_EXTENSIONS if x in sample), None)
    return exact or next((file for x, file in sample.items() if x.rpartition(".")[2] in IMAGE_EXTENSIONS), None)


def group(members: Sequence[Member]) -> tuple[list[tuple[str, Sample]], list[Defect]]:
    """Returns the files by sample, with its key, in the order of their first files, and what was odd about them.

    Files are one sample when their names are the same up to the first dot of the base name. Differs from webdataset:
    they may lie apart, since an index finds them all the same (webdataset would take them for two samples).
    """
    samples: list[tuple[str, Sample]] = []
    latest: dict[str, int] = {}
    apart: list[Member] = []
    repeated: list[Member] = []
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:  # dot files and bare names are no part of a sample, as in webdataset
            continue
        key = f"{folder}{slash}{stem}".replace("\n", " ")  # the sidecar holds a key a line
        extension = extension.lower()
        at = latest.get(key)
        if at is None or extension in samples[at][1]:
            repeated += [] if at is None else [member]
            latest[key] = at = len(samples)
            samples.append((key, {}))
        elif at != len(samples) - 1:
            apart.append(member)
        samples[at][1][extension] = member
    odd = []
    for found, what in ((apart, "apart from the other files of its sample"), (repeated, "there before")):
        if found:
            more = f", and {len(found) - 1} like it" if len(found) > 1 else ""
            odd.append(Defect(found[0].offset, 0, f"{found[0].name!r} is {what}{more}"))
    return samples, odd


def _without_image(samples: Sequence[tuple[str, Sample]]) -> list[Defect]:
    """Returns a defect where there are labels of images that are not there; a text alone need not belong to one."""
    found = [(key, x) for key, x in samples if image_of(x) is None and ("cls" in x or "json" in x)]
    if not found:
        return []
    key, files = found[0]
    more = f", and {len(found) - 1} like it" if len(found) > 1 else ""
    kinds = ", ".join(f".{extension}" for extension in files)
    return [Defect(min(x.offset for x in files.values()), 0, f"{key!r} has {kinds} and no image{more}")]


def _label(descriptor: int, sample: Sample, key: str) -> tuple[int, Defect | None]:
    """Returns the class number in a sample's .cls, .json ("label") or .txt, and what is wrong with it, if anything.

    A .txt that holds no number is a caption (img2dataset), and so is a .json without "label".
    """
    extension = next((x for x in LABEL_EXTENSIONS if x in sample), None)
    if extension is None:
        return UNLABELLED, None
    member = sample[extension]
    text = os.pread(descriptor, min(member.size, LONGEST_LABEL), member.offset)
    if extension == "txt" and not text.strip().isdigit():
        return UNLABELLED, None
    try:
        if extension != "json" and not WHOLE_NUMBER.fullmatch(text):
            raise ValueError("no number")
        label = int(text) if extension != "json" else json.loads(text).get("label", UNLABELLED)
        if isinstance(label, float) and not label.is_integer():
            raise ValueError("a fraction")
        label = int(np.int64(int(label)))
        if label < 0 and label != UNLABELLED:
            raise ValueError("negative")
        return label, None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return UNLABELLED, Defect(member.offset, 0, f"label of {key}.{extension} is {text[:40]!r}, not a class number")
