"""Pictures of attention: how far every head looks, and which patches an image's tokens are made of in the end."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from torch import Tensor

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.swin import SwinEncoder

from .attention import (
    block_names,
    blocks_of,
    grid_places,
    mean_attention_distance,
    mean_distance,
    on_image,
    rollout,
)
from .figure import COLORS, MARKERS, CannotDraw, Picture, montage_height, new_picture, show_montage

ROLLED_OUT = 6  # images


def draw_attention_distance(
    encoder: Encoder, images: Float[Tensor, "B C H W"]
) -> tuple[Picture, dict[str, list[float]]]:
    """Draws the mean attention distance of every head (ViT paper, figure 7 right), and returns it by block, in pixels.

    Raises CannotDraw for attention that cannot be read.
    """
    try:
        distances = [x.tolist() for x in mean_attention_distance(encoder, images)]
    except InputError as error:
        raise CannotDraw(str(error)) from error
    height, width = encoder.img_size
    windows = isinstance(encoder, SwinEncoder)
    picture = new_picture(
        "attention_distance",
        f"Mean attention distance of every head, in pixels of {height} x {width} images",
        f"Distance between a patch and the patches that it attends to, weighted by attention, over {len(images)} images"
        + (" (class and register tokens left out)" if encoder.num_prefix_tokens else "")
        + (", within windows, which bound it. " if windows else ". ")
        + "Dots are heads, the line is their mean. Low: a head looks nearby; the dashed line is where a head "
        "would look that attends to " + ("its whole window alike." if windows else "all patches alike."),
        height=3.8,
    )
    _plot_distances(picture.figure.subplots(), encoder, distances, _even_distances(encoder))
    return picture, dict(zip(block_names(encoder), distances, strict=True))


def _plot_distances(axes: Any, encoder: Encoder, distances: list[list[float]], even: list[float]) -> None:
    """Draws a dot a head, a line through the means of each stage, and the distances of even attention dashed."""
    names, windows = block_names(encoder), isinstance(encoder, SwinEncoder)
    places = np.arange(1, len(names) + 1)
    stages = [name.partition(",")[0] if windows else "" for name in names]
    for i, stage in enumerate(dict.fromkeys(stages)):
        mine = [b for b in range(len(names)) if stages[b] == stage]
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        for b in mine:
            count = len(distances[b])
            spread = np.linspace(-0.16, 0.16, count) if count > 1 else np.zeros(1)
            axes.scatter(places[b] + spread, distances[b], s=16, color=color, marker=marker, alpha=0.75, linewidths=0)
        axes.plot(places[mine], [np.mean(distances[b]) for b in mine], color=color, linewidth=1.5, label=stage)
    edges = [places[0] - 0.5, *(places + 0.5)]
    axes.step(edges, [even[0], *even], color="#777777", linestyle="--", linewidth=1, where="pre")
    axes.set_ylim(bottom=0, top=1.08 * max(*map(max, distances), *even))
    axes.set_xticks(places, [name.rpartition(" ")[2] for name in names], fontsize=8)
    axes.set_xlabel("block" + (" of its stage" if windows else ""), fontsize=9)
    axes.set_ylabel("pixels", fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if windows:
        axes.legend(fontsize=8, frameon=False, ncols=4)


def _even_distances(encoder: Encoder) -> list[float]:
    """Returns the mean distance of a head that attends to all alike, for each block; masked pairs do not count."""
    found = []
    for block in blocks_of(encoder):
        if isinstance(encoder, SwinEncoder):
            window, side = tuple(block.window_size), encoder.img_size[0] // block.input_resolution[0]
            area = window[0] * window[1]
            allowed = torch.ones(1, area, area) if block.attn_mask is None else (block.attn_mask.cpu() >= 0).float()
        else:
            window, side, allowed = encoder.grid, encoder.unit_size, torch.ones(1, encoder.num_units, encoder.num_units)
        found.append(float(mean_distance(allowed[:, None], grid_places(window, side, allowed))[0]))
    return found


def draw_rollout(encoder: Encoder, images: Float[Tensor, "B C H W"], shown: Float[np.ndarray, "B h w 3"]) -> Picture:
    """Draws attention rolled out to the image (Abnar & Zuidema 2020): image, map, and the map over the image.

    `images` are normalized, `shown` the same in color. Raises CannotDraw for attention that cannot be read.
    """
    images, shown = images[:ROLLED_OUT], shown[:ROLLED_OUT]
    try:
        rows = rollout(encoder, images)
    except InputError as error:
        raise CannotDraw(str(error)) from error
    maps, patches = on_image(encoder, rows)[:, 0].cpu().numpy(), rows[:, 0, encoder.num_prefix_tokens :]
    has_class = getattr(encoder.timm, "cls_token", None) is not None
    least, most = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    heat = (maps - least) / np.maximum(most - least, 1e-12)
    colored = colormaps["magma"](heat)[..., :3].astype(np.float32)
    over = shown * (0.2 + 0.8 * heat[..., None])
    triples = [list(triple) for triple in zip(shown, colored, over, strict=True)]
    half = -(-len(triples) // 2)
    cells = [triples[i] + (triples[i + half] if i + half < len(triples) else [None] * 3) for i in range(half)]
    cells = cells if len(triples) > 1 else [triples[0]]
    of = "the class token" if has_class else "the mean of all tokens"
    picture = new_picture(
        "rollout",
        f"Attention rolled out: which patches {of} comes from",
        "Image, rolled-out attention, and the image lit by it. Attention averaged over heads, half of it the residual "
        "path, multiplied over all blocks (Abnar & Zuidema 2020). Each map spans its own range; the largest share "
        f"of a patch is {100 * float(patches.max()):.2g} %, equal shares would be {100 / patches.shape[1]:.2g} %."
        + (" In a Swin merged tokens count as equal parts." if isinstance(encoder, SwinEncoder) else ""),
        height=montage_height(len(cells), len(cells[0]), shown.shape[1] / shown.shape[2]),
    )
    show_montage(picture.figure.subplots(), cells, columns=["image", "attention", "both"] * (len(cells[0]) // 3))
    return picture
