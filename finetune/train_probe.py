"""The stage that trains a head on a frozen encoder over random crops, by the loop of all stages: MAE's protocol."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from quarterlight.ssl.augment import CenterCrop, Normalize, random_crop
from quarterlight.ssl.batches import Batch
from quarterlight.ssl.checkpoint import state_folders
from quarterlight.ssl.config import steps_in
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.engine import train
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import CLASSIFIER_FILE, ModelSpec, export_weights, run_facts
from quarterlight.ssl.index import ShardIndex, class_names
from quarterlight.ssl.log import RunLog
from quarterlight.ssl.optim import build_schedule
from quarterlight.ssl.order import labelled_subset
from quarterlight.ssl.processes import micro_batch_size, until_stopped
from quarterlight.ssl.runs import write_result, write_run_files
from quarterlight.ssl.sharding import Whole, is_sharded
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.stage import Opened, open_stage
from quarterlight.ssl.task import Figures, Hooks, Task

from .classify import classes_of
from .duplicates import warn_of_shared
from .evaluate import evaluate, loader_of_all
from .features import digest_of, open_encoder
from .frozen import FrozenClassifier, build_head, fold
from .intervals import wilson
from .lars import build_head_optimizer
from .probe_config import TrainProbeConfig


class ProbeTask(Task):
    """What the engine trains: the head on the frozen encoder.

    As in MAE batch norm sees the images that one process passes at once, so that micro_batch_size and the number of
    processes change the result a little. Differs from MAE: what it has measured is the main process's in every
    evaluation, as it is in the state and in the released weights, where there each process evaluates with its own.
    """

    def __init__(self, classifier: FrozenClassifier, normalize: Normalize) -> None:
        super().__init__()
        self.classifier = classifier
        self.normalize = normalize

    @property
    def network(self) -> Encoder:  # type: ignore[override]
        """The encoder, which takes nearly all of the time."""
        return self.classifier.encoder

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the mean cross-entropy of a batch, and the share of it that is right, in percent."""
        logits = self.classifier(self.normalize(batch.images)).float()
        right = 100 * (logits.argmax(dim=1) == batch.labels).float().mean()
        return nn.functional.cross_entropy(logits, batch.labels), {"train_top1": right}


def train_probe(config: TrainProbeConfig) -> Figures:
    """Trains a head to the end and leaves a timm classifier, encoder and head, and its figures in the run folder."""
    for name, value in (("ema_decay", config.ema_decay), ("grad_checkpointing", config.grad_checkpointing or None)):
        if value is not None:
            raise InputError(f"{name} {value}: only a head is trained here; leave it at its default")
    opened = open_stage(config, config.init, untrained=config.untrained)
    accelerator, run_dir = opened.accelerator, opened.run_dir
    if opened.val is None:
        raise InputError("data.val is not given: a probe is evaluated on shards of its own")
    if is_sharded(accelerator):
        raise InputError("FSDP divides what is trained, and a probe trains a head only: start it without FSDP")
    num_classes = classes_of(opened.train, opened.val, config.num_classes)
    micro = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    if config.head == "linear" and micro < 2:
        raise InputError("batch norm needs two images in a forward pass: raise batch_size or micro_batch_size")
    frozen = open_encoder(opened)
    torch.manual_seed(config.seed)
    head, pool, built = build_head(config, frozen.encoder, opened.spec, num_classes)
    digest = digest_of(frozen.encoder, frozen.normalize)
    task = ProbeTask(FrozenClassifier(frozen.encoder, head, pool, digest), frozen.normalize)
    ids = labelled_subset(opened.train.label, config.data.samples_per_class, config.seed)
    order = opened.training_order(ids, config.batch_size)
    crop = replace(random_crop(config.data, frozen.encoder.img_size), clip=True)  # as MAE's util/crop.py
    samples = opened.samples(opened.train, order, crop)
    length = {"samples": len(order), "batch_size": config.batch_size}
    total_steps = steps_in("the run", config.steps, config.epochs, **length)
    schedule = build_schedule(config.optim, total_steps=total_steps, **length)
    whole = Whole(task, accelerator)
    optimizer = build_head_optimizer(head, config.optim)
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes, train_samples=len(ids))
        if not state_folders(run_dir):  # what a run that never saved a state has left is of other weights
            (run_dir / CLASSIFIER_FILE).unlink(missing_ok=True)
        warn_of_shared(opened.train, ids, opened.val, wanted=config.check_duplicates and not state_folders(run_dir))
        print(f"{frozen.report}\n{len(ids)} images of {num_classes} classes, ", end="")
        print(f"{total_steps} steps of {config.batch_size}", flush=True)
    hooks = _hooks(config, opened, opened.val, whole, built, micro, len(order))
    figures = train(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir)
    if accelerator.is_main_process:
        images = int(figures["val_images"])
        interval = wilson(figures["val_top1"] / 100 * images, images)
        write_result(
            run_dir, "train_probe", finished=True, steps=total_steps, **(figures | {"val_top1_interval": interval})
        )
        said = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
        print(f"done: val top-1 {figures['val_top1']:.2f} % ({said}), {run_dir / CLASSIFIER_FILE}", flush=True)
    accelerator.end_training()
    return figures


def _hooks(
    config: TrainProbeConfig,
    opened: Opened,
    val: ShardIndex,
    whole: Whole[ProbeTask],
    spec: ModelSpec,
    micro: int,
    train_images: int,
) -> Hooks:
    """Returns what a probe adds to the loop: evaluation, and the release."""
    accelerator, task = opened.accelerator, whole.module
    crop = CenterCrop(task.classifier.encoder.img_size, config.data.crop_pct)
    loader = loader_of_all(opened, val, crop, micro, persistent=True)
    names = class_names(opened.train)
    told: dict[str, Any] = {} if names is None or len(names) != spec.args["num_classes"] else {"class_names": names}

    def measure(step: int, log: RunLog, signals: StopSignals) -> Figures:
        if accelerator.num_processes > 1:  # DDP does so at the next step; here all are to see what is saved
            for buffer in task.buffers():
                dist.broadcast(buffer, src=0)
        batches = until_stopped(loader, signals, accelerator)
        found = evaluate(nn.Sequential(task.normalize, task.classifier), batches, accelerator)
        figures = {f"val_{name}": value for name, value in found.items()}
        log.metrics(step, figures)
        return figures

    def export(progress: dict[str, Any]) -> None:
        facts = run_facts("probing", progress, config.seed) | progress["figures"] | told
        export_weights(opened.run_dir / CLASSIFIER_FILE, fold(task.classifier, spec), spec, facts)

    an_epoch = -(-train_images // config.batch_size)
    every = an_epoch if config.evaluate_every_steps is None else config.evaluate_every_steps
    return Hooks("train_probe", measure, every, export, whole, opened.fetching)
