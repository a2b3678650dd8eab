"""Files behind URLs, through fsspec: they come whole, are checked by their size, and are complete or absent.

No thread and no connection outlives a call, so a process that calls may fork afterwards. Shards come through `fetcher`,
a process of its own, and no loader's worker needs this.
"""

import asyncio
import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .addresses import is_remote, shown
from .errors import InputError
from .patience import PATIENCE, Absent, Changed, Patience, Refused, Stalled, persist, unwritable

T = TypeVar("T")

SAME_BODY_TRIES = 3  # a body that is complete, but not as the index says, is believed after so many


def fetch(
    url: str, path: Path, *, size: int | None = None, content: str | None = None, patience: Patience = PATIENCE
) -> None:
    """Downloads a file of `size` bytes (None: as many as the server says) to `path`; one call a path at a time.

    `content` is `ShardEntries.digest()` of the shard that is expected: a shard written anew often has its old size, as
    tars are filled up to a multiple of 10,240 bytes, and its labels would be those of other images.

    Raises InputError when the file cannot be had or `path` not be written. A kill leaves at most `.NAME.PID.partial`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    others: list[object] = []  # what came in place of what the index says

    def attempt() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = partial.open("wb")
        except OSError as error:
            raise unwritable(path.parent, error) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells `remove_dead_partials` that somebody writes it
            _run(_download(url, partial, patience.stall_s))
            if not partial.exists():
                raise Stalled("the file was deleted while it was being written")
            _check(partial, size, content, others)
            _sync(partial)
            os.replace(partial, path)

    try:
        persist(url, "fetched", patience, attempt, path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_remote(url: str, *, patience: Patience = PATIENCE) -> bytes | None:
    """Returns a small file, or None when there is none: stores that one may not list refuse access to what is missing.

    Raises InputError when that cannot be found out.
    """
    with tempfile.TemporaryDirectory(prefix="quarterlight-") as folder:
        path = Path(folder) / "file"
        try:
            fetch(url, path, patience=patience)
        except (Absent, Refused):
            return None
        return path.read_bytes()


def write_remote(url: str, data: bytes, *, patience: Patience = PATIENCE) -> None:
    """Writes a small file, in place of an older one. Raises InputError where that cannot be done."""
    if url.startswith(("http://", "https://")):
        raise InputError(f"{shown(url)}: nothing can be written to a web server; write a local file and upload it")

    async def write() -> None:
        async with _opened(url) as (system, name):
            await system._pipe_file(name, data) if _is_async(system) else system.pipe_file(name, data)

    persist(url, "written", patience, lambda: _run(write()))


def glob_remote(pattern: str, *, patience: Patience = PATIENCE) -> list[str]:
    """Returns the URLs that a URL with *, ? or [] matches, sorted; over http, those that the folder's page links to.

    Raises InputError when the place cannot be listed.
    """
    scheme = pattern.partition("://")[0]

    async def find() -> list[str]:
        async with _opened(pattern) as (system, name):
            system.invalidate_cache()
            found = await system._glob(name) if _is_async(system) else system.glob(name)
        return [str(x) if is_remote(str(x)) else f"{scheme}://{str(x).lstrip('/')}" for x in found]

    try:
        return sorted(persist(pattern, "listed", patience, lambda: _run(find())))
    except Absent:
        return []


def _is_async(system: Any) -> bool:
    return getattr(system, "asynchronous", False)  # file:// and hf:// do not know the word


def remove_dead_partials(folder: Path) -> None:
    """Deletes what processes that are gone left half fetched in `folder`; a lock tells it from a running download."""
    for partial in folder.glob(".*.partial"):
        try:
            with partial.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)
        except OSError:
            continue  # in use, or gone by now


def _sync(file: Path) -> None:
    """Waits for the disk: else a crash of the machine could leave a file of the right size, but without its bytes."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


