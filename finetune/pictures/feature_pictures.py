"""Pictures of features: a map of images, the main directions of patch features as colors, and nearest neighbors."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.finetune.features import pooled
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.knn import nearest
from quarterlight.ssl.swin import SwinEncoder

from .figure import COLORS, MARKERS, CannotDraw, Picture, montage_height, new_picture, plain, show_montage
from .images import Images

FORWARD_BATCH = 64
NEIGHBORS = 6
LAYERS = 4
RGB_IMAGES = 6
FEWEST = 4  # images of which a map or neighbors say anything


@torch.no_grad()
def features_of(encoder: Encoder, normalize: nn.Module, images: Images, device: torch.device) -> Float[Tensor, "n D"]:
    """Returns the mean of the patch tokens of every image, on the CPU."""
    found = []
    for pixels in images.pixels.split(FORWARD_BATCH):
        found.append(pooled(encoder(normalize(pixels.to(device))), encoder)["avg"].cpu())
    return torch.cat(found)


def principal_components(rows: Float[Tensor, "n D"], count: int) -> Float[Tensor, "n k"]:
    """Returns the rows' coordinates along their first `count` principal components, zeros where there are fewer.

    Signs are chosen so that the largest coordinate of each is positive: they would be arbitrary otherwise.
    """
    x = rows.double() - rows.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    found = F.pad(x @ directions[:count].t(), (0, max(0, count - len(directions))))
    largest = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    return (found * torch.where(largest < 0, -1.0, 1.0)).float()


def draw_features_map(features: Float[Tensor, "n D"], images: Images, *, seed: int) -> Picture:
    """Draws images as points whose distance tells how alike their features are, colored by label.

    By t-SNE (van der Maaten & Hinton 2008) where scikit-learn is installed, else by two principal components.
    """
    n = len(features)
    if n < FEWEST:
        raise CannotDraw(f"a map of features needs at least {FEWEST} images, and there are {n}")
    if find_spec("sklearn") is not None:
        points, method = _tsne(features, seed), "t-SNE"
    else:
        points, method = principal_components(features, 2).numpy(), "the first two principal components"
    labels, counts = np.unique(images.labels[images.labels >= 0], return_counts=True)
    chosen = np.sort(labels[np.argsort(-counts, kind="stable")][: len(COLORS)]).tolist()
    rest = len(labels) - len(chosen)
    coloring = "Colored by label, which the map has not seen" if len(labels) else "There are no labels to color by"
    coloring += f" (the {len(chosen)} most frequent of {len(labels)} classes; the others grey). " if rest else ". "
    picture = new_picture(
        "features_map",
        f"Features of {n} images, drawn in two dimensions by {method}",
        f"{coloring}Near points are images whose features (mean of the patch tokens) are alike: a class that the "
        "encoder tells apart without labels is a cloud of its own. "
        + ("Distances between far clouds and sizes of clouds mean nothing in t-SNE." if method == "t-SNE" else ""),
        height=5.6,
    )
    axes = picture.figure.subplots()
    other = ~np.isin(images.labels, chosen)
    axes.scatter(*points[other].T, s=9, color="#cccccc", linewidths=0, label="others" if rest else None)
    for i, label in enumerate(chosen):
        style = {"color": COLORS[i], "marker": MARKERS[i], "edgecolors": "#444444", "linewidths": 0.2}
        axes.scatter(*points[images.labels == label].T, s=18, label=plain(images.class_name(label)[:24]), **style)
    axes.set_xticks([])
    axes.set_yticks([])
    if chosen:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    return picture


def _tsne(features: Float[Tensor, "n D"], seed: int) -> Float[np.ndarray, "n 2"]:
    from sklearn.manifold import TSNE

    x = principal_components(features, min(50, *features.shape)).numpy()  # as its authors advise: faster, less noise
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x).astype(np.float32)


@torch.no_grad()
def patch_features(encoder: Encoder, images: Float[Tensor, "B C H W"]) -> tuple[list[str], list[Tensor]]:
    """Returns names of some layers from input to output, and the features [B, D, h, w] of patches behind each.

    The quarters of a ViT, the stages of a Swin; every token normalized to mean 0 and variance 1.
    """
    windows = isinstance(encoder, SwinEncoder)
    depth = len(encoder.timm.layers if windows else encoder.timm.blocks)
    indices = sorted({round((i + 1) * depth / LAYERS) - 1 for i in range(LAYERS)} - {-1})
    maps = encoder.timm.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt="NCHW")
    names = [f"{'stage' if windows else 'block'} {i + 1}" for i in indices]
    return names, [F.layer_norm(x.movedim(1, 3).float(), x.shape[1:2]).movedim(3, 1) for x in maps]


def draw_features_rgb(
    encoder: Encoder, images: Float[Tensor, "B C H W"], shown: Float[np.ndarray, "B h w 3"]
) -> Picture:
    """Draws the three main directions of patch features as red, green and blue (DINOv2, Oquab et al. 2023, figure 1).

    `images` are normalized, `shown` the same in color. Differs from DINOv2: backgrounds are not cut away, and features
    of several layers are shown.
    """
    images, shown = images[:RGB_IMAGES], shown[:RGB_IMAGES]
    names, maps = patch_features(encoder, images)
    columns = []
    for x in maps:
        if x.shape[2] * x.shape[3] * len(x) < FEWEST:
            columns.append([None] * len(x))
            continue
        colors = principal_components(x.movedim(1, 3).flatten(0, 2), 3)
        low, high = torch.quantile(colors, torch.tensor([0.02, 0.98]).to(colors), dim=0)
        scaled = ((colors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(0, (len(x), *x.shape[2:]))
        grown = F.interpolate(scaled.movedim(3, 1), shown.shape[1:3], mode="nearest")
        columns.append(list(grown.movedim(1, 3).cpu().numpy()))
    rows = [[shown[i], *(column[i] for column in columns)] for i in range(len(shown))]
    picture = new_picture(
        "features_rgb",
        "Patch features as colors: their first three principal components",
        f"Red, green and blue are the main directions in which the features of all patches of these {len(shown)} "
        "images differ, found for each layer by itself: patches of one color are alike for that layer, in all rows, "
        "and colors of different columns do not correspond. Where only places differ, all rows look the same.",
        height=montage_height(len(rows), len(rows[0]), shown.shape[1] / shown.shape[2]) + 0.2,
    )
    show_montage(picture.figure.subplots(), rows, columns=["image", *names])
    return picture


def draw_neighbors(
    features: Float[Tensor, "n D"], images: Images, colored: Any, queries: Int[np.ndarray, " q"]
) -> Picture:
    """Draws the nearest neighbors of some images; `colored(numbers)` gives images [k, h, w, 3] in [0, 1]."""
    if len(features) < FEWEST:
        raise CannotDraw(f"neighbors need at least {FEWEST} images, and there are {len(features)}")
    places = torch.from_numpy(queries)
    similarity, ids = nearest(features, features[places], NEIGHBORS, itself=places)
    labelled = bool((images.labels >= 0).any())
    own = images.labels[queries][:, None]
    share = float((images.labels[ids.numpy()] == own)[own[:, 0] >= 0].mean()) if (own >= 0).any() else 0.0
    picture = new_picture(
        "neighbors",
        f"Nearest neighbors among {len(features)} images",
        "Left the image that is asked for; then those whose features (mean of the patch tokens) have the largest "
        "cosine similarity, which stands below each. "
        + (
            f"Blue frames are of the same class ({100 * share:.0f} %), dashed orange ones of another."
            if labelled
            else ""
        ),
        height=(8 / (ids.shape[1] + 1) + 0.12) * len(queries),
    )
    axes = picture.figure.subplots(len(queries), ids.shape[1] + 1, squeeze=False)
    for row, query, others, near in zip(axes, queries.tolist(), ids.numpy(), similarity.tolist(), strict=True):
        cells = colored(np.array([query, *others]))
        for j, (place, i, cell) in enumerate(zip(row, [query, *others.tolist()], cells, strict=True)):
            place.imshow(cell)
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
            label = images.class_name(int(images.labels[i]))[:14] if images.labels[i] >= 0 else ""
            place.set_xlabel(plain(f"{label} {near[j - 1]:.3f}" if j else label), fontsize=8, labelpad=3)
            if j and images.labels[query] >= 0:
                same = images.labels[i] == images.labels[query]
                color, dash = (COLORS[0], "-") if same else (COLORS[1], (0, (3, 1.5)))
                frame = Rectangle(
                    (0, 0), 1, 1, transform=place.transAxes, fill=False, ec=color, ls=dash, lw=2.5, clip_on=False
                )
                place.add_patch(frame)
    return picture
