"""From a command line to a checked config, and from a user's mistake to one sentence.

A command is `run_command(parse, run)`: `parse` is quick and imports nothing heavy, `run` does the work.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .errors import InputError, did_you_mean

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def is_local_main() -> bool:
    """Returns True in the one process of this machine that speaks (torchrun and accelerate set LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


class CommandParser(ArgumentParser):
    """jsonargparse's parser, which also names the nearest known option and lets only local rank 0 speak."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints `message` in one line and exits with status 2."""
        del ex
        fail(self._reworded(message))

    def _reworded(self, message: str) -> str:
        message = re.sub(r"\s*\n\s*", " ", message).strip()
        known = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        found = (
            re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
            or re.search(r"Option '(?P<key>[\w.]+)' is not accepted", message)
            or re.search(r"unrecognized arguments: -*(?P<key>[\w.]+)", message)
        )
        if found:
            parts = found.groupdict()
            name = f"{parts['group']}.{parts['key']}" if "group" in parts else parts["key"]
            message = f"unknown option {name}{did_you_mean(name, known)}"
        return message


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints `error: message` once per machine and ends this process with `status`."""
    if is_local_main():
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def parser_for(config_class: type, description: str, positionals: Sequence[tuple[str, str]] = ()) -> CommandParser:
    """Returns a parser with one option for each field of `config_class`, `--config FILE` and `--print_config`."""
    names = " ".join(name.upper() for name, _ in positionals)
    usage = f"%(prog)s {names} [--config FILE ...] [--KEY VALUE ...]".replace("  ", " ")
    parser = CommandParser(description=description, usage=usage)
    for name, text in positionals:
        parser.add_argument(name, metavar=name.upper(), help=text)
    parser.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    parser.add_class_arguments(config_class, nested_key=None, as_group=False)
    return parser


def parse_config(config_class: type[Config], description: str, args: Sequence[str] | None = None) -> Config:
    """Returns the config that `args` (default: the command line) and its `--config` files give."""
    parser = parser_for(config_class, description)
    return instantiate(parser, config_class, parser.parse_args(args))


def instantiate(parser: CommandParser, config_class: type[Config], parsed: Namespace) -> Config:
    """Returns `config_class` built from parsed arguments."""
    parsed.pop("config", None)
    try:
        return config_class(**vars(parser.instantiate(parsed)))
    except TypeError as error:  # jsonargparse lets a scalar pass where a group is expected (`optim: 3`)
        groups = [name for name, value in vars(parsed).items() if not isinstance(value, Namespace)]
        fail(f"a group of options was given a single value (one of {', '.join(groups)}): {error}")


def run_command(parse: Callable[[], Any], run: Callable[[Any], object]) -> None:
    """Runs a command; a mistake of the user's or a refusal of the system's ends it with one sentence and status 1."""
    config = parse()
    try:
        run(config)
    except (InputError, OSError) as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail("interrupted", status=130)
