"""Figures of one look: 8 inches wide, a title that says what is shown, a caption that says how to read it.

They are matplotlib's own Figure objects, made without pyplot, so that nothing is kept between them and no display is
asked for. Colors can be told apart by the color-blind: Okabe and Ito's for classes and curves, cividis and PuOr.
"""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from quarterlight.ssl.errors import printable
from quarterlight.ssl.files import replace_file

WIDTH = 8.0  # inches
DPI = 125  # 1000 pixels wide: text of 9 points stays readable at 800
# Okabe and Ito's eight, wine of Tol's, and grey
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#882255", "#888888",
)  # fmt: skip
MARKERS = "os^DvP*X<p"
QUANTITY, SIGNED = "cividis", "PuOr"  # color maps


class Picture(NamedTuple):
    """A figure, and what is said of it."""

    name: str  # of the file, without .png
    title: str
    caption: str
    figure: Figure


class CannotDraw(Exception):
    """This encoder or these images do not have what a picture shows; the message says what is missing."""


def new_picture(name: str, title: str, caption: str, *, height: float) -> Picture:
    """Returns an empty picture of `height` inches between its title and its caption."""
    lines, heading = textwrap.wrap(plain(caption), 122), textwrap.wrap(plain(title), 86)
    total = height + 0.25 * len(heading) + 0.17 * len(lines) + 0.2
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(heading), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8.5, color="#333333")
    return Picture(name, title, caption, figure)


def plain(text: str) -> str:
    """Returns a text as matplotlib draws it literally: no formulas between dollars, and no label that it hides."""
    return (" " if text.startswith("_") else "") + printable(text).replace("$", r"\$")


def figure_pixels(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the figure as it is saved."""
    canvas: Any = figure.canvas
    with _quiet():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, with nothing in it that changes from one writing to the next."""
    with _quiet():
        replace_file(path, lambda partial: figure.savefig(partial, format="png", metadata={"Software": None}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Says nothing of letters that the font lacks, once each: class names are in any language."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def montage(
    rows: Sequence[Sequence[Float[np.ndarray, "h w 3"] | None]], *, gap: float = 0.04
) -> Float[np.ndarray, "H W 3"]:
    """Returns images of one size side by side on white, None where there is none; `gap` is a share of their width."""
    first = next(image for row in rows for image in row if image is not None)
    height, width, _ = first.shape
    space = max(1, round(gap * width))
    page = np.ones((len(rows) * (height + space) - space, len(rows[0]) * (width + space) - space, 3), np.float32)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                top, left = i * (height + space), j * (width + space)
                page[top : top + height, left : left + width] = image
    return page


def montage_height(rows: int, columns: int, aspect: float = 1.0, *, labelled: bool = False) -> float:
    """Returns the inches that a montage of so many images of height / width `aspect` needs at the full width."""
    return (WIDTH - 0.2 - 0.9 * labelled) / columns * rows * aspect


def show_montage(
    axes: Any,
    rows: Sequence[Sequence[Float[np.ndarray, "h w 3"] | None]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    gap: float = 0.04,
) -> None:
    """Draws a montage on `axes` with a heading above each column and a label left of each row."""
    page = montage(rows, gap=gap)
    axes.imshow(page)
    height, width = page.shape[0] / len(rows), page.shape[1] / len(rows[0])
    axes.set_xticks([(i + 0.5) * width for i in range(len(columns))], columns, fontsize=8.5)
    axes.set_yticks([(i + 0.5) * height for i in range(len(labels))], labels, fontsize=8.5)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, pad=2)
    axes.spines[:].set_visible(False)


def as_color(images: Float[np.ndarray, "B C H W"]) -> Float[np.ndarray, "B H W 3"]:
    """Returns images in [0, 1], of one channel or three, channels last and in color."""
    clipped = np.clip(np.moveaxis(images, 1, 3), 0.0, 1.0).astype(np.float32)
    return np.repeat(clipped, 3, axis=3) if clipped.shape[3] == 1 else clipped
