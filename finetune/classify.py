"""The fine-tuning stage: a classifier on top of an encoder, trained by the same loop as pretraining."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from quarterlight.ssl.augment import CenterCrop, Normalize, random_crop
from quarterlight.ssl.batches import Batch, refuse_unlabelled
from quarterlight.ssl.checkpoint import state_folders
from quarterlight.ssl.config import DataConfig, steps_in
from quarterlight.ssl.engine import train
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import (
    CLASSIFIER_EMA_FILE,
    CLASSIFIER_FILE,
    ModelSpec,
    export_hub,
    export_weights,
    run_facts,
)
from quarterlight.ssl.index import ShardIndex, class_names
from quarterlight.ssl.log import RunLog
from quarterlight.ssl.optim import build_adamw, build_schedule
from quarterlight.ssl.order import labelled_subset
from quarterlight.ssl.patches import pair
from quarterlight.ssl.processes import micro_batch_size, until_stopped
from quarterlight.ssl.recompute import checkpoint_blocks, transformer_blocks
from quarterlight.ssl.runs import write_result, write_run_files
from quarterlight.ssl.sharding import Whole, block_names
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.stage import Opened, open_stage
from quarterlight.ssl.task import Figures, Hooks, Task

from .config import FinetuneConfig
from .confusion import named_classes, write_evaluation
from .duplicates import warn_of_shared
from .eval_only import evaluate_only
from .evaluate import loader_of_all, outcomes
from .heads import build_classifier, layer_decay_groups
from .mixing import MixedLoss, class_weights_for
from .partial import freeze

MOST_GAPS = 10  # times as many classes as there are labels: beyond it a label is a mistake, and the head too large
BEST_FILE = "classifier_best.safetensors"


class ClassifierTask(Task):
    """What the engine trains: normalization, mixing, the classifier and its loss."""

    def __init__(self, classifier: Any, normalize: Normalize, mixed_loss: MixedLoss) -> None:
        super().__init__()
        self.classifier = classifier
        self.normalize = normalize
        self.mixed_loss = mixed_loss
        kinds = {type(block) for block in transformer_blocks(classifier)}
        self._no_split_modules = block_names(self, kinds)  # accelerate's name for what it shards one by one

    @property
    def network(self) -> nn.Module:
        """The classifier."""
        return self.classifier

    def forward(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Returns the training loss of a batch."""
        return self.mixed_loss(self.classifier, self.normalize(batch.images), batch.labels), {}


def finetune(config: FinetuneConfig) -> Figures:
    """Runs fine-tuning to its end and leaves the last and the best classifier and the figures in the run folder."""
    if config.eval_only:
        return evaluate_only(config)
    if config.data.train is None:
        raise InputError("data.train is not given: name the shards to train on, or evaluate only with --eval_only")
    if config.data.crop_pct is None:
        config = replace(config, data=replace(config.data, crop_pct=DataConfig.crop_pct))
    opened = open_stage(config, config.init, untrained=config.untrained)
    accelerator, run_dir = opened.accelerator, opened.run_dir
    if opened.val is None:
        raise InputError("data.val is not given: a classifier is evaluated on shards of its own")
    micro = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    num_classes = classes_of(opened.train, opened.val, config.num_classes)
    ids = labelled_subset(opened.train.label, config.data.samples_per_class, config.seed)
    task, spec, report = _build_task(config, opened, num_classes, micro, opened.train.label[ids])
    crop = random_crop(config.data, pair(task.classifier.patch_embed.img_size))
    order = opened.training_order(ids, config.batch_size, balanced=config.data.balanced)
    samples = opened.samples(opened.train, order, crop)
    length = {"samples": len(order), "batch_size": config.batch_size}
    total_steps = steps_in("the run", config.steps, config.epochs, **length)
    schedule = build_schedule(config.optim, total_steps=total_steps, **length)
    if config.grad_checkpointing:
        checkpoint_blocks(task.classifier)
    whole = Whole(task, accelerator, config.ema_decay)
    optimizer = build_adamw(layer_decay_groups(task.classifier, config.optim), config.optim)
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes, train_samples=len(ids))
        if not state_folders(run_dir):  # what a run that never saved a state has left is of other weights
            (run_dir / BEST_FILE).unlink(missing_ok=True)
        warn_of_shared(opened.train, ids, opened.val, wanted=config.check_duplicates and not state_folders(run_dir))
        print(f"{report}\n{len(ids)} images of {task.classifier.num_classes} classes, ", end="")
        print(f"{total_steps} steps of {config.batch_size}", flush=True)
    hooks = _hooks(config, opened, opened.val, whole, spec, micro, total_steps, len(order))
    figures = train(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir)
    if accelerator.is_main_process:
        best = _best_so_far(run_dir)
        write_result(run_dir, "finetune", finished=True, steps=total_steps, best_val_top1=best, **figures)
        print(
            f"done: val top-1 {figures['val_top1']:.2f} % (best {best:.2f} %), {run_dir / CLASSIFIER_FILE}", flush=True
        )
    accelerator.end_training()
    return figures


