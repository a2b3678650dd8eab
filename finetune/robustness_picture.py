"""The picture of launch/evaluate.py: accuracy against patches dropped and tiles shuffled."""

from pathlib import Path
from typing import Any

from quarterlight.ssl.files import replace_file

# Colors that color-blind people tell apart (Okabe & Ito 2008), and a marker each for prints in grey.
LOOKS = {
    "random": ("#0072B2", "o", "any, at random"),
    "salient": ("#D55E00", "s", "most attended first"),
    "non_salient": ("#009E73", "^", "least attended first"),
}
STYLES = {"pixels": ("-", "painted over"), "left_out": ("--", "left out of the encoder")}


def draw_robustness(path: Path, rows: list[dict[str, Any]], title: str, patch: int) -> None:
    """Writes the picture of the rows of robustness.csv, the first of which is of whole images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that other commands must not cost
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    shuffles = [row for row in rows if row["kind"] == "shuffle"]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1)) if shuffles else [figure.subplots()]
    _draw_drops(panels[0], rows, patch)
    if shuffles:
        _draw_shuffles(panels[1], rows[0], shuffles)
    for panel in panels:
        panel.set_ylim(0, 100)
        panel.grid(color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=12)
    panels[0].set_ylabel("top-1 accuracy (%)", fontsize=13)
    figure.suptitle(f"Accuracy with patches dropped and tiles shuffled: {title}", fontsize=14)
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def _draw_drops(panel: Any, rows: list[dict[str, Any]], patch: int) -> None:
    drawn = dict.fromkeys((row["kind"], row["how"]) for row in rows if row["how"])
    several = len({how for _, how in drawn}) > 1
    for kind, how in drawn:
        color, marker, label = LOOKS[kind]
        style, said = STYLES[how]
        points = [rows[0], *(row for row in rows if (row["kind"], row["how"]) == (kind, how))]
        panel.plot(
            [100 * row["dropped_share"] for row in points],
            [row["top1"] for row in points],
            color=color,
            marker=marker,
            linestyle=style,
            markersize=7,
            linewidth=2,
            fillstyle="full" if how == "pixels" else "none",
            label=f"{label}, {said}" if several else label,
        )
    panel.set_xlabel(f"patches of {patch} x {patch} pixels dropped (%)", fontsize=13)
    panel.set_xlim(-2, 102)
    if drawn:  # below: curves may go anywhere
        panel.figure.legend(fontsize=12, frameon=False, loc="outside lower center", ncols=2 if several else 3)


def _draw_shuffles(panel: Any, whole: dict[str, Any], shuffles: list[dict[str, Any]]) -> None:
    points = [whole, *sorted(shuffles, key=lambda row: row["tiles"])]
    heights = [row["top1"] for row in points]
    panel.bar(range(len(points)), heights, width=0.6, color=["#999999"] + ["#56B4E9"] * len(shuffles))
    for i, height in enumerate(heights):
        panel.text(i, height + 1.5, f"{height:.0f}", ha="center", fontsize=12)
    panel.set_xticks(range(len(points)), ["whole", *(f"{row['tiles']} x {row['tiles']}" for row in points[1:])])
    panel.set_xlabel("tiles, shuffled", fontsize=13)
