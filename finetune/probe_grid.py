"""Linear classifiers on cached features: every view of the features and every learning rate, all in one pass."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.ssl.pooling import Features
from quarterlight.ssl.randoms import hashes

DEVICE_SHARE = 0.6  # of the free memory of an accelerator that features may take
PAUSE_STEPS = 50  # between two looks at whether to stop


class View(NamedTuple):
    """What a classifier looks at."""

    input: str  # a key of `inputs_of`
    batch_norm: bool  # whether features are normalized over the batch


def inputs_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns, for features of these names (`ssl/pooling.py`), the inputs they make, each as what is put side by side.

    "last4" is the class token (without one, or in a Swin: the average) of the last four layers, and "both" and
    "last4_avg" have the average of the patch tokens beside it: with "token" and "last4" DINOv2's four inputs.
    """
    kind = "token" if "token" in names else "avg"
    layers = (kind, *sorted(name for name in names if name.startswith("last")))
    found: dict[str, tuple[str, ...]] = {"avg": ("avg",)}
    if kind == "token":
        found |= {"token": ("token",), "both": ("token", "avg")}
    if len(layers) > 1:
        found["last4"] = layers
        if kind == "token":
            found["last4_avg"] = (*layers, "avg")
    return found


class Columns:
    """Features by name, on the device where they fit there, else in host memory, from where batches are copied."""

    def __init__(self, features: Features, device: torch.device) -> None:
        self.device = device
        size = sum(x.numel() * x.element_size() for x in features.values())
        fits = device.type != "cuda" or size < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
        self.features = {name: x.to(device) if fits else x for name, x in features.items()}

    def rows(self, ids: Int[Tensor, " b"]) -> Features:
        """Returns the features of these images on the device, in float32."""
        where = next(iter(self.features.values())).device
        ids = ids.to(where)
        return {name: x[ids].to(self.device, non_blocking=True).float() for name, x in self.features.items()}


class HeadGrid(nn.Module):
    """A linear classifier for each learning rate, all with the same initial weights, on features as one view has them.

    With `batch_norm` features are normalized over the batch without scale and shift, as in MAE's probe.
    """

    def __init__(self, dim: int, num_classes: int, count: int, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.weight = nn.Parameter((torch.randn(num_classes, dim) * 0.01).repeat(count, 1, 1))  # [count, classes, D]
        self.bias = nn.Parameter(torch.zeros(count, num_classes))

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B count classes"]:
        """Returns the logits of all classifiers."""
        x = self.norm(features)
        return (x @ self.weight.flatten(0, 1).T).view(len(x), *self.bias.shape) + self.bias


def train_grids(
    columns: Columns,
    labels: Int[Tensor, " n"],
    ids: Int[np.ndarray, " m"],
    inputs: dict[View, tuple[str, ...]],
    *,
    num_classes: int,
    base_lrs: tuple[float, ...],
    epochs: int,
    batch_size: int,
    seed: int,
    weight_decay: float = 0.0,
    pause: Callable[[], None] = lambda: None,
) -> dict[View, HeadGrid]:
    """Returns classifiers of the images `ids` for each view, trained by SGD (momentum 0.9).

    The rate of each falls along a cosine from base_lr * batch_size / 256, as in DINOv2's linear evaluation. All see the
    same batches, and none depends on which others there are. With `weight_decay` w each minimizes its mean
    cross-entropy + w / 2 * |weight|^2: scikit-learn's LogisticRegression(C=1 / (w * images)). `pause` is called every
    PAUSE_STEPS steps.

    Differs from MAE: features come from one center crop, so that they are computed once, and the optimizer is SGD
    instead of LARS with batches of 16384, which the paper reports to work similarly. train_probe.py has MAE's protocol.
    """
    grids, device = {}, columns.device
    for view, names in inputs.items():
        torch.manual_seed(seed)
        dim = sum(columns.features[name].shape[1] for name in names)
        grids[view] = HeadGrid(dim, num_classes, len(base_lrs), batch_norm=view.batch_norm).to(device)
    # A rate in front of each loss, and the same for all in the optimizer: without decay it is the same SGD.
    rates = torch.tensor(base_lrs, device=device)
    parameters = [parameter for grid in grids.values() for parameter in grid.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=True) if parameters else None
    batch_size = min(batch_size, len(ids))
    steps_per_epoch = len(ids) // batch_size
    order = ids
    for step in range(epochs * steps_per_epoch):
        if step % PAUSE_STEPS == 0:
            pause()
        epoch, i = divmod(step, steps_per_epoch)
        if optimizer is None:
            continue  # this process has no view, and only answers the others
        if i == 0:
            order = ids[np.argsort(hashes(seed, f"probe {epoch}", np.arange(len(ids)), 1)[:, 0])]
        scale = batch_size / 256 * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
        optimizer.param_groups[0]["lr"] = scale
        chosen = torch.from_numpy(order[i * batch_size : (i + 1) * batch_size])
        rows, targets = columns.rows(chosen), labels[chosen].to(device)
        targets = targets.repeat_interleave(len(base_lrs))
        for view, names in inputs.items():
            logits = grids[view](_side_by_side(rows, names)).flatten(0, 1)  # [B * count, classes]
            losses = F.cross_entropy(logits, targets, reduction="none").view(-1, len(base_lrs)).mean(dim=0)
            if weight_decay > 0:
                losses = losses + weight_decay / 2 * grids[view].weight.square().sum(dim=(1, 2))
            (losses * rates).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {view: grid.eval() for view, grid in grids.items()}


@torch.no_grad()
def grid_accuracy(
    grid: HeadGrid,
    names: tuple[str, ...],
    columns: Columns,
    labels: Int[Tensor, " n"],
    ids: Int[np.ndarray, " m"],
    *,
    chunk: int = 4096,
) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    """Returns top-1 and top-5 of every classifier on the images `ids`, in percent; 0 for one that diverged."""
    right = torch.zeros(2, len(grid.bias), device=columns.device)
    for part in torch.from_numpy(ids).split(chunk):
        logits = grid(_side_by_side(columns.rows(part), names))  # [chunk, count, classes]
        targets = labels[part].to(columns.device)[:, None, None]
        ranked = logits.topk(min(5, logits.shape[2]), dim=2).indices == targets
        ranked = ranked & torch.isfinite(logits).all(dim=2, keepdim=True)
        right += torch.stack([ranked[:, :, 0].sum(dim=0), ranked.any(dim=2).sum(dim=0)])
    top1, top5 = (100 * right / len(ids)).cpu()
    return top1, top5


def _side_by_side(rows: Features, names: tuple[str, ...]) -> Float[Tensor, "B D"]:
    return rows[names[0]] if len(names) == 1 else torch.cat([rows[name] for name in names], dim=1)
