"""Serves a page to hide parts of images on, and to see what a network fills in: launch/playground.py --init runs/x

It runs on this machine's CPU, and loads nothing from another one.
"""

from quarterlight.finetune.playground.config import PlaygroundConfig
from quarterlight.ssl.command import parse_config, run_command


def main(config: PlaygroundConfig) -> None:
    from quarterlight.finetune.playground.app import serve  # torch, timm and gradio: seconds that --help must not cost

    serve(config)


if __name__ == "__main__":
    run_command(lambda: parse_config(PlaygroundConfig, __doc__), main)
