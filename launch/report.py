"""Writes one HTML page about runs, to be opened from disk: python launch/report.py runs/x runs/y --out report.html"""

from typing import Any

from quarterlight.finetune.report.config import ReportConfig
from quarterlight.ssl.command import instantiate, parse, parser_for, run_command

RUNS = ("runs...", "run folders: of pretraining, fine-tuning, probes, and of whatever else leaves a result.json")


def parse_options() -> tuple[list[str], ReportConfig]:
    parser = parser_for(ReportConfig, __doc__ or "", [RUNS])
    parsed = parse(parser)
    runs: Any = parsed.pop("runs")
    return runs, instantiate(parser, ReportConfig, parsed)


def main(options: tuple[list[str], ReportConfig]) -> None:
    from quarterlight.finetune.report.page import write_report  # seconds of imports that --help must not cost

    print(f"done: {write_report(*options)}", flush=True)


if __name__ == "__main__":
    run_command(parse_options, main)
