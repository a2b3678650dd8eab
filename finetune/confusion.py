"""The confusion matrix and the accuracy of each class, as tables and as a picture."""

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
from .tables import csv_text

MOST_CLASSES = 2000  # in the matrix as a table, of 10 MB then; the classes of more are in per_class.csv
NAMED_CLASSES, NUMBERED_CLASSES = 40, 20  # up to which the picture has names, and numbers in its cells
MOST_ROWS = 100  # of the picture
PAIRS_SHOWN = 12


def write_evaluation(run_dir: Path, outcomes: Outcomes, names: Sequence[str], *, which: str = "") -> None:
    """Writes per_class.csv, confusion.csv and confusion.png to a run folder; `which` goes behind their names.

    `names` are those of all classes, in label order. Rows of the matrix are labels, columns are predictions.
    """
    write_text(run_dir / f"per_class{which}.csv", csv_text(_per_class(outcomes, names)))
    if len(names) <= MOST_CLASSES:
        matrix = confusion_matrix(outcomes, len(names))
        rows = [
            ["label \\ predicted", *names],
            *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True)),
        ]
        write_text(run_dir / f"confusion{which}.csv", csv_text(rows))
    figure = draw(outcomes, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a script that the font has not: boxes in its place
        save = partial(figure.savefig, format="png", bbox_inches="tight")
        replace_file(run_dir / f"confusion{which}.png", save)


def named_classes(names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Returns a name for each class: those given, if they are as many, else its number."""
    return list(names) if names is not None and len(names) == num_classes else [str(i) for i in range(num_classes)]


def confusion_matrix(outcomes: Outcomes, num_classes: int, *, block: int = 1) -> Int[np.ndarray, "B B"]:
    """Returns how many images of each class (rows) were taken for each class (columns), as scikit-learn counts.

    Classes stand together in blocks of `block`, so that the matrix of very many is no larger than that of a hundred.
    """
    side = -(-num_classes // block)
    cells = np.bincount(outcomes.labels // block * side + outcomes.predicted // block, minlength=side**2)
    return cells.reshape(side, side)


def _counts(outcomes: Outcomes, num_classes: int) -> tuple[Int[np.ndarray, " C"], ...]:
    """Returns by class the images, the predictions, and the images that are predicted right."""
    of = (outcomes.labels, outcomes.predicted, outcomes.labels[outcomes.correct])
    return tuple(np.bincount(numbers, minlength=num_classes) for numbers in of)


def _per_class(outcomes: Outcomes, names: Sequence[str]) -> list[list[Any]]:
    """Returns a row for each class; shares are in percent, and empty where there is nothing to divide by."""
    images, predictions, correct = _counts(outcomes, len(names))
    rows: list[list[Any]] = [["label", "class", "images", "top1", "predictions", "precision"]]
    for label, name in enumerate(names):
        top1, precision = (
            f"{100 * correct[label] / count[label]:.4f}" if count[label] else "" for count in (images, predictions)
        )
        rows.append([label, name, images[label], top1, predictions[label], precision])
    return rows


def draw(outcomes: Outcomes, names: Sequence[str]) -> Any:
    """Returns a matplotlib figure: each row in percent of its images, and beside it what is mistaken most often.

    In cividis, which looks alike with and without color blindness; colors change with the root of the share, or rare
    mistakes would not be seen. More than a hundred classes stand together in blocks of as many as make a hundred rows.
    """
    from matplotlib.colors import PowerNorm  # a second that most commands must not cost
    from matplotlib.figure import Figure

    count, block = len(names), -(-len(names) // MOST_ROWS)
    cells = confusion_matrix(outcomes, count, block=block)
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
    images = len(outcomes.labels)
    axes.set_title(f"{100 * int(outcomes.correct.sum()) / max(1, images):.2f} % of {images} images correct")
    figure.colorbar(picture, ax=axes, label="% of the label's images", shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    text.axis("off")
    text.text(0, 1, _mistakes(outcomes, short), va="top", fontsize=8, transform=text.transAxes, parse_math=False)
    if count > NAMED_CLASSES:
        (of_class, _, right), curve = _counts(outcomes, count), figure.add_subplot(grid[1, 1])
        curve.plot(np.sort(100 * right[of_class > 0] / of_class[of_class > 0]))
        curve.set(xlabel="classes, sorted", ylabel="top-1, %", ylim=(0, 100))
    return figure


def _mistakes(outcomes: Outcomes, names: Sequence[str]) -> str:
    """Returns the most frequent confusions and the classes that are found least often, a line each."""
    images, _, correct = _counts(outcomes, len(names))
    labels, predicted = (x[~outcomes.correct] for x in (outcomes.labels, outcomes.predicted))
    pairs, times = np.unique(labels * len(names) + predicted, return_counts=True)
    lines = ["most frequent mistakes", ""]
    for i in np.argsort(-times, kind="stable")[:PAIRS_SHOWN]:
        row, column = divmod(int(pairs[i]), len(names))
        lines.append(f"{times[i]} of {images[row]}  {names[row]} as {names[column]}")
    top1 = np.where(images > 0, correct / images.clip(1), np.inf)
    lines += ["", "classes found least often", ""]
    for label in np.argsort(top1, kind="stable")[:PAIRS_SHOWN]:
        if images[label]:
            lines.append(f"{100 * top1[label]:.1f} %  {names[label]}")
    return "\n".join(lines)


def _shown(name: str, most: int) -> str:
    name = printable(name).replace("\n", " ")
    return name if len(name) <= most else f"{name[: most - 1]}…"
