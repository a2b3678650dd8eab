"""From a command line to a checked config, and from a user's mistake to one sentence.

A command is `run_command(parse_options, run)`: the first is quick and imports nothing heavy, the second does the work.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from .config import check_ranges
from .errors import InputError, ProcessError, Stopped, did_you_mean, printable
from .parent import follow_launcher

Config = TypeVar("Config")

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}

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
            or re.search(r"unrecognized arguments: --?(?P<key>[\w.]+)", message)
        )
        if stray := re.search(r"unrecognized arguments: (?P<word>[^-\s]\S*)", message):
            return f"{stray['word']} belongs to no option: a pattern such as 'train-*.tar' needs quotes"
        if missing := re.search(r'Parser key "config": .*?File does not exist: \'(?P<path>[^\']*)\'', message):
            return f"--config {missing['path']}: there is no such file"
        if wrong := re.search(r'Parser key "(?P<key>[\w.]+)": .*?(?:Got|Given) value: (?P<value>\S+)', message):
            kinds = dict.fromkeys(re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal(\[.*?\]))", message))
            wanted = [
                f"one of {choices[1:-1]}" if choices else KINDS.get(str(kind), str(kind)) for kind, choices in kinds
            ]
            return (
                f"{wrong['key']} is {wrong['value'].rstrip(',')}: it must be {' or '.join(wanted) or 'of another type'}"
            )
        if found:
            parts = found.groupdict()
            name = f"{parts['group']}.{parts['key']}" if "group" in parts else parts["key"]
            message = f"unknown option {name}{did_you_mean(name, known)}"
        return message


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints `error: message` once per machine and ends this process with `status`."""
    if is_local_main():
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def parser_for(
    config_class: type, description: str, positionals: Sequence[tuple[str, str]] = (), *, command: str = ""
) -> CommandParser:
    """Returns a parser with one option for each field of `config_class`, `--config FILE` and `--print_config`.

    A positional whose name ends in "..." takes one word or more. `command` is the sub-command that is parsed for.
    """
    names = "".join(f" {name.upper()}" for name, _ in positionals)
    usage = f"%(prog)s{f' {command}' * bool(command)}{names} [--config FILE ...] [--KEY VALUE ...]"
    parser = CommandParser(
        description=inspect.cleandoc(description), usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    for name, text in positionals:
        plain, number = name.rstrip("."), "+" if name.endswith("...") else None
        parser.add_argument(plain, metavar=plain.upper(), help=text, nargs=number)
    parser.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    parser.add_class_arguments(config_class, nested_key=None, as_group=False)
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --eval_only is --eval_only true
            action.nargs, action.const = "?", True
    return parser


class _HelpFormatter(DefaultHelpFormatter):
    """Fills each paragraph of a description to the terminal's width, and keeps indented lines, which are lists."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = re.split(r"\n\s*\n|\n(?=  )", text.strip())
        filled = [p if p.startswith("  ") else super(_HelpFormatter, self)._fill_text(p, width, indent) for p in parts]
        gaps = ["\n" if part.startswith("  ") else "\n\n" for part in parts[1:]]
        return "".join(x for pair in zip(["", *gaps], filled, strict=True) for x in pair)


def parse(parser: CommandParser, args: Sequence[str] | None = None) -> Namespace:
    """Returns the options that `args` (default: the command line) and its `--config` files give."""
    words = list(sys.argv[1:] if args is None else args)
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word == "--config" or word.startswith("--config="):
            _check_config_file(parser, word.partition("=")[2] or following)
    silence = contextlib.nullcontext() if is_local_main() else contextlib.redirect_stdout(io.StringIO())
    with silence:  # --help and --print_config speak once, too
        return parser.parse_args(words)


def _check_config_file(parser: CommandParser, name: str) -> None:
    """Ends the command when a config file is no YAML mapping; the parser's own errors do not name the file.

    And when it names a class or a file where options belong: the parser would import the one and read the other.
    """
    path = Path(name)
    if not path.is_file():
        return  # the parser says so
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"{path} is not a YAML file: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        fail(f"{path} holds no options: write them as KEY: VALUE")
    for key, value in content.items():
        if isinstance(value, str) and _is_group(parser, str(key)):
            fail(f"{path}: {key} is a group of options, not a value ({value}): give {key}.OPTION")
        if str(key).endswith(".class_path") or (isinstance(value, dict) and "class_path" in value):
            fail(f"{path}: {key} names a class: options are values only")
        if key == "config":
            fail(f"{path} names another config file ({value}): give it on the command line, --config may be repeated")


def _is_group(parser: CommandParser, name: str) -> bool:
    return any(action.dest.startswith(f"{name}.") for action in parser._actions)


def parse_config(config_class: type[Config], description: str | None, args: Sequence[str] | None = None) -> Config:
    """Returns the config that `args` (default: the command line) and its `--config` files give."""
    parser = parser_for(config_class, description or "")
    return instantiate(parser, config_class, parse(parser, args))


def parse_images(config_class: type[Config], description: str | None) -> tuple[list[str], Config]:
    """Returns the images that the command line names before its options, and the config that these give."""
    parser = parser_for(config_class, description or "", [("images...", "folders, image files, or shards")])
    parsed = parse(parser)
    return parsed.pop("images"), instantiate(parser, config_class, parsed)


def instantiate(parser: CommandParser, config_class: type[Config], parsed: Namespace) -> Config:
    """Returns `config_class` built from parsed arguments."""
    parsed.pop("config", None)
    for name in vars(parsed):  # jsonargparse lets a scalar pass where a group is expected (`optim: 3`)
        if _is_group(parser, name) and not isinstance(parsed[name], Namespace):
            fail(f"{name} is a group of options, not a value ({parsed[name]}): give {name}.OPTION")
    config = config_class(**vars(parser.instantiate(parsed)))
    try:
        check_ranges(config)
    except InputError as error:
        fail(str(error))
    return config


def run_command(parse_options: Callable[[], Any], run: Callable[[Any], object]) -> None:
    """Runs a command; a mistake of the user's or a refusal of the system's ends it with one sentence and status 1."""
    follow_launcher()
    config = parse_options()
    try:
        run(config)
    except (OSError, ProcessError) as error:  # a full disk or a lost shard may be one machine's alone: all speak
        rank = os.environ.get("RANK")
        print(f"error: {f'process {rank}: ' if rank else ''}{printable(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except Stopped:  # it has been said
        raise SystemExit(Stopped.EXIT_STATUS) from None
    except InputError as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        fail("interrupted: the same command continues from the newest saved state, if there is one", status=130)
