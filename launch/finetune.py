"""Trains a classifier on an encoder: accelerate launch launch/finetune.py --init runs/x --data.train ..."""

from quarterlight.finetune.config import FinetuneConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: FinetuneConfig) -> None:
    from quarterlight.finetune.classify import finetune  # torch, timm and accelerate: seconds that --help must not cost

    finetune(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(FinetuneConfig, __doc__), main)
