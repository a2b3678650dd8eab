"""The linear-probe stage: classifiers for a grid of learning rates in one pass over cached features, and k-NN."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.files import write_json
from quarterlight.ssl.index import refuse_damage
from quarterlight.ssl.order import FileOrder, labelled_subset
from quarterlight.ssl.randoms import hashes
from quarterlight.ssl.released import encoder_with_weights
from quarterlight.ssl.runs import write_run_files
from quarterlight.ssl.stage import open_stage

from .classify import classes_of
from .config import LinearProbeConfig
from .features import Features, extract
from .knn import knn_predictions


class Probe(NamedTuple):
    """One trained linear classifier."""

    pool: str  # what it looks at: "avg" or "token"
    base_lr: float
    holdout_top1: float  # percent, what it is chosen by
    val_top1: float
    val_top5: float


class LinearGrid(nn.Module):
    """A linear classifier for each learning rate, on features normalized over the batch (MAE's probe)."""

    def __init__(self, dim: int, num_classes: int, count: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(num_classes, dim) * 0.01) for _ in range(count))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_classes)) for _ in range(count))

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "count B classes"]:
        """Returns the logits of all classifiers."""
        x = self.norm(features)
        return torch.einsum("bd,lcd->lbc", x, torch.stack(list(self.weights))) + torch.stack(list(self.biases))[:, None]

    def groups(self) -> list[dict[str, Any]]:
        """Returns an optimizer group for each classifier."""
        return [{"params": [w, b]} for w, b in zip(self.weights, self.biases, strict=True)]


def train_grid(
    features: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    base_lrs: tuple[float, ...],
    epochs: int,
    batch_size: int,
    seed: int,
) -> LinearGrid:
    """Returns classifiers trained by SGD (momentum 0.9, no decay) under a cosine from base_lr * batch_size / 256.

    Differs from MAE: features come from one center crop, so that they are computed once, and the optimizer is SGD
    instead of LARS with batches of 16384, which the paper reports to work similarly.
    """
    torch.manual_seed(seed)
    grid = LinearGrid(features.shape[1], num_classes, len(base_lrs)).to(features.device)
    optimizer = torch.optim.SGD(grid.groups(), lr=0.0, momentum=0.9)
    batch_size = min(batch_size, len(features))
    order = torch.empty(0, dtype=torch.long)
    steps_per_epoch = len(features) // batch_size
    for step in range(epochs * steps_per_epoch):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0:
            order = torch.from_numpy(np.argsort(hashes(seed, f"probe {epoch}", np.arange(len(features)), 1)[:, 0]))
        scale = batch_size / 256 * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base_lr * scale
        ids = order[i * batch_size : (i + 1) * batch_size].to(features.device)
        logits = grid(features[ids])  # [count, B, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[ids].repeat(len(base_lrs))) * len(base_lrs)
        optimizer.zero_grad()
        loss.backward()  # a sum over classifiers: each one's gradient is that of its own mean loss
        optimizer.step()
    return grid.eval()


@torch.no_grad()
def grid_accuracy(
    grid: LinearGrid, features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], *, chunk: int = 4096
) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    """Returns top-1 and top-5 of every classifier in percent."""
    right = torch.zeros(2, len(grid.weights), device=features.device)
    for x, y in zip(features.split(chunk), labels.split(chunk), strict=True):
        logits = grid(x)
        ranked = logits.topk(min(5, logits.shape[2]), dim=2).indices == y[None, :, None]  # [count, chunk, 5]
        right += torch.stack([ranked[:, :, 0].sum(dim=1), ranked.any(dim=2).sum(dim=1)])
    top1, top5 = 100 * right / len(labels)
    return top1, top5


