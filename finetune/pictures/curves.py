"""The records of runs as curves: loss, learning rate, gradients, and the share of time spent waiting for data."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from quarterlight.ssl.errors import InputError

from .figure import COLORS, CannotDraw, Picture, new_picture, plain

PANELS = {
    "loss": "training loss",
    "lr": "learning rate",
    "grad_norm": "norm of the gradients",
    "data_wait_pct": "waiting for data, % of the time",
}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run, in the order of their steps; lines that a kill cut short are left out.

    Raises InputError when the folder holds no metrics.jsonl.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"runs {run_dir}: holds no metrics.jsonl, so it is the folder of no training run")
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        records.append(record)
    return sorted(records, key=lambda record: record["step"])


def names_of(run_dirs: list[Path]) -> dict[str, Path]:
    """Returns short names that tell the folders apart: as many of their last parts as that needs."""
    parts = [path.resolve().parts for path in run_dirs]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(x[-count:]) for x in parts]
        if len(set(names)) == len(set(parts)):
            break
    return dict(zip(names, run_dirs, strict=True)) if parts else {}


def draw_curves(runs: dict[str, list[dict[str, Any]]]) -> Picture:
    """Draws what runs recorded, a line a run in each panel. Raises CannotDraw when none has recorded a loss."""
    if not any(_is_number(record.get("loss")) for records in runs.values() for record in records):
        raise CannotDraw("no loss has been recorded yet")
    titles = [name if len(name) <= 40 else f"...{name[-37:]}" for name in runs]
    picture = new_picture(
        "curves",
        "Training over steps: " + (titles[0] if len(titles) == 1 else f"{len(titles)} runs"),
        "Means over the steps of a log interval. Time spent waiting for data near 0 % means that the loader keeps up. "
        "Gaps are intervals whose value was not finite.",
        height=5.2 + 0.2 * (len(titles) > 1) * -(-len(titles) // 3),
    )
    axes = picture.figure.subplots(2, 2, sharex=True).ravel()
    for place, (key, title) in zip(axes, PANELS.items(), strict=True):
        smallest = math.inf
        for i, (name, records) in enumerate(zip(titles, runs.values(), strict=True)):
            points = [(r["step"], r[key]) for r in records if key in r and "lr" in r]
            if not points:
                continue
            values = np.array([value if _is_number(value) else math.nan for _, value in points], float)
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}
            place.plot([step for step, _ in points], values, label=plain(name), linewidth=1.4, **style)
            smallest = min(smallest, float(np.nanmin(values)) if not np.isnan(values).all() else math.inf)
        place.set_title(title, fontsize=9.5, loc="left")
        place.grid(color="#dddddd", linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
        if key in ("loss", "grad_norm") and 0 < smallest < math.inf:
            place.set_yscale("log")
            place.yaxis.set_minor_formatter("{x:g}")
            place.yaxis.set_major_formatter("{x:g}")
            place.tick_params(which="minor", labelsize=7)
        else:
            place.set_ylim(bottom=0)
            place.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    for place in axes[2:]:
        place.set_xlabel("step", fontsize=9)
    if len(titles) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        picture.figure.legend(handles, labels, loc="outside upper left", fontsize=8.5, ncols=3, frameon=False)
    return picture


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
