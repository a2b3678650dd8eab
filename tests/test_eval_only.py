"""Partial fine-tuning on balanced classes, killed and continued, and its classifiers evaluated: as real processes."""

import csv
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import VIT, classifier
from conftest import TINY, TINY_PRETRAIN, arguments, write_tars
from ranks import Nursery, Rank, steps_logged, wait_until
from safetensors.torch import load_file

from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig
from quarterlight.ssl.command import parse_config, run_command

FINETUNE = """
from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig
run_command(lambda: parse_config(FinetuneConfig, ""), finetune)
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    found = Nursery(tmp_path_factory.mktemp("outputs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pretrained(nursery, shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    with nursery.run(1, TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(run_dir), "steps": "4"}) as ranks:
        assert ranks[0].ended() == 0, ranks[0].said()
    return run_dir


def partial(shards: tuple[str, str], init: Path, run_dir: Path, **more: str) -> dict[str, str]:
    given = {key: value for key, value in TINY.items() if not key.startswith(("encoder", "data.img"))}
    return given | {
        "init": str(init), "data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir), "batch_size": "12",
        "steps": "24", "optim.base_lr": "2e-2", "optim.warmup_steps": "2", "log_every_steps": "1",
        "save_every_steps": "2", "evaluate_every_steps": "8", "trainable_blocks": "1.5", "data.balanced": "true",
        "ema_decay": "0.8", "drop_path": "0.2",
    } | more  # fmt: skip


def run(nursery: Nursery, given: dict[str, str], *, processes: int = 1) -> list[Rank]:
    with nursery.run(processes, given, code=FINETUNE) as ranks:
        assert [rank.ended() for rank in ranks] == [0] * processes, ranks[0].said()
    return ranks


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def finetuned(nursery, shards, pretrained, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finetuned") / "run"
    (rank,) = run(nursery, partial(shards, pretrained, run_dir))
    assert "training the last 1.5 of 2 blocks" in rank.said()
    return run_dir


FIGURES = ("top1", "top5", "loss", "mean_class_top1", "ece_pct")


def figures(run_dir: Path, which: str = "val") -> list[float]:
    return [result(run_dir)[f"{which}_{name}"] for name in FIGURES]


def test_only_the_last_block_and_a_half_have_moved_and_have_moments(pretrained, finetuned):
    before, after = (
        load_file(path) for path in (pretrained / "encoder.safetensors", finetuned / "classifier.safetensors")
    )
    moved = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
    mlp = ("blocks.0.norm2.", "blocks.0.mlp.")
    assert moved == {name for name in before if name.startswith(("blocks.1.", *mlp))}
    moments = load_file(finetuned / "state" / "step-00000024" / "optimizer.safetensors")
    learning = {key.rpartition(":")[0].removeprefix("classifier.") for key in moments}
    assert learning == moved | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_killed_five_times_it_ends_with_the_same_bits(nursery, shards, pretrained, finetuned, tmp_path):
    run_dir, draw = tmp_path / "run", random.Random(0)
    given = partial(shards, pretrained, run_dir)
    for kill in range(5):
        with nursery.run(1, given, code=FINETUNE) as (rank,):
            before = steps_logged(run_dir)
            target = min(23, max(before - 1, 4 * kill) + draw.randint(1, 4))
            wait_until(lambda t=target: steps_logged(run_dir) >= t, alive=[rank])
            os.kill(rank.pid, signal.SIGKILL)
            assert rank.ended() == -signal.SIGKILL
    run(nursery, given)
    for name in ("classifier", "classifier_ema", "classifier_best"):
        ours, wanted = (load_file(folder / f"{name}.safetensors") for folder in (run_dir, finetuned))
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted), name
    timed = {"images_per_s", "data_wait_pct", "memory_gb"}
    ours, wanted = ({k: v for k, v in result(folder).items() if k not in timed} for folder in (run_dir, finetuned))
    assert ours == wanted
    for name in ("confusion.csv", "confusion_ema.csv", "per_class.csv"):
        assert (run_dir / name).read_text() == (finetuned / name).read_text()


def test_the_best_classifier_is_the_better_of_weights_and_average(finetuned):
    records = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    seen = [x[name] for x in records for name in ("val_top1", "val_ema_top1") if name in x]
    assert len(seen) == 6 and result(finetuned)["best_val_top1"] == max(seen)


@pytest.mark.parametrize(
    ("init", "which", "processes"),
    [("", "val", 2), ("hub", "val", 1), ("classifier_ema.safetensors", "val_ema", 1)],
)
def test_a_classifier_of_a_run_is_evaluated_alike_by_one_and_two_processes(
    nursery, shards, finetuned, tmp_path, init, which, processes
):
    given = {"eval_only": "true", "init": str(finetuned / init), "data.val": shards[1]}  # the crop is the run's
    given |= {"precision": "no", "num_workers": "0", "batch_size": "8"}
    run_dir = tmp_path / "run"
    (rank, *_) = run(nursery, given | {"run_dir": str(run_dir)}, processes=processes)
    assert figures(run_dir) == pytest.approx(figures(finetuned, which), abs=1e-5)
    assert result(run_dir)["val_images"] == 21 and result(run_dir)["finished"]
    table = finetuned / f"confusion{which.removeprefix('val')}.csv"
    assert (run_dir / "confusion.csv").read_text() == table.read_text()
    with table.open() as file:
        counts = np.array([row[1:] for row in csv.reader(file)][1:], int)
    assert counts.sum() == 21 and 100 * counts.trace() / 21 == pytest.approx(result(run_dir)["val_top1"])
    assert "top1" in rank.said() and (run_dir / "confusion.png").exists()


def test_a_pickled_classifier_is_evaluated_at_another_size(nursery, shards, finetuned, tmp_path):
    path = tmp_path / "mae_finetuned.pth"
    torch.save({"model": load_file(finetuned / "classifier.safetensors")}, path)
    given = {"init": str(path), "data.val": shards[1], "precision": "no", "num_workers": "0", "eval_only": "true"}
    given |= {key: TINY[key] for key in ("encoder.name", "encoder.args")} | {"data.crop_pct": "1"}
    run(nursery, given | {"run_dir": str(tmp_path / "same"), "data.img_size": "16"})
    assert figures(tmp_path / "same") == pytest.approx(figures(finetuned), abs=1e-5)
    (rank,) = run(
        nursery, given | {"run_dir": str(tmp_path / "larger"), "data.img_size": "[16, 228]", "data.crop_pct": "0.9"}
    )
    assert result(tmp_path / "larger")["img_size"] == [16, 228]
    assert "positions resized from 4 x 4 to 4 x 57" in rank.said() and "--data.crop_pct 1" in rank.said()


def test_channels_and_crop_are_those_of_the_classifier(shards, tmp_path):
    path, _ = classifier(tmp_path, "vit_tiny_patch16_224", VIT | {"in_chans": 1})
    given = {"eval_only": "true", "init": str(path), "data.val": shards[1], "num_workers": "0", "precision": "no"}
    finetune(parse_config(FinetuneConfig, "", arguments(given | {"run_dir": str(tmp_path / "run")})))
    assert result(tmp_path / "run")["val_images"] == 21 and result(tmp_path / "run")["crop_pct"] == 0.875


def test_mistakes_get_one_sentence(shards, pretrained, finetuned, tmp_path, capsys):
    few = write_tars(tmp_path / "few", "val", 6, classes=6)
    given = {"data.val": shards[1], "num_workers": "0", "precision": "no"}
    judged = given | {"eval_only": "true", "init": str(finetuned)}
    for number, (options, said) in enumerate([
        (judged | {"init": str(pretrained)}, "holds no classification head"),
        (judged | {"init": "none"}, "init is not given"),
        (judged | {"data.val": "null"}, "data.val is not given"),
        (judged | {"data.val": few}, "labels up to 5 in data.val, and the classifier"),
        (given | {"init": str(pretrained)}, "data.train is not given"),
        (partial(shards, pretrained, tmp_path, class_weights="balanced"), "class_weights balanced and data.balanced"),
        (partial(shards, pretrained, tmp_path, trainable_blocks="7"), "the encoder has 2 blocks"),
        (partial(shards, pretrained, tmp_path, class_weights="[1,2]"), "has 2 numbers for 4 classes"),
    ]):  # fmt: skip
        words = arguments(options | {"run_dir": str(tmp_path / f"run{number}")})
        with pytest.raises(SystemExit) as ended:
            run_command(lambda words=words: parse_config(FinetuneConfig, "", words), finetune)
        error = capsys.readouterr().err
        assert ended.value.code == 1 and said in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_images_in_both_sets_are_warned_of_and_two_processes_balance_the_classes(nursery, shards, pretrained, tmp_path):
    given = partial(shards, pretrained, tmp_path / "run", steps="5", record_samples="true", **{"data.val": shards[0]})
    ranks = run(nursery, given, processes=2)
    assert "warning: 60 of the 60 images of data.val are in data.train too" in ranks[0].said()
    keys = [
        json.loads(line)["key"]
        for rank in range(2)
        for line in (tmp_path / "run" / f"samples-rank{rank}.jsonl").read_text().splitlines()
    ]
    assert sorted(keys) == sorted({*keys}) and len(keys) == 60  # four classes of fifteen
