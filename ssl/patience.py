"""Servers that fail: trying again, and one sentence that says why it was in vain."""

import errno
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .addresses import shown
from .errors import InputError

T = TypeVar("T")

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
MAYBE_LATER = (408, 425, 429)  # and everything from 500 on
REFUSED = (401, 403, 407)
ABSENT = (404, 410)


@dataclass(frozen=True)
class Patience:
    """How long to go on with a server that fails."""

    attempts: int = 8
    first_wait_s: float = 0.5  # twice as long after each failure
    longest_wait_s: float = 30.0
    stall_s: float = 30.0  # a connection that gives no byte for so long is given up

    def wait_s(self, failures: int) -> float:
        """Returns how long to wait after so many failures; partly by chance, lest all nodes come back at once."""
        return min(self.longest_wait_s, self.first_wait_s * 2 ** (failures - 1)) * random.SystemRandom().uniform(0.5, 1)


PATIENCE = Patience()
PATIENT_TRIES = 3  # before a word about them


class Absent(InputError):
    """There is nothing behind the URL."""


class Refused(InputError):
    """Access is refused, which some stores say of what is not there, too."""


class Stalled(OSError):
    """No byte came for a while."""


class Changed(OSError):
    """What came is complete, but not what the index says."""

    is_final = False


def unwritable(folder: Path, error: OSError) -> InputError:
    """Returns what to raise when the cache cannot be written."""
    return InputError(
        f"{folder} cannot be written ({error.strerror or error}): give a folder with room for fetched shards as "
        "data.cache_dir, or fewer GB as data.cache_gb"
    )


def persist(url: str, done: str, patience: Patience, attempt: Callable[[], T], folder: Path | None = None) -> T:
    """Returns what `attempt` returns, trying again after errors that may pass; `done` is the verb for the message.

    Raises InputError, one sentence: Absent when there is no such file, `unwritable` when the disk of `folder` is full.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except InputError:
            raise
        except Exception as error:  # every library has errors of its own, and not all of them are OSError
            failures += 1
            if folder and isinstance(error, OSError) and error.errno in FULL_DISK:
                raise unwritable(folder, error) from error
            reason, is_final = _explain(error)
            if is_final or failures >= patience.attempts:
                tries = f", {failures} times" if failures > 1 else ""
                raise _kind(error)(f"{shown(url)} cannot be {done}{tries}: {reason}") from error
            if failures == PATIENT_TRIES:
                print(f"{shown(url)}: {reason}; trying again", file=sys.stderr, flush=True)
        time.sleep(patience.wait_s(failures))


def _kind(error: Exception) -> type[InputError]:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in ABSENT:
        return Absent
    return Refused if isinstance(error, PermissionError) or status in REFUSED else InputError


def _explain(error: Exception) -> tuple[str, bool]:
    """Returns the reason with the way out, and whether to try again would be in vain."""
    status, text = _status(error), " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Changed):
        return text, error.is_final
    if isinstance(error, ImportError):
        return f"a package is missing ({text}); pip install 'quarterlight[remote]'", True
    if isinstance(error, FileNotFoundError) or status in ABSENT:
        return "there is no such file; check the address", True
    if type(error).__name__ == "NoCredentialsError":  # of botocore
        return "no credentials for it are on this machine; for a public bucket set FSSPEC_S3_ANON=true", True
    if status in REFUSED or isinstance(error, PermissionError) or text.startswith("Forbidden: "):  # so says gcsfs
        return f"access is refused ({status or text}); check the address and this machine's credentials", True
    if status is not None:
        is_final = status not in MAYBE_LATER and status < 500
        return f"the server answers {status}; {'check the address' if is_final else 'try again later'}", is_final
    if isinstance(error, ValueError | TypeError | NotImplementedError):
        return f"{text}; check the address", True
    if isinstance(error, Stalled):
        return f"{text}; check the network", False
    if isinstance(error, TimeoutError):
        return "no answer in time; check the network", False
    return f"{text}; check the address and the network", False


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status in an error of aiohttp, gcsfs or huggingface_hub, or of botocore behind s3fs's own."""
    response = getattr(error, "response", None)
    found = [getattr(error, "status", None), getattr(response, "status_code", None)]
    if found[0] is None:
        found.append(getattr(error, "code", None))  # aiohttp warns of this name
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        cause = cause.__cause__
    return next((x for x in found if isinstance(x, int) and x >= 400), None)
