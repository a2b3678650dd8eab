"""The picture of launch/neighbors.py: queries on the left, their nearest images on the right."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from quarterlight.ssl.addresses import is_remote
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.decode import UnreadableImage, decode_image
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.files import replace_file
from quarterlight.ssl.index import ShardIndex, open_index
from quarterlight.ssl.stage import cache_folder

from .embeddings import Embeddings

MOST_SHOWN = 8  # neighbors of a query: more would be too small
LONGEST_NAME = 21  # characters under a picture
TILE = 160  # pixels: pictures are made this large at least, and at most twice as large


class Pictures:
    """Reads images by what a file of embeddings says of them; shards are opened once."""

    def __init__(self, cache_dir: str | None) -> None:
        self.cache_dir = cache_folder(DataConfig(train="", cache_dir=cache_dir))
        self._shards: dict[str, tuple[ShardIndex, dict[str, int]]] = {}

    def read(self, path: str, key: str) -> UInt8[np.ndarray, "h w 3"] | None:
        """Returns an image, small; None where it is not to be had any more."""
        try:
            if is_remote(path) or path.endswith(".tar"):
                index, number = self._shard(path)
                data = index.read(number[key])
            else:
                data = Path(path).read_bytes()
            image = Image.fromarray(decode_image(data))
        except (OSError, KeyError, InputError, UnreadableImage):
            return None
        factor = -(-TILE // max(image.size))
        if factor > 1:  # enlarged by whole pixels
            return np.array(image.resize([side * factor for side in image.size], Image.Resampling.NEAREST))
        image.thumbnail((2 * TILE, 2 * TILE))
        return np.array(image)

    def _shard(self, path: str) -> tuple[ShardIndex, dict[str, int]]:
        if path not in self._shards:
            index = open_index(path, cache_dir=self.cache_dir)
            self._shards[path] = index, {index.key(i): i for i in reversed(range(len(index)))}
        return self._shards[path]


def draw_neighbors(
    path: Path,
    bank: Embeddings,
    queries: Embeddings,
    similarity: Float[Tensor, "q k"],
    number: Int[Tensor, "q k"],
    shown: list[int],
    cache_dir: str | None,
) -> None:
    """Writes a picture of the neighbors of the queries `shown`, with similarity, label and key under each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that other commands must not cost
    from matplotlib.figure import Figure

    pictures, columns = Pictures(cache_dir), min(MOST_SHOWN, number.shape[1])
    figure = Figure(figsize=(1.7 * (columns + 1) + 0.4, 2.2 * len(shown) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), columns + 2, squeeze=False, width_ratios=[1, 0.15, *[1] * columns])
    for row, query in zip(grid, shown, strict=True):
        _draw(row[0], pictures.read(queries.path[query], queries.key[query]), _text(queries, query, ""))
        row[1].axis("off")
        for axes, value, other in zip(row[2:], similarity[query].tolist(), number[query].tolist(), strict=False):
            if other < 0:
                axes.axis("off")
                continue
            _draw(axes, pictures.read(bank.path[other], bank.key[other]), _text(bank, other, f"{value:.4f}"))
    grid[0, 0].set_title("query", fontsize=13)
    grid[0, 2].set_title("nearest", fontsize=13)
    figure.suptitle(f"Nearest of {len(bank):,} images by cosine similarity", fontsize=14)
    replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def _draw(axes: Any, picture: UInt8[np.ndarray, "h w 3"] | None, text: str) -> None:
    axes.imshow(np.full((TILE, TILE, 3), 225, np.uint8) if picture is None else picture)
    if picture is None:
        axes.text(0.5, 0.5, "not found", transform=axes.transAxes, ha="center", va="center", fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, fontsize=10)
    axes.spines[:].set_color("#999999")


def _text(embeddings: Embeddings, number: int, similarity: str) -> str:
    """Returns what stands under a picture: similarity and label, and the end of its key."""
    label, key = int(embeddings.label[number]), embeddings.key[number]
    key = key if len(key) <= LONGEST_NAME else f"...{key[3 - LONGEST_NAME :]}"
    facts = [x for x in (similarity, f"label {label}" if label >= 0 else "") if x]
    plain = key.replace("$", r"\$")  # which to matplotlib begins mathematics
    return "\n".join(["  ".join(facts), plain] if facts else [plain])
