"""Trains a linear or attentive head on a frozen encoder over random crops, MAE's protocol of linear probing:
accelerate launch launch/train_probe.py --config configs/train_probe/vit_base.yaml --init runs/x ..."""

from quarterlight.finetune.probe_config import TrainProbeConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: TrainProbeConfig) -> None:
    from quarterlight.finetune.train_probe import train_probe  # torch and timm: seconds that --help must not cost

    train_probe(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(TrainProbeConfig, __doc__), main)
