"""The linear-probe stage: linear classifiers of many kinds in one pass over cached features, and k-NN."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.errors import InputError, Stopped
from quarterlight.ssl.index import ShardIndex, refuse_damage
from quarterlight.ssl.knn import nearest, vote
from quarterlight.ssl.order import FileOrder, labelled_subset
from quarterlight.ssl.pooling import Features
from quarterlight.ssl.processes import any_process
from quarterlight.ssl.randoms import hashes
from quarterlight.ssl.runs import write_result, write_run_files
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.stage import Opened, open_stage
from quarterlight.ssl.watch import alive

from .classify import classes_of
from .config import LinearProbeConfig
from .duplicates import warn_of_shared
from .features import FeatureTable, FrozenEncoder, extract_table, feature_names, open_encoder
from .intervals import wilson
from .probe_grid import Columns, View, grid_accuracy, inputs_of, train_grids
from .stopping import stoppable

Labelled = tuple[Features, Int[Tensor, " _"]]  # features and class numbers of images


class Probe(NamedTuple):
    """One trained linear classifier."""

    input: str  # what it looks at: a key of `inputs_of`
    batch_norm: bool
    base_lr: float
    holdout_top1: float  # percent, what it is chosen by
    val_top1: float
    val_top5: float


def linear_probe(config: LinearProbeConfig) -> dict[str, Any]:
    """Computes features, linear probes and k-NN, and leaves the figures in the run folder's result.json.

    Raises Stopped when any process gets a signal: features that are computed stay, and the same command goes on.
    """
    opened = open_stage(config, config.init, untrained=config.untrained)
    accelerator, run_dir = opened.accelerator, opened.run_dir
    if opened.val is None:
        raise InputError("data.val is not given: a probe is evaluated on shards of its own")
    num_classes = classes_of(opened.train, opened.val, None)
    frozen = open_encoder(opened)
    ids = labelled_subset(opened.train.label, config.data.samples_per_class, config.seed)
    _views_of(feature_names(frozen.encoder), config)  # both refuse what would be refused behind the extraction only
    _held_out(len(ids), config)
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes)
        print(frozen.report, flush=True)
        warn_of_shared(opened.train, ids, opened.val, wanted=config.check_duplicates)
    sets = ((opened.train, ids), (opened.val, np.arange(len(opened.val))))

    def leave(signals: StopSignals) -> None:
        write_result(run_dir, "linear_probe", finished=False, preempted=True, signal=signals.received)
        print(f"stopped: {run_dir / 'features'} keeps what is computed, the same command goes on", flush=True)

    with stoppable(accelerator, leave, config.stall_timeout_s) as signals:
        train, val = (_table(opened, frozen, config, *which, signals) for which in sets)
        found = probe_tables(train, val, num_classes, config, accelerator, pausing(signals, accelerator))
    if accelerator.is_main_process:
        write_result(run_dir, "linear_probe", finished=True, encoder=frozen.report, **found)
        print(_printed(found, run_dir), flush=True)
    accelerator.end_training()
    return {"command": "linear_probe", "finished": True, "encoder": frozen.report, **found}


def pausing(signals: StopSignals, accelerator: Accelerator) -> Callable[[], None]:
    """Returns what long work calls now and then, on all processes alike; it raises Stopped when one got a signal."""

    def pause() -> None:
        alive()
        if any_process(signals.received is not None, accelerator):
            raise Stopped("stopped by a signal")

    return pause


def _table(
    opened: Opened,
    frozen: FrozenEncoder,
    config: LinearProbeConfig,
    index: ShardIndex,
    ids: Int[np.ndarray, " n"],
    signals: StopSignals,
) -> FeatureTable:
    refuse_damage(index)
    crop = CenterCrop(frozen.encoder.img_size, config.data.crop_pct)
    return extract_table(
        frozen.encoder,
        frozen.normalize,
        opened.samples(index, FileOrder(ids), crop),
        opened.accelerator,
        opened.run_dir / "features",
        layers=any(name.startswith("last4") for name in config.inputs),
        dtype=config.feature_dtype,
        batch_size=config.extract_batch_size,
        num_workers=config.num_workers,
        fetching=opened.fetching,
        signals=signals,
    )


def probe_tables(
    train: FeatureTable,
    val: FeatureTable,
    num_classes: int,
    config: LinearProbeConfig,
    accelerator: Accelerator,
    pause: Callable[[], None],
) -> dict[str, Any]:
    """Returns `probe_features` of two tables; each process reads only the features that it needs."""
    mine = _views_of(train.names, config)[accelerator.process_index :: accelerator.num_processes]
    inputs = inputs_of(train.names)
    needed = {name for view in mine for name in inputs[view.input]}
    names = [name for name in train.names if name in needed | {"avg", "token"}]
    sides = ((train.load(names), train.labels()), (val.load(names), val.labels()))
    return probe_features(
        *sides, views=mine, num_classes=num_classes, config=config, accelerator=accelerator, pause=pause
    )


def _views_of(names: list[str], config: LinearProbeConfig) -> list[View]:
    """Returns what is looked at, widest first, so that processes which take turns get about the same work."""
    inputs = inputs_of(names)
    wanted = [name for name in inputs if name in config.inputs]
    if not wanted:
        raise InputError(f"inputs {list(config.inputs)}: this encoder has only {', '.join(inputs)}")
    widest_first = sorted(wanted, key=lambda name: len(inputs[name]), reverse=True)
    return [View(name, bool(norm)) for name in widest_first for norm in dict.fromkeys(config.batch_norm)]


def probe_features(
    train: Labelled,
    val: Labelled,
    *,
    views: list[View],
    num_classes: int,
    config: LinearProbeConfig,
    accelerator: Accelerator,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Returns the accuracies in percent: the probe chosen on the held-out part, the best of each input, and k-NN.

    This process trains `views`, others theirs; all get all figures. Intervals are Wilson's, of 95 %.
    """
    (features, labels), (val_features, val_labels) = train, val
    held, rest = _held_out(len(labels), config)
    inputs = {view: inputs_of(list(features))[view.input] for view in views}
    columns, val_columns = Columns(features, accelerator.device), Columns(val_features, accelerator.device)
    grids = train_grids(
        columns, labels, rest, inputs, num_classes=num_classes, base_lrs=config.base_lrs, epochs=config.epochs,
        batch_size=config.batch_size, seed=config.seed, weight_decay=config.weight_decay, pause=pause,
    )  # fmt: skip
    mine: list[Probe] = []
    for view, grid in grids.items():
        held_top1, _ = grid_accuracy(grid, inputs[view], columns, labels, held)
        top1, top5 = grid_accuracy(grid, inputs[view], val_columns, val_labels, np.arange(len(val_labels)))
        rows = zip(config.base_lrs, held_top1.tolist(), top1.tolist(), top5.tolist(), strict=True)
        mine += [Probe(*view, *row) for row in rows]
    del grids, columns, val_columns
    probes = sorted(gather_object(mine))
    knn = knn_accuracy(train, val, num_classes=num_classes, config=config, accelerator=accelerator, pause=pause)
    best = max(probes, key=lambda probe: probe.holdout_top1)
    names = dict.fromkeys(probe.input for probe in probes)
    by_input = {n: max((x for x in probes if x.input == n), key=lambda x: x.holdout_top1)._asdict() for n in names}
    count = len(val_labels)
    return {
        "linear_top1": best.val_top1,
        "linear_top5": best.val_top5,
        "linear_top1_interval": wilson(best.val_top1 / 100 * count, count),
        "chosen": best._asdict(),
        "best_by_input": by_input,
        "knn_top1": knn,
        "knn_top1_interval": {name: wilson(value / 100 * count, count) for name, value in knn.items()},
        "train_images": len(labels),
        "val_images": count,
        "all_probes": [probe._asdict() for probe in probes],
    }


