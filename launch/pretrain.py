"""Pretrains an encoder by masked autoencoding: accelerate launch launch/pretrain.py --config FILE ..."""

from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig


def main(config: PretrainConfig) -> None:
    from quarterlight.ssl.pretrain import pretrain  # torch, timm and accelerate: seconds that --help must not cost

    pretrain(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(PretrainConfig, __doc__), main)
