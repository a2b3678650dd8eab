"""The records of runs as curves: loss, learning rate, gradients, and the share of time spent waiting for data."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.log import metrics_of, read_jsonl

from .figure import COLORS, CannotDraw, Picture, new_picture, plain

PANELS = {
    "loss": "training loss",
    "lr": "learning rate",
    "grad_norm": "norm of the gradients",
    "data_wait_pct": "waiting for data, % of the time",
}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """Returns the numbers that a run recorded, in the order of their steps; None where one is not finite.

    Raises InputError when the folder holds no metrics.jsonl that can be read.
    """
    try:
        return metrics_of(read_jsonl(run_dir / "metrics.jsonl")[0])
    except OSError as error:
        raise InputError(
            f"runs {run_dir}: holds no metrics.jsonl that can be read ({error.strerror}), so it is the folder of no "
            "training run"
        ) from error


def names_of(run_dirs: list[Path]) -> dict[str, Path]:
    """Returns short names that tell the folders apart: as many of their last parts as that needs."""
    parts = [path.resolve().parts for path in run_dirs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(x[-count:]) for x in parts]
        if len(set(names)) == len(set(parts)):
            break
    return dict(zip(names, run_dirs, strict=True)) if parts else {}


def draw_curves(runs: dict[str, list[dict[str, float | None]]]) -> Picture:
    """Draws what runs recorded, a line a run in each panel. Raises CannotDraw when none has recorded a loss."""
    if not any(record.get("loss") is not None for records in runs.values() for record in records):
        raise CannotDraw("no loss has been recorded yet")
    titles = [name if len(name) <= 40 else f"...{name[-37:]}" for name in runs]
    picture = new_picture(
        "curves",
        "Training over steps: " + (titles[0] if len(titles) == 1 else f"{len(titles)} runs"),
        "Means over the steps of a log interval. Time spent waiting for data near 0 % means that the loader keeps up. "
        "Gaps are intervals whose value was not finite.",
        height=5.2,
    )
    axes = picture.figure.subplots(2, 2, sharex=True).ravel()
    for place, (key, title) in zip(axes, PANELS.items(), strict=True):
        drawn: list[float] = []
        for i, (name, records) in enumerate(zip(titles, runs.values(), strict=True)):
            points = [(r["step"], r[key]) for r in records if key in r and "lr" in r]
            if not points:
                continue
            values = np.array([math.nan if value is None else value for _, value in points])
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}
            place.plot([step for step, _ in points], values, label=plain(name), linewidth=1.4, **style)
            drawn += values[~np.isnan(values)].tolist()
        place.set_title(title, fontsize=9.5, loc="left")
        place.grid(color="#dddddd", linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
        _scale(place, drawn, logarithmic=key in ("loss", "grad_norm"))
    for place in axes[2:]:
        place.set_xlabel("step", fontsize=9)
    if len(titles) > 1:
        axes[0].legend(loc="upper right", fontsize=8, framealpha=0.7, edgecolor="none")  # a loss falls: room up there
    return picture


def _scale(axes: Any, values: list[float], *, logarithmic: bool) -> None:
    """Makes the y axis logarithmic where values span more than a factor of 2, with 1, 2, 5 or all digits as ticks."""
    span = max(values) / min(values) if values and min(values) > 0 else 0.0
    if logarithmic and span > 2:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span > 8 else range(1, 10)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    if not logarithmic:
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
