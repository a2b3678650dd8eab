"""Files that are complete or absent: written beside, synced, and renamed into place."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(file: Path) -> None:
    """Syncs a file and gives it the usual permissions; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    _sync(file)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(partial)` on a name beside `path` and renames it; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")  # machines may share a disk
    try:
        write(partial)
        _complete(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Calls `fill(partial)` on a new folder beside `path` and renames it into place; an older `path` goes last."""
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        for file in partial.iterdir():
            _complete(file)
        _sync(partial)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Deletes what a killed process left half written in `folder`; with `name`, of that file only.

    What living processes write would go as well: a folder that others write to needs the name.
    """
    for leftover in folder.glob(f".{name}.*.partial" if name else ".*.partial"):
        if leftover.is_file():
            leftover.unlink()


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Returns what the system said, which safetensors gives as a text that ends with "(os error NUMBER)"."""
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return OSError(f"{path} cannot be written ({error})")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError, with the path, where safetensors has an error of its own kind."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise as_os_error(error, path) from error


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text`."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
