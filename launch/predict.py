"""Writes the most probable classes of images: python launch/predict.py IMAGES... --init runs/x-ft --out x.csv

IMAGES are folders (searched at any depth), image files, or shards ('shards/val-*.tar'). With several GPUs: accelerate
launch launch/predict.py ... The same command continues what was killed. Images that cannot be read get a row that says
why.
"""

import sys

from quarterlight.finetune.use_config import PredictConfig
from quarterlight.ssl.command import parse_images, run_command


def main(options: tuple[list[str], PredictConfig]) -> None:
    from quarterlight.finetune.predict import predict  # torch, timm and accelerate: seconds that --help must not cost

    sys.exit(predict(*options))


if __name__ == "__main__":
    run_command(lambda: parse_images(PredictConfig, __doc__), main)
