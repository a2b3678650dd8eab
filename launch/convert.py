"""Makes a file of this project out of released weights: python launch/convert.py IN OUT.safetensors

IN is whatever --init takes: a file of MAE, SimMIM, Swin, GreenMIM, DINO or timm, a folder of transformers, a timm name,
hf-hub:, local-dir: or a run. What it is is told from the names and shapes of its tensors. OUT holds the encoder (or
the classifier) under timm's names, with the architecture and normalization as metadata.
"""

from typing import Any

from quarterlight.ssl.command import instantiate, parse, parser_for, run_command
from quarterlight.ssl.convert_config import ConvertConfig

WORDS = [("init", "weights to convert"), ("out", "file to write, which ends in .safetensors")]


def parse_options() -> tuple[str, str, Any]:
    parser = parser_for(ConvertConfig, __doc__ or "", WORDS)
    parsed = parse(parser)
    init, out = (parsed.pop(name) for name, _ in WORDS)
    return init, out, instantiate(parser, ConvertConfig, parsed)


def main(options: tuple[str, str, Any]) -> None:
    from quarterlight.ssl.convert import convert  # torch and timm: seconds that --help must not cost

    convert(*options)


if __name__ == "__main__":
    run_command(parse_options, main)
