"""Addresses of shards: what names a shard, and what only gives access to it and is neither kept nor shown."""

import hashlib
import re


def is_remote(location: str) -> bool:
    """Returns True for a URL, False for a path."""
    return "://" in location


def shown(location: str) -> str:
    """Returns a URL without password and query, which may hold a signature, for messages; a path as it is."""
    return re.sub(r"(?<=://)[^/@]*@|\?.*", "", location) if is_remote(location) else location


def folder_of(location: str) -> str:
    """Returns the folder of a shard, a path or an address."""
    return _parts(location)[0].rpartition("/")[0] or "/"


def shard_name(location: str) -> str:
    """Returns the name of a shard within its folder, the same whenever and by whomever its address is signed.

    A query behind a name that ends in .tar is taken for a signature. Behind another one, such as `get?file=1`, it tells
    one shard from another.
    """
    place, query = _parts(location)
    name = place.rpartition("/")[2]
    if not query or name.endswith(".tar"):
        return name
    return f"{name}-{hashlib.sha256(query.encode()).hexdigest()[:16]}"


def _parts(location: str) -> tuple[str, str]:
    """Returns what stands before and behind the `?` of a web address; in other stores it is a letter like any other."""
    place, _, query = location.partition("?") if location.startswith(("http://", "https://")) else (location, "", "")
    return place, query
