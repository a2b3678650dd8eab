"""Finds the nearest neighbors of images: python launch/neighbors.py --embeddings x.safetensors --queries photos/ ..."""

from quarterlight.finetune.use_config import NeighborsConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: NeighborsConfig) -> None:
    from quarterlight.finetune.neighbors import neighbors  # torch and timm: seconds that --help must not cost

    neighbors(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(NeighborsConfig, __doc__), main)