async def _download(url: str, partial: Path, stall_s: float) -> None:
    """Writes the file by one plain GET: no HEAD before it, no parts, which cost memory and more requests."""
    scheme, options = url.partition("://")[0], {}
    async with _opened(url) as (system, name):
        if not _is_async(system):
            system.get_file(name, str(partial))  # huggingface_hub has its own time-outs
            return
        if scheme in ("http", "https"):
            headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
            options = {"headers": headers, "timeout": _no_time_limit()}
        elif scheme in ("s3", "s3a"):
            options = {"max_concurrency": 1}
        elif scheme in ("gs", "gcs"):
            options = {"concurrency": 1}
        await _watched(system._get_file(name, str(partial), **options), partial, stall_s)


@contextlib.asynccontextmanager
async def _opened(url: str) -> AsyncIterator[tuple[Any, str]]:
    """Gives fsspec's file system and its name for the file, and closes its connections in the end.

    fsspec's own way keeps them, and a thread with an event loop. In a child that is forked later, its cleaning up takes
    them out of the loop that the parent shares, and the parent's next download hangs. Raises ImportError or ValueError.
    """
    import fsspec.config  # slow to start, and not needed for local shards
    import fsspec.core

    scheme, options = url.partition("://")[0], {}
    if scheme in ("http", "https"):
        own = fsspec.config.conf.get("http", {}) | fsspec.config.conf.get("https", {})  # what the user set for fsspec
        options["client_kwargs"] = {"trust_env": True} | own.get("client_kwargs", {})  # proxies and .netrc count
    elif scheme in ("gs", "gcs"):
        options["requests_timeout"] = _no_time_limit()
    kind = fsspec.get_filesystem_class(scheme)
    connect = getattr(kind, "set_session", getattr(kind, "_set_session", None))
    if not kind.async_impl or connect is None:
        yield fsspec.core.url_to_fs(url, **options)
        return
    system, name = fsspec.core.url_to_fs(url, asynchronous=True, skip_instance_cache=True, **options)
    session = await connect(system)
    try:
        yield system, name
    finally:
        await session.close()


def _no_time_limit() -> Any:
    """Returns aiohttp's time-out without its bound of 300 s on a whole download; a stall is seen by `_watched`."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns, in a loop of its own; in a thread of its own where a loop runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _watched(transfer: Coroutine[Any, Any, Any], partial: Path, stall_s: float) -> None:
    """Awaits a transfer while `partial` grows. Raises Stalled when it did not for `stall_s`."""
    task = asyncio.ensure_future(transfer)
    size, since = 0, time.monotonic()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=min(1.0, stall_s / 4))
            now = partial.stat().st_size if partial.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > stall_s and not task.done():
                raise Stalled(f"no byte came for {stall_s:g} s")
        task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=5)  # it may not write to the partial file of the next attempt


def _check(partial: Path, size: int | None, content: str | None, others: list[object]) -> None:
    """Raises Changed unless the file is as expected; final once the last of `others`, seen so far, are the same."""
    came = partial.stat().st_size
    if size is not None and came != size:
        others.append(came)
        what = f"{came} bytes came where the index says {size}"
    elif content is not None and (found := _content(partial)) != content:
        others.append(found)
        what = "other samples came than the index lists"
    else:
        return
    with partial.open("rb") as file:
        is_page = file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if is_page:
        error = Changed("the server sends a web page in place of the shard; check the address and the login")
    else:
        error = Changed(
            f"{what}, so the shard changed since its index was made; "
            "python launch/shards.py index makes a new one (and if none lies beside the shards, the old one is kept in "
            "data.cache_dir/indexes: delete it)"
        )
    error.is_final = len(others) >= SAME_BODY_TRIES and len(set(others[-SAME_BODY_TRIES:])) == 1
    raise error


def _content(file: Path) -> str:
    """Returns `ShardEntries.digest()` of a shard; about 30 us a sample, which its download hides."""
    from .entries import scan_shard  # and numpy, which only this needs

    try:
        return scan_shard(file).digest()
    except InputError:
        return "no tar"
