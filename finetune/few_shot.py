"""Accuracy with few labels a class: logistic regression on frozen features, and fine-tuning, over several draws."""

import hashlib
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate.utils import gather_object

from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.errors import InputError, Stopped
from quarterlight.ssl.files import write_text
from quarterlight.ssl.index import ShardIndex, refuse_damage
from quarterlight.ssl.order import FileOrder, labelled_subset
from quarterlight.ssl.runs import plain, write_result, write_run_files
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.stage import Opened, open_stage
from quarterlight.ssl.watch import Watch

from .classify import classes_of
from .duplicates import warn_of_shared
from .features import extract_table, feature_names, open_encoder
from .linear_probe import pausing
from .logistic import fit_logistic
from .probe_config import FewShotConfig
from .probe_grid import inputs_of
from .sub_runs import finished_result, run_to_its_end
from .tables import csv_text


class Score(NamedTuple):
    """What one draw gave."""

    method: str  # "linear" or "finetune"
    labels_per_class: int
    seed: int
    val_top1: float  # percent


def few_shot(config: FewShotConfig, finetune_script: Path) -> list[Score]:
    """Measures every number of labels and every draw, and leaves few_shot.csv and result.json in the run folder.

    Both methods get the same labelled images, those of `--data.samples_per_class` and `--seed`. Raises Stopped when it
    gets a signal: what is done is kept, and the same command goes on.
    """
    opened = open_stage(config, config.init, untrained=config.untrained)
    accelerator, run_dir = opened.accelerator, opened.run_dir
    if opened.val is None:
        raise InputError("data.val is not given: accuracy is reported on shards of its own")
    if config.data.samples_per_class is not None:
        raise InputError("data.samples_per_class: the numbers of labelled images are given by shots; leave it null")
    if config.method != "linear":
        _check_finetuning(config, accelerator.num_processes, finetune_script)
    classes_of(opened.train, opened.val, None)
    for shots in config.shots:
        labelled_subset(opened.train.label, shots, config.seed)  # refuses what a class does not have
    if accelerator.is_main_process:
        write_run_files(run_dir, config, processes=accelerator.num_processes)
        drawn = [labelled_subset(opened.train.label, *draw) for draw in _draws(config)]
        warn_of_shared(opened.train, np.unique(np.concatenate(drawn)), opened.val, wanted=config.check_duplicates)
    scores: list[Score] = []
    with StopSignals() as signals:
        try:
            if config.method != "finetune":
                rank, world_size = accelerator.process_index, accelerator.num_processes
                with Watch(rank, world_size, config.stall_timeout_s, lambda: "") as watch, watch.during("evaluating"):
                    scores += _linear(config, opened, opened.val, signals)
            if config.method != "linear":
                scores += _finetuned(config, run_dir, finetune_script, signals)
        except Stopped:
            if accelerator.is_main_process:
                write_result(run_dir, "few_shot", finished=False, preempted=True, signal=signals.received)
                print(f"stopped: {run_dir} keeps what is done, the same command goes on", flush=True)
            raise
    if accelerator.is_main_process:
        write_text(run_dir / "few_shot.csv", csv_text([Score._fields, *scores]))
        facts = {"val_images": len(opened.val), "scores": [score._asdict() for score in scores]}
        write_result(run_dir, "few_shot", finished=True, table=summary(scores), **facts)
        print(f"{printed(scores)}\ndone: {run_dir / 'few_shot.csv'}", flush=True)
    accelerator.end_training()
    return scores


def _draws(config: FewShotConfig) -> list[tuple[int, int]]:
    """Returns (images of a class, seed) of every draw."""
    return [(shots, config.seed + draw) for shots in config.shots for draw in range(config.draws)]


def _linear(config: FewShotConfig, opened: Opened, val: ShardIndex, signals: StopSignals) -> list[Score]:
    """Returns the scores of logistic regression; processes share the images, and then the draws."""
    accelerator, train = opened.accelerator, opened.train
    frozen = open_encoder(opened)
    wanted, known = config.input or "avg", inputs_of(feature_names(frozen.encoder, layers=False))
    if wanted not in known:
        raise InputError(f"input {wanted}: this encoder has only {', '.join(known)}")
    if accelerator.is_main_process:
        print(frozen.report, flush=True)
    chosen = {draw: labelled_subset(train.label, *draw) for draw in _draws(config)}
    pool = np.unique(np.concatenate(list(chosen.values())))  # what any draw has: each image is encoded once
    crop = CenterCrop(frozen.encoder.img_size, config.data.crop_pct)
    tables = []
    for index, ids in ((train, pool), (val, np.arange(len(val)))):
        refuse_damage(index)
        loading = {"batch_size": config.extract_batch_size, "num_workers": config.num_workers}
        samples, cache = opened.samples(index, FileOrder(ids), crop), opened.run_dir / "features"
        given = {"fetching": opened.fetching, "signals": signals}
        tables.append(extract_table(frozen.encoder, frozen.normalize, samples, accelerator, cache, **loading, **given))
    x, y = (
        torch.cat([table.load([name])[name] for name in known[wanted]], dim=1).to(accelerator.device)
        for table in tables
    )
    labels, truth = (table.labels().to(accelerator.device) for table in tables)
    num_classes = 1 + int(max(labels.max(), truth.max()))
    pause, mine = pausing(signals, accelerator), []
    draws = list(chosen.items())
    for first in range(0, len(draws), accelerator.num_processes):  # a round each, so that all stop alike
        pause()
        for draw, ids in draws[first : first + accelerator.num_processes][accelerator.process_index :][:1]:
            places = torch.from_numpy(np.searchsorted(pool, ids)).to(accelerator.device)
            fitted = fit_logistic(x[places], labels[places], num_classes=num_classes, c=config.regression_c)
            right = 100 * float((fitted.predict(y) == truth).double().mean())
            mine.append(Score("linear", *draw, right))
    return sorted(gather_object(mine))


