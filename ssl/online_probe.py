"""How well the encoder's features tell classes apart, measured while it is being pretrained.

Every so many steps the encoder runs on whole images of a labelled set, in eval mode and without gradients; k-NN and a
linear classifier in closed form (ridge.py) say how far it has come. Nothing is trained by gradients, nothing is kept
from one time to the next, and every step of a run reseeds: a run with probes computes the same bits as one without.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from .augment import CenterCrop
from .config import PretrainConfig, ProbeConfig
from .encoder import Encoder
from .errors import InputError
from .fetching import remote_shards
from .index import ShardIndex, open_index
from .knn import nearest, vote
from .loader import Loader, build_loader
from .log import RunLog
from .order import FileOrder
from .pooling import pooled
from .processes import until_stopped
from .randoms import hashes
from .ridge import fit_ridge
from .sharding import Whole
from .signals import StopSignals
from .small_images import find_small_images
from .spans import EvalSpans
from .stage import Opened, cache_folder
from .task import Figures

MOST_IMAGES = 256  # in one forward pass of one process

Prepared = Callable[[Encoder], Encoder]  # gives an encoder as it is released


class OnlineProbe:
    """k-NN and a linear classifier on features of the encoder, at any step of its pretraining."""

    def __init__(
        self, opened: Opened, config: PretrainConfig, whole: Whole[Any], prepared: Prepared, *, micro_batch_size: int
    ) -> None:
        """Opens the two labelled sets. Raises InputError when there are none."""
        self.config, self.whole, self.prepared = config.probe, whole, prepared
        self.accelerator: Accelerator = opened.accelerator
        train, val = _labelled_sets(opened, config.probe)
        ids = [_drawn(x, config.probe.images, config.seed, name) for x, name in ((train, "train"), (val, "val"))]
        if (fewest := min(map(len, ids))) < self.accelerator.num_processes:
            raise InputError(
                f"probe.images: there are {fewest} labelled images in a set, and {self.accelerator.num_processes} "
                "processes to share them: give more images, or probe.every_steps 0"
            )
        self.num_classes = 1 + int(max(x.label[chosen].max() for x, chosen in zip((train, val), ids, strict=True)))
        crop = CenterCrop(whole.module.autoencoder.encoder.img_size, config.data.crop_pct)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes

        self.spans = [
            EvalSpans(len(x), batch_size=min(micro_batch_size, MOST_IMAGES), rank=rank, world_size=world_size)
            for x in ids
        ]
        self.train, self.val = (
            build_loader(
                opened.samples(index, FileOrder(chosen), crop),
                spans,
                num_workers=config.num_workers,
                fetching=opened.fetching,
            )
            for index, chosen, spans in zip((train, val), ids, self.spans, strict=True)
        )
        self.images = len(ids[0]) + len(ids[1])

    def measure(self, step: int, log: RunLog, signals: StopSignals) -> Figures:
        """Returns top-1 in percent by feature and classifier; all processes call it. Raises Stopped.

        Such as probe_knn_avg, and probe_ema_knn_avg of the moving average; and probe_s, the seconds that it took.
        """
        began_at, figures = time.perf_counter(), {}
        of = {"probe": self.whole.module}
        if self.whole.average is not None:
            of["probe_ema"] = self.whole.average
        for prefix, task in of.items():
            found = self._accuracies(task.autoencoder.encoder, task.normalize, signals)
            figures |= {f"{prefix}_{name}": value for name, value in found.items()}
        figures["probe_s"] = time.perf_counter() - began_at
        log.metrics(step, figures)
        return figures

    @torch.no_grad()
    def _accuracies(self, encoder: Encoder, normalize: Any, signals: StopSignals) -> Figures:
        was_training, prepared = encoder.training, self.prepared(encoder)
        prepared.eval()
        try:
            train, val = (self._features(prepared, normalize, x, signals) for x in (self.train, self.val))
        finally:
            encoder.train(was_training)
        bank = {name: self._gathered(x, self.spans[0]) for name, x in train.items()}
        labels, truth, figures = bank.pop("labels"), val.pop("labels"), {}
        for name, queries in val.items():
            similarity, places = nearest(bank[name], queries, self.config.neighbors)
            votes = {"num_classes": self.num_classes, "temperature": self.config.temperature}
            figures[f"knn_{name}"] = self._share(vote(similarity, labels[places], **votes) == truth)
            ridge = fit_ridge(bank[name], labels, num_classes=self.num_classes)
            figures[f"linear_{name}"] = self._share(ridge.predict(queries) == truth)
        return figures

    def _features(self, encoder: Encoder, normalize: Any, loader: Loader, signals: StopSignals) -> dict[str, Tensor]:
        """Returns features and labels of this process's part, on the device."""
        device = self.accelerator.device
        parts: list[dict[str, Tensor]] = []
        for batch in until_stopped(loader, signals, self.accelerator):
            images = normalize(batch.images.to(device, non_blocking=True))
            with self.accelerator.autocast():
                tokens = encoder(images)
            parts.append(pooled(tokens, encoder) | {"labels": batch.labels.to(device)})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _gathered(self, mine: Tensor, spans: EvalSpans) -> Tensor:
        """Returns the rows of all processes, in their order."""
        world_size = self.accelerator.num_processes
        if world_size == 1:
            return mine
        others = [spans.of_rank(rank) for rank in range(world_size)]
        counts = [other.last - other.first for other in others]
        padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        padded[: len(mine)] = mine
        rows: Any = self.accelerator.gather(padded)
        return torch.cat([part[:count] for part, count in zip(rows.split(max(counts)), counts, strict=True)])

    def _share(self, right: Tensor) -> float:
        """Returns how many of all processes' values are true, in percent."""
        sums = torch.stack([right.sum(), torch.tensor(len(right), device=right.device)]).float()
        total: Any = self.accelerator.reduce(sums, reduction="sum")
        return 100 * float(total[0] / total[1])


