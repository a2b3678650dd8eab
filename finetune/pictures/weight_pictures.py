"""What can be seen in the weights alone: filters, positions, biases of relative positions, and the mask of windows."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.colors import to_rgb
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.swin import SwinEncoder

from .attention import block_names, blocks_of
from .figure import COLORS, QUANTITY, SIGNED, CannotDraw, Picture, as_color, montage_height, new_picture, show_montage

COMPONENTS = 28  # of the filters, as in figure 7 of the ViT paper
MOST_POSITIONS = 14  # rows and columns of patches whose similarities are shown
MOST_HEADS, MOST_BLOCKS = 8, 16  # of bias tables


def filter_components(encoder: Encoder) -> tuple[Float[Tensor, "k C P P"], Float[Tensor, " k"]]:
    """Returns the principal components of the filters that embed patches, and their shares of the variance.

    The largest first, at most COMPONENTS; of a hybrid those of the stem's first convolution.
    """
    first = _first_convolution(encoder)
    filters = first.weight.detach().double().flatten(1).cpu()
    _, strengths, components = torch.linalg.svd(filters - filters.mean(dim=0), full_matrices=False)
    share = strengths**2 / (strengths**2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    count = min(COMPONENTS, len(components))
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)  # signs would be arbitrary otherwise
    return components[:count].unflatten(1, first.weight.shape[1:]).float(), share[:count].float()


def _first_convolution(encoder: Encoder) -> nn.Conv2d:
    return next(module for module in encoder.timm.patch_embed.modules() if isinstance(module, nn.Conv2d))


def draw_filters(encoder: Encoder) -> Picture:
    """Draws the principal components of the patch embedding's filters (ViT paper, figure 7 left)."""
    components, share = filter_components(encoder)
    peak = components.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    images = list(as_color((0.5 + 0.5 * components / peak).numpy()))
    scale = max(1, 64 // images[0].shape[1])
    images = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in images]
    columns = 7
    empty = [None] * (-len(images) % columns)
    rows = [[*images, *empty][i : i + columns] for i in range(0, len(images), columns)]
    first = _first_convolution(encoder)
    height, width = first.kernel_size
    picture = new_picture(
        "filters",
        f"Patch embedding: the first {len(images)} principal components of {first.out_channels} filters",
        f"Filters of {height} x {width} pixels, each component scaled to its own range, grey is zero; the largest "
        f"comes first. They hold {100 * share.sum():.0f} % of the filters' variance, the first {100 * share[0]:.0f} %. "
        "Trained filters are smooth: means, edges and colors; untrained ones are noise.",
        height=montage_height(len(rows), columns, images[0].shape[0] / images[0].shape[1]),
    )
    show_montage(picture.figure.subplots(), rows, gap=0.08)
    return picture


def position_similarity(encoder: Encoder) -> Float[Tensor, "N N"]:
    """Returns the cosine similarity of every patch's position with every other's, in row-major order.

    Raises CannotDraw for an encoder without absolute positions.
    """
    table = getattr(encoder.timm, "pos_embed", None)
    if not isinstance(table, Tensor):
        raise CannotDraw(f"{type(encoder.timm).__name__} has no absolute positions whose similarity could be shown")
    patches = F.normalize(table.detach()[0, -encoder.num_units :].double(), dim=1)
    return (patches @ patches.t()).float().cpu()