def _check_finetuning(config: FewShotConfig, processes: int, script: Path) -> None:
    """Raises InputError for what would fail only when the first fine-tuning starts."""
    if processes > 1:
        raise InputError(
            f"method {config.method}: fine-tuning starts processes of its own; start launch/few_shot.py as one process "
            "and give the launcher of several as --launcher"
        )
    if not config.finetune_config:
        raise InputError(
            f"method {config.method}: give --finetune_config, YAML files with the options of launch/finetune.py, such "
            "as its length in steps (an epoch is short with few labels)"
        )
    for path in (script, *map(Path, config.finetune_config)):
        if not path.is_file():
            raise InputError(f"{path}: no such file")


def _finetuned(config: FewShotConfig, run_dir: Path, script: Path, signals: StopSignals) -> list[Score]:
    """Returns the scores of fine-tuning: a run of launch/finetune.py for each draw, below finetune/."""
    scores: list[Score] = []
    for shots, seed in _draws(config):
        words = _words(config, shots, seed)
        texts = [Path(name).read_text() for name in config.finetune_config]
        key = hashlib.sha256(json.dumps([words, texts]).encode()).hexdigest()[:8]  # other options: another folder
        folder = run_dir / "finetune" / f"{shots}-labels-seed{seed}-{key}"
        if not (done := finished_result(folder)):
            print(f"fine-tuning with {shots} labels a class, seed {seed}: {folder}", flush=True)
            starter = shlex.split(config.launcher) or [sys.executable]
            run_to_its_end([*starter, str(script), *words, "--run_dir", str(folder)], folder, signals)
            done = finished_result(folder)
        if not done:
            raise InputError(f"{folder}: fine-tuning ended without a result; see {folder}.txt")
        scores.append(Score("finetune", shots, seed, done["val_top1"]))
    return scores


def _words(config: FewShotConfig, shots: int, seed: int) -> list[str]:
    """Returns the command line of one fine-tuning, without its folder: the files, and what this command was given."""
    given: dict[str, Any] = {"data.samples_per_class": shots, "seed": seed, "precision": config.precision}
    given |= {"init": config.init, "untrained": config.untrained, "num_workers": config.num_workers}
    given |= {"check_duplicates": False}  # the warning has been given
    given |= {"allow_partial": True} if config.allow_partial else {}
    of_data, of_encoder = plain(config.data), plain(config.encoder)
    names = ("train", "val", "in_chans", "img_size", "mean", "std", "cache_dir")
    given |= {f"data.{name}": of_data[name] for name in names if of_data[name] is not None}
    usual = plain(DataConfig(train=""))  # what was not changed here is left to the files
    given |= {f"data.{x}": of_data[x] for x in ("crop_pct", "cache_gb", "max_bad_share") if of_data[x] != usual[x]}
    given |= {f"encoder.{name}": value for name, value in of_encoder.items() if value}
    words = [word for name in config.finetune_config for word in ("--config", name)]
    for name, value in given.items():
        words += [f"--{name}", value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)]
    return [word.removesuffix("\n...\n").strip() for word in words]


def summary(scores: list[Score]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns mean and standard deviation (of a sample; 0 of one draw) by method and labels a class."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for method, shots in dict.fromkeys((score.method, score.labels_per_class) for score in scores):
        values = [x.val_top1 for x in scores if (x.method, x.labels_per_class) == (method, shots)]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        table.setdefault(method, {})[str(shots)] = {"mean": statistics.fmean(values), "sd": sd, "draws": len(values)}
    return table


def printed(scores: list[Score]) -> str:
    """Returns the table of means and standard deviations as text."""
    table = summary(scores)
    counts = list(dict.fromkeys(str(score.labels_per_class) for score in scores))
    lines = ["labels a class" + "".join(f"{method:>20}" for method in table)]
    for count in counts:
        cells = [f"{x['mean']:.2f} +- {x['sd']:.2f} %" if (x := table[m].get(count)) else "" for m in table]
        lines.append(f"{count:>14}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