def _labelled_sets(opened: Opened, config: ProbeConfig) -> tuple[ShardIndex, ShardIndex]:
    """Returns the sets to fit to and to report on. Raises InputError when there is none, or it cannot be read here."""
    data = opened.config.data
    if config.val is None and opened.val is None:
        raise InputError("probe.every_steps is given, and nothing to report on: give data.val or probe.val")
    with opened.accelerator.local_main_process_first():  # the first process writes the index, the others read it
        train, val = (
            open_index(pattern, cache_dir=cache_folder(data)) if pattern is not None else known
            for pattern, known in ((config.train, opened.train), (config.val, opened.val))
        )
        assert train is not None and val is not None
        for index in (train, val):
            if id(index) not in opened.small:
                opened.small[id(index)] = find_small_images(index, data.in_chans, cache_folder(data))
    in_use = {opened.train.paths[shard] for shard in remote_shards(opened.train)}
    if any(in_use & {index.paths[shard] for shard in remote_shards(index)} for index in (train, val)):
        raise InputError(
            "probe.train: the shards of data.train are remote, and are fetched for training alone: give probe.train "
            "(and data.val or probe.val) other shards, best on a local disk"
        )
    known = [index for index in (opened.train, opened.val) if index is not None]
    new = [index for index in (train, val) if all(index is not other for other in known)]
    opened.fetching.share([*known, *new])
    for index in new:
        opened.fetching.follow(index)
    return train, val


def _drawn(index: ShardIndex, count: int, seed: int, name: str) -> Int[np.ndarray, " n"]:
    """Returns up to `count` labelled samples, drawn by the seed, in the order in which they lie in the shards."""
    (labelled,) = np.nonzero(index.label >= 0)
    if not len(labelled):
        raise InputError(
            f"probe.{name}: no sample has a label (no .cls or .json with a class number in the shards), and a probe "
            "needs classes: give labelled shards, or probe.every_steps 0"
        )
    rank = hashes(seed, f"probe {name}", labelled, 1)[:, 0]
    return np.sort(labelled[np.argsort(rank, kind="stable")[:count]])
