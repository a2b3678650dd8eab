"""Draws what an encoder has learned: python launch/visualize.py --init runs/x --images FOLDER_OR_SHARDS --out DIR

Reconstructions, filters, positions, attention, features and curves as PNG, with captions in result.json, and in
TensorBoard. docs/pictures.md shows each and says how to read it.
"""

from quarterlight.finetune.pictures.config import VisualizeConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: VisualizeConfig) -> None:
    from quarterlight.finetune.pictures.visualize import visualize  # torch, timm, matplotlib: not for --help

    visualize(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(VisualizeConfig, __doc__), main)
