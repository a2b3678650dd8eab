"""Mistakes that a user can mend: raised anywhere, printed as one sentence by `command.run_command`."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. The message names the thing, the value and the way out."""


class ProcessError(InputError):
    """An InputError that perhaps this process alone has met, in the middle of a run: it speaks for itself."""


class Stopped(InputError):
    """The run was asked to stop, and its state is saved. It ends with status `EXIT_STATUS`."""

    EXIT_STATUS = (
        75  # EX_TEMPFAIL of sysexits.h, "try again": neither a success, that a script goes on from, nor an error
    )


def printable(text: str) -> str:
    """Returns the text with escapes for what steers a terminal or cannot be encoded: names in tars are anyone's."""
    return "".join(x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode() for x in text)


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """Returns " Did you mean X?" with at most `most` near known names, or "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f". Did you mean {' or '.join(near)}?" if near else ""