def draw_positions(encoder: Encoder) -> Picture:
    """Draws the similarity of each position with all others (ViT paper, figure 7 middle)."""
    high, wide = encoder.grid
    maps = position_similarity(encoder).view(high, wide, high, wide).numpy()
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, MOST_POSITIONS)).round().astype(int)) for n in (high, wide))
    shown = "every patch" if (len(rows), len(columns)) == (high, wide) else f"{len(rows)} x {len(columns)} patches"
    picture = new_picture(
        "positions",
        f"Positions: cosine similarity of {shown} with all {high} x {wide}",
        "One small map for each patch, standing where the patch stands: how similar its position is to those of all "
        "patches. Each is most similar to itself; then come its own row and column. Positions that were learned from "
        "nothing show no such pattern until they are trained.",
        height=min(8.5, 6.6 * len(rows) / len(columns)),
    )
    page = np.full((len(rows) * (high + 1) - 1, len(columns) * (wide + 1) - 1), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            page[i * (high + 1) :, j * (wide + 1) :][:high, :wide] = maps[row, column]
    axes = picture.figure.subplots()
    drawn = axes.imshow(page, cmap=QUANTITY, vmin=float(maps.min()), vmax=1.0, interpolation="nearest")
    axes.set_xticks(np.arange(len(columns)) * (wide + 1) + wide / 2 - 0.5, columns + 1, fontsize=8)
    axes.set_yticks(np.arange(len(rows)) * (high + 1) + high / 2 - 0.5, rows + 1, fontsize=8)
    axes.set_xlabel("column of the patch", fontsize=9)
    axes.set_ylabel("row of the patch", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    picture.figure.colorbar(drawn, ax=axes, shrink=0.7, label="cosine similarity")
    return picture


def bias_tables(encoder: Encoder) -> list[Float[Tensor, "_ _ _"]]:
    """Returns the biases of relative positions of every block and head, as maps of (2M - 1) x (2M - 1).

    In a map the middle is a token itself; left of it, keys that stand left of the query. Of Swin v2 they are what its
    small network makes of the coordinates, 0 to 16. Raises CannotDraw for an encoder without windows.
    """
    if not isinstance(encoder, SwinEncoder):
        raise CannotDraw(f"{type(encoder.timm).__name__} has no tables of relative positions")
    found = []
    with torch.no_grad():
        for block in blocks_of(encoder):
            attn: Any = block.attn
            if hasattr(attn, "logit_scale"):
                table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
            else:
                table = attn.relative_position_bias_table
            high, wide = (2 * int(side) - 1 for side in attn.window_size)
            # timm's rows are query minus key: turned round, so that a map shows where the keys lie
            found.append(table.detach().float().cpu().t().reshape(-1, high, wide).flip(1, 2))
    return found


def draw_bias_tables(encoder: Encoder) -> Picture:
    """Draws the biases of relative positions of a Swin, a row of heads for each block."""
    tables = bias_tables(encoder)
    names = block_names(encoder)
    blocks = np.unique(np.linspace(0, len(tables) - 1, min(len(tables), MOST_BLOCKS)).round().astype(int)).tolist()
    heads = min(MOST_HEADS, max(len(tables[b]) for b in blocks))
    is_v2 = min(float(table.min()) for table in tables) >= 0
    picture = new_picture(
        "bias_tables",
        "Relative-position bias of every block" + (f" (the first {heads} heads)" if heads == MOST_HEADS else ""),
        "What is added to the attention score of a key, by where it stands relative to the query in the middle. Colors "
        "span each row's own largest value (right). "
        + ("Swin v2's biases lie between 0 and 16. " if is_v2 else "")
        + "Trained heads prefer near keys, or a direction; untrained ones are noise or flat.",
        height=0.86 * len(blocks) + 0.2,
    )
    axes = picture.figure.subplots(len(blocks), heads, squeeze=False)
    for row, b in zip(axes, blocks, strict=True):
        peak = max(float(tables[b].abs().max()), 1e-6)
        span = {"vmin": 0.0, "vmax": peak, "cmap": QUANTITY} if is_v2 else {"vmin": -peak, "vmax": peak, "cmap": SIGNED}
        for head, place in enumerate(row):
            place.set_axis_off()
            if head < len(tables[b]):
                place.imshow(tables[b][head].numpy(), interpolation="nearest", **span)
        row[0].text(-0.15, 0.5, names[b], transform=row[0].transAxes, ha="right", va="center", fontsize=8)
        row[-1].text(1.1, 0.5, f"{peak:.2g}", transform=row[-1].transAxes, va="center", fontsize=8)
    return picture


def draw_window_mask(encoder: Encoder) -> Picture:
    """Draws how the first shifted windows of a Swin are cut out, and which of their pairs may attend to each other."""
    if not isinstance(encoder, SwinEncoder):
        raise CannotDraw(f"{type(encoder.timm).__name__} has no windows")
    names = block_names(encoder)
    number = next((i for i, b in enumerate(blocks_of(encoder)) if any(b.shift_size) and b.attn_mask is not None), None)
    if number is None:
        raise CannotDraw("no block shifts its windows: one window holds the whole grid of every stage")
    block = blocks_of(encoder)[number]
    (high, wide), window, shift = block.input_resolution, tuple(block.window_size), tuple(block.shift_size)
    numbers = np.arange(high * wide // (window[0] * window[1])).reshape(high // window[0], wide // window[1])
    rows, columns = np.arange(high)[:, None], np.arange(wide)[None]
    plain = numbers[rows // window[0], columns // window[1]]
    shifted = numbers[(rows - shift[0]) % high // window[0], (columns - shift[1]) % wide // window[1]]
    masks = (block.attn_mask < 0).float().cpu().numpy()  # [windows, A, A]
    kinds = {"inside": (0, 0), "right edge": (0, -1), "lower edge": (-1, 0), "corner": (-1, -1)}
    picture = new_picture(
        "window_mask",
        f"Shifted windows of {names[number]}: {window[0]} x {window[1]} tokens, moved by {shift[0]} and {shift[1]}",
        "Above: the windows of the block before it, and the shifted ones; parts of one color are one window, rolled "
        "around the edges so that all stay whole. Below, all pairs of tokens of a window, a query a row: dark pairs "
        "may attend to each other, pale ones come from opposite edges of the image and are masked (-100).",
        height=7.4,
    )
    above, below = picture.figure.subfigures(2, 1, height_ratios=(1.9, 1))
    for axes, cells, title in zip(above.subplots(1, 2), (plain, shifted), ("windows", "shifted windows"), strict=True):
        axes.imshow(_tinted(cells, numbers.shape[1]), interpolation="nearest", extent=(0, wide, high, 0))
        axes.set_title(f"{title} on {high} x {wide} tokens", fontsize=9)
        axes.set(xticks=[], yticks=[])
    for axes, (title, kind) in zip(below.subplots(1, 4), kinds.items(), strict=True):
        axes.imshow(masks[numbers[kind]], cmap=QUANTITY, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    return picture


def _tinted(cells: np.ndarray, per_row: int) -> Float[np.ndarray, "h w 3"]:
    """Returns a color for each window, unlike those of its neighbors."""
    palette = np.array([to_rgb(color) for color in COLORS])
    return 1 - 0.75 * (1 - palette[(cells // per_row * 3 + cells % per_row) % len(palette)])