def linear_probe(config: LinearProbeConfig) -> dict[str, Any]:
    """Computes features, linear probes and k-NN, and leaves the figures in the run folder's result.json."""
    opened = open_stage(config, config.init, untrained=config.untrained)
    accelerator, run_dir, spec = opened.accelerator, opened.run_dir, opened.spec
    if opened.val is None:
        raise InputError("data.val is not given: a probe is evaluated on shards of its own")
    num_classes = classes_of(opened.train, opened.val, None)
    torch.manual_seed(config.seed)
    encoder, report = encoder_with_weights(spec, opened.weights)
    encoder.eval().to(accelerator.device)
    choose_attention(encoder, accelerator.device, config.precision)
    normalize = Normalize(spec.mean, spec.std).to(accelerator.device)
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes)
        print(report, flush=True)
    crop = CenterCrop(encoder.img_size, config.data.crop_pct)
    tables = []
    for which, per_class in ((opened.train, config.data.samples_per_class), (opened.val, None)):
        order = FileOrder(labelled_subset(which.label, per_class, config.seed))
        refuse_damage(which)
        samples = opened.samples(which, order, crop)
        loading = {"batch_size": config.extract_batch_size, "num_workers": config.num_workers}
        surroundings = accelerator, run_dir / "features"
        tables.append(extract(encoder, normalize, samples, *surroundings, fetching=opened.fetching, **loading))
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        result = {"command": "linear_probe", "finished": True, "encoder": report}
        result |= probe_features(*tables, num_classes=num_classes, config=config, device=accelerator.device)
        write_json(run_dir / "result.json", result)
        print(_table(result, run_dir), flush=True)
    accelerator.end_training()
    return result


def probe_features(
    train: tuple[Features, Tensor],
    val: tuple[Features, Tensor],
    *,
    num_classes: int,
    config: LinearProbeConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Returns the accuracies in percent: the probe chosen on the held-out part, the best of each pooling, and k-NN."""
    (features, labels), (val_features, val_labels) = train, val
    labels, val_labels = labels.to(device), val_labels.to(device)
    is_held = torch.from_numpy(_held_out(len(labels), config)).to(device)
    probes: list[Probe] = []
    knn: dict[str, float] = {}
    for pool in features:
        x, y = features[pool].to(device), val_features[pool].to(device)
        grid = train_grid(
            x[~is_held], labels[~is_held], num_classes=num_classes, base_lrs=config.base_lrs, epochs=config.epochs,
            batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip
        held, _ = grid_accuracy(grid, x[is_held], labels[is_held])
        top1, top5 = grid_accuracy(grid, y, val_labels)
        rows = zip(config.base_lrs, held.tolist(), top1.tolist(), top5.tolist(), strict=True)
        probes += [Probe(pool, *row) for row in rows]
        for k in config.neighbors:
            found = knn_predictions(x, labels, y, neighbors=k, num_classes=num_classes, temperature=config.temperature)
            knn[f"{pool}_k{k}"] = 100 * float((found == val_labels).float().mean())
    best = max(probes, key=lambda probe: probe.holdout_top1)
    by_pool = {p: max((x for x in probes if x.pool == p), key=lambda x: x.holdout_top1)._asdict() for p in features}
    return {
        "linear_top1": best.val_top1,
        "linear_top5": best.val_top5,
        "chosen": best._asdict(),
        "best_by_pool": by_pool,
        "knn_top1": knn,
        "train_images": len(labels),
        "val_images": len(val_labels),
        "all_probes": [probe._asdict() for probe in probes],
    }


def _held_out(count: int, config: LinearProbeConfig) -> np.ndarray:
    """Returns True for a random `holdout_share` of the training features."""
    held = round(count * config.holdout_share)
    if not 0 < held < count - 1 or config.batch_size < 2:  # normalization over a batch needs two features
        raise InputError(
            f"holdout_share {config.holdout_share} of {count} images holds out {held} and leaves {count - held}, in "
            f"batches of {config.batch_size}: hold out at least 1, train on at least 2"
        )
    order = np.argsort(hashes(config.seed, "probe holdout", np.arange(count), 1)[:, 0], kind="stable")
    is_held = np.zeros(count, bool)
    is_held[order[:held]] = True
    return is_held


def _table(result: dict[str, Any], run_dir: Path) -> str:
    lines = [f"linear probe, {result['train_images']} images to train on, {result['val_images']} to report on:"]
    for pool, probe in result["best_by_pool"].items():
        mark = "  <- chosen" if pool == result["chosen"]["pool"] else ""
        lines.append(
            f"  {pool:5}  top-1 {probe['val_top1']:6.2f} %  top-5 {probe['val_top5']:6.2f} %  "
            f"(base_lr {probe['base_lr']:g}, held-out {probe['holdout_top1']:.2f} %){mark}"
        )
    lines.append("k-NN:")
    lines += [f"  {name:10}  top-1 {value:6.2f} %" for name, value in result["knn_top1"].items()]
    return "\n".join([*lines, f"done: {run_dir / 'result.json'}"])
