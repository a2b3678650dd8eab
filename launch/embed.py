"""Writes the features of images: python launch/embed.py IMAGES... --init runs/x --out x.safetensors

IMAGES are folders (searched at any depth), image files, or shards ('shards/val-*.tar'). With several GPUs: accelerate
launch launch/embed.py ... The same command continues what was killed. Images that cannot be read get a row of NaN.
"""

import sys

from quarterlight.finetune.use_config import EmbedConfig
from quarterlight.ssl.command import parse_images, run_command


def main(options: tuple[list[str], EmbedConfig]) -> None:
    from quarterlight.finetune.embed import embed  # torch, timm and accelerate: seconds that --help must not cost

    sys.exit(embed(*options))


if __name__ == "__main__":
    run_command(lambda: parse_images(EmbedConfig, __doc__), main)
