"""Curves of several runs that one can hover and zoom, by plotly."""

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from quarterlight.ssl.log import finite

from .run_folder import Run

MOST_POINTS = 1500  # of one curve; a longer one keeps the smallest and the largest value of every stretch
MARKED = 40  # curves of up to so many points show each of them
# Okabe and Ito's colors, which the color-blind can tell apart, made as light as both a white and a black page need.
COLORS = ("#1f84c9", "#e08a00", "#00a17a", "#d9541e", "#c26aa0", "#4fb0e0", "#a59a00", "#8c8c8c")
DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")


class Panel(NamedTuple):
    """A plot, and which figures of metrics.jsonl it shows."""

    title: str
    pattern: str  # of the figures' names, in whole
    log: bool = False  # the axis at first; a button changes it
    unit: str = ""


PANELS = (
    Panel("Loss", r"(val_(\w+_)?)?loss"),
    Panel("Accuracy", r"\w*(top1|top5|acc(uracy)?)(_\w+)?", unit=" %"),
    Panel("Learning rate", r"lr"),
    Panel("Gradient norm", r"grad_norm(_max)?", log=True),
    Panel("Speed: images a second", r"images_per_s"),
    Panel("Waiting for data, share of the time", r"data_wait_pct", unit=" %"),
    Panel("Memory", r"memory_gb", unit=" GB"),
    Panel("Unreadable samples and skipped steps, so far", r"bad_samples|skipped_steps"),
)
NO_CURVE = ("step", "epoch", "val_images")


class Curve(NamedTuple):
    """One figure of one run."""

    run: Run
    name: str
    steps: list[float]
    values: list[float | None]


def curve_plots(runs: Sequence[Run]) -> list[tuple[str, go.Figure]]:
    """Returns titled plots of what metrics.jsonl of these runs holds, every run in a color of its own.

    Figures that no panel is made for come after them, each in a plot of its own.
    """
    names = dict.fromkeys(name for run in runs for record in run.records for name in record if name not in NO_CURVE)
    known = {name: panel for name in names for panel in reversed(PANELS) if re.fullmatch(panel.pattern, name)}
    panels = [*PANELS, *(Panel(name, re.escape(name)) for name in names if name not in known)]
    plots = []
    for panel in panels:
        shown = [name for name in names if re.fullmatch(panel.pattern, name)]
        curves = [curve for run in runs for name in shown if (curve := _curve(run, name))]
        if "bad_samples" in shown or "skipped_steps" in shown:
            curves = [curve for curve in curves if any(curve.values)]
        if curves:
            plots.append((panel.title, _plot(panel, curves, runs)))
    return plots


def probe_plot(runs: Sequence[Run]) -> go.Figure | None:
    """Returns accuracies of linear probes over their learning rates; None where no run has any."""
    figure = go.Figure()
    for color, run in zip(itertools.cycle(COLORS), runs, strict=False):
        probes = run.result.get("all_probes")
        probes = [x for x in probes if isinstance(x, dict)] if isinstance(probes, list) else []
        kinds = dict.fromkeys(map(_kind_of_probe, probes))
        for dash, kind in zip(itertools.cycle(DASHES), kinds, strict=False):
            if len(runs) == 1:
                color = COLORS[list(kinds).index(kind) % len(COLORS)]
            mine = [x for x in probes if _kind_of_probe(x) == kind]
            rows = [(finite(x.get("base_lr")), finite(x.get("val_top1"))) for x in mine]
            rows = sorted((rate, top1) for rate, top1 in rows if rate is not None and top1 is not None)
            name = f"{run.name} · {kind}"
            figure.add_trace(_line(name, [x for x, _ in rows], [y for _, y in rows], color, dash, " %"))
    if not figure.data:
        return None
    _dress(figure, "base_lr", "log", [_buttons("yaxis.type", {"linear": "linear", "log": "log"}, 0)])
    return figure


def _kind_of_probe(probe: dict[str, Any]) -> str:
    """Returns what a linear probe looks at: the features, and whether batch norm stands before them."""
    return f"{probe.get('input')}{' with batch norm' * (probe.get('batch_norm') is True)}"


def _curve(run: Run, name: str) -> Curve | None:
    points = [(record["step"], record[name]) for record in run.records if name in record]
    if all(value is None for _, value in points):
        return None
    kept = _thinned([value for _, value in points])
    return Curve(run, name, [points[i][0] or 0 for i in kept], [points[i][1] for i in kept])


