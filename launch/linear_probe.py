"""Linear probe and k-NN on frozen features: accelerate launch launch/linear_probe.py --init runs/x ..."""

from quarterlight.finetune.config import LinearProbeConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: LinearProbeConfig) -> None:
    from quarterlight.finetune.linear_probe import linear_probe  # torch and timm: seconds that --help must not cost

    linear_probe(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(LinearProbeConfig, __doc__), main)
