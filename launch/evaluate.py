"""Accuracy with patches dropped or shuffled: accelerate launch launch/evaluate.py --init runs/x-ft --data.val ..."""

from quarterlight.finetune.use_config import RobustnessConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: RobustnessConfig) -> None:
    from quarterlight.finetune.robustness import robustness  # torch and timm: seconds that --help must not cost

    robustness(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(RobustnessConfig, __doc__), main)