def _thinned(values: list[float | None]) -> list[int]:
    """Returns the places of at most about MOST_POINTS values, among them the extremes of every stretch and the gaps."""
    if len(values) <= MOST_POINTS:
        return list(range(len(values)))
    stretch = -(-2 * len(values) // MOST_POINTS)
    kept = {0, len(values) - 1}
    for first in range(0, len(values), stretch):
        places = range(first, min(first + stretch, len(values)))
        there = [i for i in places if values[i] is not None]
        gaps = [i for i in places if values[i] is None][:1]
        kept |= {min(there, key=values.__getitem__), max(there, key=values.__getitem__), *gaps} if there else {*gaps}  # type: ignore[arg-type]
    return sorted(kept)


def _plot(panel: Panel, curves: list[Curve], runs: Sequence[Run]) -> go.Figure:
    figure = go.Figure()
    names = list(dict.fromkeys(curve.name for curve in curves))
    several = len({id(curve.run) for curve in curves}) > 1
    for curve in curves:
        place = next(i for i, run in enumerate(runs) if run is curve.run)
        color = COLORS[(place if several or len(names) == 1 else names.index(curve.name)) % len(COLORS)]
        dash = DASHES[(names.index(curve.name) if several else 0) % len(DASHES)]
        label = curve.run.name if len(names) == 1 else f"{curve.run.name} · {curve.name}" if several else curve.name
        figure.add_trace(_line(label, curve.steps, curve.values, color, dash, panel.unit))
    epochs = [_epochs(curve) for curve in curves]
    menus = [_buttons("yaxis.type", {"linear": "linear", "log": "log"}, 0, active=int(panel.log))]
    if all(epochs):
        places = {"step": [curve.steps for curve in curves], "epoch": epochs}
        menus.append(_menu([_x_button(label, x) for label, x in places.items()], 1))
    _dress(figure, "step", "linear", menus)
    figure.update_yaxes(type="log" if panel.log else "linear")
    return figure


def _epochs(curve: Curve) -> list[float]:
    """Returns where the points of a curve lie in passes over the data; [] where nothing says it."""
    steps = curve.run.steps_an_epoch
    return [round(step / steps, 4) for step in curve.steps] if steps else []


def _line(name: str, x: list[float], y: list[float | None], color: str, dash: str, unit: str) -> go.Scatter:
    mode = "lines+markers" if len(x) <= MARKED else "lines"
    safe = html.escape(name)  # plotly reads tags in a name
    line = {"color": color, "dash": dash, "width": 2}
    hover = "%{y:.5~g}" + unit
    extra = f"<extra>{safe}</extra>"
    return go.Scatter(x=x, y=y, name=safe, mode=mode, line=line, marker={"size": 5}, hovertemplate=hover + extra)


def _x_button(label: str, x: list[list[float]]) -> dict[str, Any]:
    """Returns a button that puts the points of all curves at `x`."""
    return {
        "label": label,
        "method": "update",
        "args": [{"x": x}, {"xaxis.title.text": label, "xaxis.autorange": True}],
    }


def _buttons(attribute: str, choices: dict[str, str], place: int, active: int = 0) -> dict[str, Any]:
    buttons = [{"label": k, "method": "relayout", "args": [{attribute: v}]} for k, v in choices.items()]
    return _menu(buttons, place, active)


def _menu(buttons: list[dict[str, Any]], place: int, active: int = 0) -> dict[str, Any]:
    """Returns the first (place 0) or second pair of buttons above a plot; plotly's own are at the right."""
    look = {"type": "buttons", "direction": "right", "showactive": True, "active": active, "font": {"size": 11}}
    where = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"t": 0, "b": 6, "l": 112 * place, "r": 0}}
    return look | where | {"buttons": buttons}


def _dress(figure: go.Figure, x_title: str, x_type: str, menus: list[dict[str, Any]]) -> None:
    """Gives a plot its size and axes; text, grid and background have the colors of the page, from its style sheet."""
    figure.update_layout(
        template="none",
        height=340,
        margin={"l": 56, "r": 12, "t": 44, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        hoverdistance=-1,  # however far the next point is
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        showlegend=len(list(figure.data)) > 1,
        updatemenus=menus,
    )
    axis = {"zeroline": False, "automargin": True, "tickformat": ".4~g"}
    figure.update_xaxes(title={"text": x_title, "standoff": 6}, type=x_type, **axis)
    figure.update_yaxes(**axis)
