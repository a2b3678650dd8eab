"""Writes weights for other libraries: python launch/export.py runs/base out/ --to transformers

RUN_OR_WEIGHTS is a run folder or anything else that --init takes. OUT must not exist yet: a folder (--to timm,
transformers), or a file that ends in .safetensors (timm), .pth (mae), .onnx or .pt2 (torch).
"""

from typing import Any

from quarterlight.ssl.command import instantiate, parse, parser_for, run_command
from quarterlight.ssl.export_config import ExportConfig

SOURCE = ("run_or_weights", "run folder, file, timm name, hf-hub: or local-dir:")
OUT = ("out", "folder or file to be made")


def parse_options() -> tuple[str, str, Any]:
    parser = parser_for(ExportConfig, __doc__ or "", (SOURCE, OUT))
    parsed = parse(parser)
    source, out = parsed.pop("run_or_weights"), parsed.pop("out")
    return source, out, instantiate(parser, ExportConfig, parsed)


def main(options: tuple[str, str, Any]) -> None:
    from quarterlight.finetune.publish import publish  # torch and timm: seconds that --help must not cost

    publish(*options)


if __name__ == "__main__":
    run_command(parse_options, main)
