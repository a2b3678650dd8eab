"""Accuracy with 1, 2, 5 and 10 labels a class, over five draws: python launch/few_shot.py --init runs/x ...

A linear classifier on frozen features (accelerate launch for several GPUs) and, with --method both, runs of
launch/finetune.py, which --launcher starts."""

from pathlib import Path

from quarterlight.finetune.probe_config import FewShotConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: FewShotConfig) -> None:
    from quarterlight.finetune.few_shot import few_shot  # torch and timm: seconds that --help must not cost

    few_shot(config, Path(__file__).with_name("finetune.py"))


if __name__ == "__main__":
    run_command(lambda: parse_config(FewShotConfig, __doc__), main)
