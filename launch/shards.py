"""Turns a folder of images into webdataset shards: python launch/shards.py images/ shards/

SOURCE is a folder (class folders or flat, any depth), or `digits` (scikit-learn's 1,797 handwritten digits), or
`cifar10` (downloaded by torchvision). Write ./digits for a folder of that name.
"""

from quarterlight.ssl.command import instantiate, parse, parser_for, run_command
from quarterlight.ssl.config import ShardsConfig


def parse_options() -> tuple[str, str, ShardsConfig]:
    positionals = (("source", "folder of images, or digits, or cifar10"), ("out_dir", "folder for the shards"))
    parser = parser_for(ShardsConfig, __doc__ or "", positionals)
    parsed = parse(parser)
    source, out_dir = parsed.pop("source"), parsed.pop("out_dir")
    return source, out_dir, instantiate(parser, ShardsConfig, parsed)


def main(arguments: tuple[str, str, ShardsConfig]) -> None:
    from quarterlight.ssl.shards import write_shards

    write_shards(*arguments)


if __name__ == "__main__":
    run_command(parse_options, main)
