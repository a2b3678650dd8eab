"""From what a user writes for a set of shards to the shards: globs, braces, lists, `_info.json`, addresses."""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import braceexpand

from .addresses import is_remote, shown
from .errors import InputError
from .remote import glob_remote, read_remote

SEPARATOR = re.compile(r"::(?![^\[\]]*\])")  # between sources, as open_clip writes them; not in https://[::1]/a.tar
INFO_SUFFIX = "info.json"


def sources(patterns: str | Sequence[str]) -> list[str]:
    """Returns the sources that are mixed: the elements of a list, or the parts of 'a.tar::b.tar'."""
    given = [patterns] if isinstance(patterns, str) else patterns
    found = [part for pattern in given for part in SEPARATOR.split(pattern) if part]
    if not found:
        raise InputError("shards: no pattern given")
    return found


def shard_paths(pattern: str) -> list[str]:
    """Returns the shards that one source names, each once, globs sorted: absolute paths, or addresses as they are.

    `FOLDER/_info.json:SPLIT` names the shards that timm's index of a data set lists. Raises InputError when a pattern
    matches nothing.
    """
    found: dict[str, None] = {}
    try:
        parts = list(braceexpand.braceexpand(os.path.expanduser(pattern)))
    except braceexpand.UnbalancedBracesError as error:  # type: ignore[attr-defined]
        raise InputError(f"shards: the braces in {shown(pattern)} do not match") from error
    for part in parts:
        found |= dict.fromkeys(_of_info_file(part) or (_remote(part) if is_remote(part) else _local(part)))
    return list(found)


def read_small_file(location: str) -> bytes | None:
    """Returns what is at a path or an address; None when there is nothing."""
    if is_remote(location):
        return read_remote(location)
    return Path(location).read_bytes() if os.path.isfile(location) else None


def _local(part: str) -> Iterator[str]:
    matches = [part] if os.path.exists(part) else sorted(glob.glob(part))
    if not matches:
        reason = "matches no file" if glob.has_magic(part) else "does not exist"
        raise InputError(f"shards: {part} {reason} (seen from {Path.cwd()})")
    for match in matches:
        if os.path.isdir(match):
            raise InputError(
                f"shards: {match} is a folder; name its tars, as in '{match}/train-*.tar' "
                "(launch/shards.py makes them of images)"
            )
        if not os.path.exists(match):
            raise InputError(f"shards: {match} is a link to {os.readlink(match)}, which does not exist")
        yield os.path.abspath(match)


def _remote(part: str) -> list[str]:
    name = part.partition("?")[0] if part.startswith("http") else part
    path = name.partition("://")[2].partition("/")[2]
    if not path or path.endswith("/"):
        raise InputError(
            f"shards: {shown(part)} names no tar; write {shown(name).rstrip('/')}/train-{{000..146}}.tar, or the like"
        )
    if not glob.has_magic(path):
        return [part]  # whether it is there is known when it is fetched: a thousand questions take minutes
    matches = glob_remote(part)
    if not matches:
        raise InputError(
            f"shards: {shown(part)} matches nothing; most web servers list no files: use braces, {{000..146}}"
        )
    return matches


def _of_info_file(part: str) -> list[str]:
    """Returns the shards of a split that timm's `_info.json` lists, or nothing when `part` names no such file."""
    file, _, split = part.rpartition(":") if f"{INFO_SUFFIX}:" in part else (part, "", "")
    if not file.endswith(INFO_SUFFIX):
        return []
    data = read_small_file(file)
    if data is None:
        raise InputError(f"shards: {shown(file)} does not exist")
    folder = file.rpartition("/")[0]
    try:
        splits: dict[str, Any] = json.loads(data)["splits"]
        names = {key: list(braceexpand_all(value["filenames"])) for key, value in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"shards: {shown(file)} lists no splits with filenames, as timm writes them ({error!r})"
        ) from error
    if split not in names:
        example = f"{shown(file)}:{next(iter(names), 'train')}"
        raise InputError(
            f"shards: {shown(file)} has the splits {', '.join(names)}: write one behind it, as in {example}"
        )
    paths = [f"{folder}/{name}" if folder else name for name in names[split]]
    return [path if is_remote(path) else next(_local(path)) for path in paths]


def braceexpand_all(names: str | list[str]) -> Iterator[str]:
    """Yields the names that one pattern with braces, or a list of them, stands for."""
    for name in [names] if isinstance(names, str) else names:
        yield from braceexpand.braceexpand(name)