def _build_task(
    config: FinetuneConfig, opened: Opened, num_classes: int, micro: int, labels: Int[np.ndarray, " n"]
) -> tuple[ClassifierTask, ModelSpec, str]:
    """Returns the task, the spec that builds its classifier again, and sentences on what is loaded and what learns."""
    if config.class_weights == "balanced" and config.data.balanced:
        raise InputError("class_weights balanced and data.balanced each make up for classes of unequal size: give one")
    weights = class_weights_for(config.class_weights, labels, num_classes)
    torch.manual_seed(config.seed)
    classifier, spec, report = build_classifier(
        opened.spec, opened.weights, num_classes=num_classes, pool=config.pool, drop_path=config.drop_path
    )
    if said := freeze(classifier, config.trainable_blocks):
        report += f"\n{said}"
    mixed_loss = MixedLoss(config.mixing, num_classes=num_classes, batch_size=micro, class_weights=weights)
    return ClassifierTask(classifier, Normalize(spec.mean, spec.std), mixed_loss), spec, report


def _hooks(
    config: FinetuneConfig,
    opened: Opened,
    val: ShardIndex,
    whole: Whole[ClassifierTask],
    spec: ModelSpec,
    micro: int,
    total_steps: int,
    train_images: int,
) -> Hooks:
    """Returns what fine-tuning adds to the loop: evaluation, keeping the best classifier, and the release."""
    accelerator, run_dir = opened.accelerator, opened.run_dir
    task, classifier = whole.module, whole.module.classifier
    crop = CenterCrop(pair(classifier.patch_embed.img_size), config.data.crop_pct)
    loader = loader_of_all(opened, val, crop, micro, persistent=True)
    names = class_names(opened.train)
    told = {} if names is None or len(names) != classifier.num_classes else {"class_names": names}

    def measure(step: int, log: RunLog, signals: StopSignals) -> Figures:
        networks = {"val": classifier}
        if whole.average is not None:
            networks["val_ema"] = whole.average.classifier
        batches = until_stopped(loader, signals, accelerator)
        judged = outcomes(
            [nn.Sequential(task.normalize, network) for network in networks.values()], batches, accelerator
        )
        found = dict(zip(networks, judged, strict=True))
        figures = {f"{which}_{name}": x for which, seen in found.items() for name, x in seen.figures().items()}
        figures.pop("val_ema_images", None)  # the same
        log.metrics(step, figures)
        if not accelerator.is_main_process:
            return figures
        best = max(networks, key=lambda which: figures[f"{which}_top1"])
        if (top1 := figures[f"{best}_top1"]) > _best_so_far(run_dir):
            facts = run_facts("fine-tuning", {"step": step, "samples_seen": step * config.batch_size}, config.seed)
            facts |= figures | told | {"best_val_top1": top1, "averaged": best == "val_ema"}
            export_weights(run_dir / BEST_FILE, networks[best], spec, facts)
        if step == total_steps:
            for which, seen in found.items():
                suffix = which.removeprefix("val")
                write_evaluation(run_dir, seen, named_classes(names, classifier.num_classes), which=suffix)
        return figures

    def export(progress: dict[str, Any]) -> None:
        facts = run_facts("fine-tuning", progress, config.seed) | progress["figures"]
        export_weights(run_dir / CLASSIFIER_FILE, classifier, spec, facts | told)
        if whole.average is not None:
            average_facts = facts | told | {"ema_decay": config.ema_decay}
            export_weights(run_dir / CLASSIFIER_EMA_FILE, whole.average.classifier, spec, average_facts)
        if progress["step"] == total_steps:
            title, crop_pct = f"{spec.name}, fine-tuned", crop.crop_pct
            export_hub(run_dir / "hub", classifier, spec, title=title, facts=facts, labels=names, crop_pct=crop_pct)

    an_epoch = -(-train_images // config.batch_size)
    every = an_epoch if config.evaluate_every_steps is None else config.evaluate_every_steps
    return Hooks("finetune", measure, every, export, whole, opened.fetching)


def classes_of(train: ShardIndex, val: ShardIndex, num_classes: int | None) -> int:
    """Returns the number of classes: as given, as dataset.json says, or the largest label + 1.

    Raises InputError when a sample has no label or a label that is too large.
    """
    for index, where in ((train, "data.train"), (val, "data.val")):
        refuse_unlabelled(index.label, where, index.label_defects())
    largest = int(max(train.label.max(), val.label.max()))
    names = class_names(train)
    count = num_classes or (len(names) if names else largest + 1)
    distinct = len(np.unique(np.concatenate([train.label, val.label])))
    if num_classes is None and not names and largest >= MOST_GAPS * max(distinct, MOST_GAPS):
        raise InputError(
            f"there are labels up to {largest}, but only {distinct} different ones: give num_classes {largest + 1} if "
            "that is right, or mend the labels"
        )
    if largest >= count:
        raise InputError(
            f"there are labels up to {largest}, but num_classes is {count}: give num_classes {largest + 1}"
        )
    return count


def _best_so_far(run_dir: Path) -> float:
    """Returns the val top-1 of the best classifier on disk, of the weights or of their average.

    Its file is the record, so that no other can disagree.
    """
    if not (run_dir / BEST_FILE).exists():
        return -1.0
    with safe_open(run_dir / BEST_FILE, framework="pt") as file:
        facts = file.metadata()
        return float(json.loads(facts.get("best_val_top1", facts["val_top1"])))
