"""Images in folders and files of their own, under one numbering, as the samples of shards are."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .entries import PICTURES, UNLABELLED, ShardEntries
from .errors import InputError
from .index import ShardIndex
from .sources import FILE_SUFFIXES, files_below, is_image


class LooseFiles(ShardIndex):
    """Image files: each folder stands where an index has a shard, and a key is the path below it."""

    def path(self, sample: int) -> Path:
        """Returns the path of an image, as the folder was given."""
        return Path(self.paths[int(self.shard[sample])]) / self.key(sample)

    def read(self, sample: int) -> bytes:
        """Returns the bytes of an image file. Raises OSError."""
        return self.path(sample).read_bytes()

    def fingerprint(self) -> str:
        """Returns a hash of names, sizes and order; the same wherever the folders lie."""
        digest = hashlib.sha256(self._keys.tobytes())
        digest.update(self.shard.tobytes() + self.size.tobytes())
        return digest.hexdigest()[:16]


def open_files(given: Sequence[str]) -> LooseFiles:
    """Returns the images that `given` names: folders, searched at any depth in a fixed order, and files.

    Hidden files, and in folders files that are no images by their names, are left aside. Raises InputError for what is
    not there, a folder without an image, and a name with a line break.
    """
    folders: list[str] = []
    found: list[ShardEntries] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            folder, keys = path, [str(x) for x in files_below(path) if is_image(x)]
            if not keys:
                tars = f", but tars: give '{name}/*.tar'" if any(path.glob("*.tar")) else ""
                raise InputError(f"{name}: no image inside at any depth ({' '.join(FILE_SUFFIXES)}){tars}")
        elif path.is_file():
            folder, keys = path.parent, [path.name]
            if not path.name.lower().endswith(PICTURES):
                raise InputError(f"{name} is no image by its name: give folders, images, or shards that end in .tar")
        else:
            raise InputError(f"{name}: no such file or folder")
        if odd := next((key for key in keys if "\n" in str(folder / key)), None):
            raise InputError(f"{folder / odd!r}: there is a line break in its name: rename it")
        if folders and folders[-1] == str(folder) and path.is_file():  # files of one folder, as a shell lists them
            keys = [*found.pop().keys, *keys]
            folders.pop()
        sizes = np.array([_size(folder / key) for key in keys], np.int64)
        nothing = np.zeros(len(keys), np.int64)
        folders.append(str(folder))
        found.append(ShardEntries(nothing, sizes, nothing + UNLABELLED, keys, []))
    return LooseFiles(folders, found)


def _size(path: Path) -> int:
    """Returns a file's size in bytes; 0 where there is none, as behind a broken link: reading it will say why."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
