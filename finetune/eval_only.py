"""A classifier as it is, measured as papers do: one central crop of every image of data.val."""

import dataclasses
from typing import Any

from torch import nn

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.batches import refuse_unlabelled
from quarterlight.ssl.errors import InputError, printable
from quarterlight.ssl.index import ShardIndex, class_names, refuse_damage
from quarterlight.ssl.patches import pair
from quarterlight.ssl.processes import until_stopped
from quarterlight.ssl.released import Weights, read_weights
from quarterlight.ssl.runs import write_result, write_run_files
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.stage import open_stage
from quarterlight.ssl.task import Figures

from .config import FinetuneConfig
from .confusion import named_classes, write_evaluation
from .evaluate import loader_of_all, outcomes
from .heads import load_classifier
from .network import own_crop_pct
from .stopping import stoppable

USUAL_SIDE = 224  # pixels, above which papers show the whole shorter side


def evaluate_only(config: FinetuneConfig) -> Figures:
    """Measures the classifier that `init` names on data.val, and leaves the figures in the run folder.

    Raises InputError when there is no classifier, or one of other classes than the labels.
    """
    if config.data.val is None or config.init in (None, "none"):
        missing = "data.val" if config.data.val is None else "init"
        raise InputError(f"{missing} is not given: eval_only evaluates the classifier that init names on data.val")
    weights = read_weights(config.init)
    config = as_the_weights_say(config, weights)
    # The shards to evaluate on stand where a stage opens those to train on: there are no others.
    data = dataclasses.replace(config.data, train=config.data.val, val=None, train_weights=None)
    opened = open_stage(dataclasses.replace(config, data=data), config.init, weights=weights)
    val, accelerator = opened.train, opened.accelerator
    assert opened.weights is not None
    refuse_damage(val)
    refuse_unlabelled(val.label, "data.val", val.label_defects())
    classifier, spec, report = load_classifier(opened.spec, opened.weights)
    if (largest := int(val.label.max())) >= classifier.num_classes:
        raise InputError(
            f"there are labels up to {largest} in data.val, and the classifier of {config.init} has "
            f"{classifier.num_classes} classes: it was made for another set"
        )
    size = pair(classifier.patch_embed.img_size)
    if accelerator.is_main_process:
        write_run_files(opened.run_dir, config, processes=accelerator.num_processes)
        crop = f"{size[0]} x {size[1]} pixels, crop_pct {config.data.crop_pct:g}"
        print(f"{report}\n{len(val)} images of data.val at {crop}", flush=True)
        for advice in _advice(config, size, val, weights):
            print(advice, flush=True)
    classifier.to(accelerator.device)
    choose_attention(classifier, accelerator.device, config.precision)
    micro = config.micro_batch_size or -(-config.batch_size // accelerator.num_processes)
    loader = loader_of_all(opened, val, CenterCrop(size, config.data.crop_pct), micro)
    normalize = Normalize(spec.mean, spec.std).to(accelerator.device)

    def leave(signals: StopSignals) -> None:
        write_result(opened.run_dir, "finetune", finished=False, preempted=True, signal=signals.received)
        print("stopped: the same command begins again", flush=True)

    with stoppable(accelerator, leave, config.stall_timeout_s) as signals:
        batches = until_stopped(loader, signals, accelerator)
        (found,) = outcomes([nn.Sequential(normalize, classifier)], batches, accelerator)
    figures = {f"val_{name}": value for name, value in found.figures().items()}
    if accelerator.is_main_process:
        names = named_classes(weights.class_names or class_names(val), classifier.num_classes)
        write_evaluation(opened.run_dir, found, names)
        facts = {"eval_only": True, "init": config.init, "img_size": size, "crop_pct": config.data.crop_pct}
        write_result(opened.run_dir, "finetune", finished=True, **facts, **figures)
        print("\n".join(_table(figures)) + f"\nby class: {opened.run_dir / 'per_class.csv'}", flush=True)
    accelerator.end_training()
    return figures


def as_the_weights_say(config: FinetuneConfig, weights: Weights) -> FinetuneConfig:
    """Returns the settings with the crop that `init` was evaluated with, unless one is given, and its channels."""
    data, known = config.data, weights.spec
    chans: Any = config.encoder.args.get("in_chans", data.in_chans if known is None else known.args.get("in_chans", 3))
    crop_pct = own_crop_pct(str(config.init)) if data.crop_pct is None else data.crop_pct
    return dataclasses.replace(config, data=dataclasses.replace(data, crop_pct=crop_pct, in_chans=chans))


def _advice(config: FinetuneConfig, size: tuple[int, int], val: ShardIndex, weights: Weights) -> list[str]:
    """Returns sentences on what is likely not meant."""
    found = []
    if max(size) > USUAL_SIDE and config.data.crop_pct < 1:
        found.append(
            f"note: above {USUAL_SIDE} pixels published figures are of the whole shorter side: --data.crop_pct 1"
        )
    theirs, ours = weights.class_names, class_names(val)
    if theirs is not None and ours is not None:
        differ = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b]
        if differ:
            i = differ[0]
            found.append(
                f"warning: {len(differ)} classes of data.val have other names than the classifier's: label {i} is "
                f"{printable(ours[i])} there and {printable(theirs[i])} here; in another order the figures are wrong"
            )
    return found


def _table(figures: Figures) -> list[str]:
    """Returns a line for each figure."""
    return [f"{name.removeprefix('val_'):>16}  {value:.10g}" for name, value in figures.items()]