def knn_accuracy(
    train: Labelled,
    val: Labelled,
    *,
    num_classes: int,
    config: LinearProbeConfig,
    accelerator: Accelerator,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the top-1 of k-NN in percent, by feature and k, such as "avg_k10"; processes share the queries."""
    (features, labels), (val_features, val_labels) = train, val
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    found: dict[str, float] = {}
    for name in [name for name in ("avg", "token") if name in features]:
        pause()
        mine, truth = val_features[name][rank::world_size], val_labels[rank::world_size]
        similarity, places = nearest(features[name], mine, max(config.neighbors), device=device)
        for k in config.neighbors:
            votes = labels[places[:, :k]]
            said = vote(similarity[:, :k], votes, num_classes=num_classes, temperature=config.temperature)
            right: Any = accelerator.reduce((said == truth).sum().double().to(device), reduction="sum")
            found[f"{name}_k{k}"] = 100 * float(right) / len(val_labels)
    return found


def _held_out(count: int, config: LinearProbeConfig) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " rest"]]:
    """Returns the places of a random `holdout_share` of the training features, and of the others."""
    held = round(count * config.holdout_share)
    if not 0 < held < count - 1 or config.batch_size < 2:  # normalization over a batch needs two features
        raise InputError(
            f"holdout_share {config.holdout_share} of {count} images holds out {held} and leaves {count - held}, in "
            f"batches of {config.batch_size}: hold out at least 1, train on at least 2"
        )
    order = np.argsort(hashes(config.seed, "probe holdout", np.arange(count), 1)[:, 0], kind="stable")
    return np.sort(order[:held]), np.sort(order[held:])


def _printed(result: dict[str, Any], run_dir: Path) -> str:
    lines = [f"linear probe, {result['train_images']} images to train on, {result['val_images']} to report on:"]
    for name, probe in result["best_by_input"].items():
        mark = "  <- chosen" if name == result["chosen"]["input"] else ""
        lines.append(
            f"  {name:9}  top-1 {probe['val_top1']:6.2f} %  top-5 {probe['val_top5']:6.2f} %  "
            f"(base_lr {probe['base_lr']:g}, {'with' if probe['batch_norm'] else 'without'} batch norm, "
            f"held-out {probe['holdout_top1']:.2f} %){mark}"
        )
    low, high = result["linear_top1_interval"]
    lines.append(f"  chosen: {result['linear_top1']:.2f} %, 95 % interval {low:.2f} to {high:.2f}")
    lines.append("k-NN:")
    for name, value in result["knn_top1"].items():
        low, high = result["knn_top1_interval"][name]
        lines.append(f"  {name:10}  top-1 {value:6.2f} %  ({low:.2f} to {high:.2f})")
    return "\n".join([*lines, f"done: {run_dir / 'result.json'}"])
