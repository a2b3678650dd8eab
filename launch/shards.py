"""Turns a folder of images into webdataset shards: python launch/shards.py images/ shards/

SOURCE is a folder (class folders or flat, any depth), or `digits` (scikit-learn's 1,797 handwritten digits), or
`cifar10` (downloaded by torchvision). Write ./digits for a folder of that name.

What else can be done with shards, each with a --help of its own (`launch/shards.py verify --help`):
  verify SHARDS...            reads and decodes everything, and lists what is damaged
  repair SHARDS...            rewrites damaged shards in place, without what cannot be read
  reshard SHARDS... OUT_DIR   makes new shards out of shards: shuffled anew, smaller images
  index SHARDS...             writes index.npz, where every sample lies, before the first run does
"""

import sys
from pathlib import Path
from typing import Any

from quarterlight.ssl.command import fail, instantiate, parse, parser_for, run_command
from quarterlight.ssl.errors import did_you_mean
from quarterlight.ssl.shard_config import SHARD_COMMANDS, ShardsConfig

OUT_DIR = ("out_dir", "folder for the shards")
SOURCE = ("source", "folder of images, or digits, or cifar10")
SHARDS = ("shards...", "tars, globs, braces ('train-{000..146}.tar'), 'a.tar::b.tar', or addresses")


def parse_options() -> tuple[str, list[Any], Any]:
    first = next(iter(sys.argv[1:]), "-")
    command = first if first in SHARD_COMMANDS else ""
    if (near := did_you_mean(first, SHARD_COMMANDS)) and not command and not Path(first).exists():
        fail(f"{first} is no folder and no sub-command{near}")
    config_class = SHARD_COMMANDS.get(command, ShardsConfig)
    names = [SHARDS if command else SOURCE, *([OUT_DIR] if command in ("", "reshard") else [])]
    parser = parser_for(config_class, config_class.__doc__ if command else __doc__, names, command=command)  # type: ignore[arg-type]
    parsed = parse(parser, sys.argv[2:] if command else None)
    words = [parsed.pop(name.rstrip(".")) for name, _ in names]
    if not command and words[0] in SHARD_COMMANDS:
        fail(f"the sub-command {words[0]} comes first, before its options (write ./{words[0]} for a folder)")
    return command, words, instantiate(parser, config_class, parsed)


def main(options: tuple[str, list[Any], Any]) -> None:
    command, words, config = options
    run: Any
    if command == "verify":
        from quarterlight.ssl.verify import verify_shards as run
    elif command == "repair":
        from quarterlight.ssl.repair import repair_shards as run
    elif command == "reshard":
        from quarterlight.ssl.shards import reshard as run
    elif command == "index":
        from quarterlight.ssl.make_index import write_index as run
    else:
        from quarterlight.ssl.shards import write_shards as run
    sys.exit(1 if run(*words, config) is False else 0)  # verify and repair return whether all is whole


if __name__ == "__main__":
    run_command(parse_options, main)
