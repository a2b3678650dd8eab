"""The confusion matrix and the accuracy of each class, as tables and as a picture."""

import csv
import io
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from quarterlight.ssl.errors import printable
from quarterlight.ssl.files import replace_file, write_text

from .evaluate import Outcomes

MOST_CLASSES = 2000  # in the matrix as a table, of 10 MB then; the classes of more are in per_class.csv
NAMED_CLASSES, NUMBERED_CLASSES = 40, 20  # up to which the picture has names, and numbers in its cells
MOST_ROWS = 100  # of the picture
PAIRS_SHOWN = 12


def write_evaluation(run_dir: Path, outcomes: Outcomes, names: Sequence[str], *, which: str = "") -> None:
    """Writes per_class.csv, confusion.csv and confusion.png to a run folder; `which` goes behind their names.

    `names` are those of all classes, in label order. Rows of the matrix are labels, columns are predictions.
    """
    matrix = confusion_matrix(outcomes, len(names))
    write_text(run_dir / f"per_class{which}.csv", _csv(_per_class(matrix, names)))
    if len(names) <= MOST_CLASSES:
        rows = [
            ["label \\ predicted", *names],
            *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True)),
        ]
        write_text(run_dir / f"confusion{which}.csv", _csv(rows))
    figure = draw(matrix, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a script that the font has not: boxes in its place
        save = partial(figure.savefig, format="png", bbox_inches="tight")
        replace_file(run_dir / f"confusion{which}.png", save)


def named_classes(names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns a name for each class: those given, if they are as many, else its number."""
    return list(names) if names is not None and len(names) == num_classes else [str(i) for i in range(num_classes)]


def confusion_matrix(outcomes: Outcomes, num_classes: int) -> Int[np.ndarray, "C C"]:
    """Returns how many images of each class (rows) were taken for each class (columns), as scikit-learn counts."""
    cells = np.bincount(outcomes.labels * num_classes + outcomes.predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def _per_class(matrix: Int[np.ndarray, "C C"], names: Sequence[str]) -> list[list[Any]]:
    """Returns a row for each class; shares are in percent, and empty where there is nothing to divide by."""
    images, predictions, correct = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    rows: list[list[Any]] = [["label", "class", "images", "top1", "predictions", "precision"]]
    for label, name in enumerate(names):
        top1, precision = (
            f"{100 * correct[label] / count[label]:.4f}" if count[label] else "" for count in (images, predictions)
        )
        rows.append([label, name, images[label], top1, predictions[label], precision])
    return rows


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def draw(matrix: Int[np.ndarray, "C C"], names: Sequence[str]) -> Any:
    """Returns a matplotlib figure: each row in percent of its images, and beside it what is mistaken most often.

    In cividis, which looks alike with and without color blindness; colors change with the root of the share, or rare
    mistakes would not be seen. More than a hundred classes stand together in blocks of as many as make a hundred rows.
    """
    from matplotlib.colors import PowerNorm  # a second that most commands must not cost
    from matplotlib.figure import Figure

    count, block = len(names), -(-len(names) // MOST_ROWS)
    starts = np.arange(0, count, block)
    cells = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    shares = 100 * cells / cells.sum(axis=1, keepdims=True).clip(1)
    short = [_shown(name, 18) for name in names]
    side = min(max(0.45 * count, 4.0), 12.0)  # inches of the matrix
    figure = Figure(figsize=(side + 6.5, side + 1.2), layout="constrained", dpi=120)
    grid = figure.add_gridspec(2, 2, width_ratios=[side, 4.5], height_ratios=[side - 2, 2])
    axes, text = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    picture = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if count <= NAMED_CLASSES:
        axes.set_xticks(range(count), short, rotation=90, parse_math=False)
        axes.set_yticks(range(count), short, parse_math=False)
    if count <= NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if cells[row, column]:
                ink = "black" if share > 30 else "white"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    of_what = "" if block == 1 else f", in blocks of {block} classes"
    axes.set(xlabel=f"predicted{of_what}", ylabel=f"label{of_what}")
    images = int(matrix.sum())
    axes.set_title(f"{100 * matrix.trace() / max(1, images):.2f} % of {images} images correct")
    figure.colorbar(picture, ax=axes, label="% of the label's images", shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    text.axis("off")
    text.text(0, 1, _mistakes(matrix, short), va="top", fontsize=8, transform=text.transAxes, parse_math=False)
    if count > NAMED_CLASSES:
        of_class, curve = matrix.sum(axis=1), figure.add_subplot(grid[1, 1])
        curve.plot(np.sort(100 * matrix.diagonal()[of_class > 0] / of_class[of_class > 0]))
        curve.set(xlabel="classes, sorted", ylabel="top-1, %", ylim=(0, 100))
    return figure


def _mistakes(matrix: Int[np.ndarray, "C C"], names: Sequence[str]) -> str:
    """Returns the most frequent confusions and the classes that are found least often, a line each."""
    wrong = matrix * (1 - np.eye(len(names), dtype=matrix.dtype))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS_SHOWN]
    lines = ["most frequent mistakes", ""]
    for row, column in zip(*np.unravel_index(pairs, matrix.shape), strict=True):
        if wrong[row, column]:
            lines.append(f"{wrong[row, column]} of {matrix[row].sum()}  {names[row]} as {names[column]}")
    images = matrix.sum(axis=1)
    top1 = np.where(images > 0, matrix.diagonal() / images.clip(1), np.inf)
    lines += ["", "classes found least often", ""]
    for label in np.argsort(top1, kind="stable")[:PAIRS_SHOWN]:
        if images[label]:
            lines.append(f"{100 * top1[label]:.1f} %  {names[label]}")
    return "\n".join(lines)


def _shown(name: str, most: int) -> str:
    name = printable(name).replace("\n", " ")
    return name if len(name) <= most else f"{name[: most - 1]}…"
