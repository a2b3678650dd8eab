"""Few labels: logistic regression against scikit-learn's, and the command with real runs of fine-tuning."""

import csv
import json
import os
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, TINY, arguments
from ranks import Nursery, wait_until
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from quarterlight.finetune.few_shot import Score, _words, few_shot, printed, summary
from quarterlight.finetune.logistic import fit_logistic
from quarterlight.finetune.probe_config import FewShotConfig
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.order import labelled_subset

PIXELS, CLASSES = load_digits(return_X_y=True)


CODE = f"""
from pathlib import Path
from quarterlight.finetune.few_shot import few_shot
from quarterlight.finetune.probe_config import FewShotConfig
script = Path({str(ROOT / "launch" / "finetune.py")!r})
run_command(lambda: parse_config(FewShotConfig, ""), lambda config: few_shot(config, script))
"""


@pytest.fixture
def nursery(tmp_path) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path)
    yield nursery
    nursery.close()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def options(shards: tuple[str, str], run_dir: Path, **more: str) -> dict[str, str]:
    given = {"data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir), "shots": "[1,3]", "draws": "2"}
    return TINY | given | more


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "few_shot.csv").read_text().splitlines()))


def start(shards: tuple[str, str], run_dir: Path, **more: str) -> None:
    words = arguments(options(shards, run_dir, **more))
    script = ROOT / "launch" / "finetune.py"
    run_command(lambda: parse_config(FewShotConfig, "", words), lambda config: few_shot(config, script))


@pytest.mark.parametrize(("shots", "c"), [(1, 0.01), (1, 10.0), (5, 1.0), (40, 1.0)])
def test_classifiers_are_those_of_scikit_learn(shots: int, c: float):
    ids = labelled_subset(CLASSES, shots, seed=2)
    ours = fit_logistic(torch.from_numpy(PIXELS[ids]), torch.from_numpy(CLASSES[ids]), num_classes=10, c=c)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-10, max_iter=10_000))
    scores = model.fit(PIXELS[ids], CLASSES[ids]).decision_function(PIXELS)
    logits = (torch.from_numpy(PIXELS) @ ours.weight + ours.bias).numpy()
    logits -= logits.mean(axis=1, keepdims=True) - scores.mean(axis=1, keepdims=True)  # softmax leaves that open
    np.testing.assert_allclose(logits, scores, rtol=0, atol=0.02)  # of logits around ten
    np.testing.assert_array_equal(ours.predict(torch.from_numpy(PIXELS)).numpy(), model.predict(PIXELS))


def test_a_class_without_labels_is_never_predicted():
    ids = np.nonzero((CLASSES == 3) | (CLASSES == 7))[0]
    ours = fit_logistic(torch.from_numpy(PIXELS[ids]), torch.from_numpy(CLASSES[ids]), num_classes=12)
    assert set(ours.predict(torch.from_numpy(PIXELS)).tolist()) == {3, 7}


def test_tables_hold_means_and_deviations_of_samples():
    scores = [Score("linear", 1, seed, value) for seed, value in enumerate((10.0, 20.0, 60.0))]
    scores += [Score("linear", 2, 0, 50.0), Score("finetune", 1, 0, 5.0)]
    table = summary(scores)
    assert table["linear"]["1"] == {"mean": 30.0, "sd": statistics.stdev([10, 20, 60]), "draws": 3}
    assert table["linear"]["2"]["sd"] == 0
    assert "30.00 +- 26.46 %" in printed(scores)


def test_fine_tuning_is_given_what_was_given_here(shards, tmp_path):
    given = {"allow_partial": "true", "data.crop_pct": "0.95", "data.cache_gb": "7", "data.max_bad_share": "0.25"}

    def words(**more: str) -> str:
        usual = options(shards, tmp_path / "run", method="finetune")
        usual = {name: value for name, value in usual.items() if name != "data.crop_pct"}
        return " ".join(_words(parse_config(FewShotConfig, "", arguments(usual | more)), 1, 0))

    assert all(f"--{name} {value}" in words(**given) for name, value in given.items())
    assert not any(f"--{name}" in words() for name in given)  # left to the recipe


def test_two_processes_give_the_table_of_one(shards, tmp_path, nursery):
    start(shards, tmp_path / "one")
    with nursery.run(2, options(shards, tmp_path / "two"), code=CODE) as ranks:
        assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].said()
    rows = rows_of(tmp_path / "one")
    assert [(row["labels_per_class"], row["seed"]) for row in rows] == [("1", "0"), ("1", "1"), ("3", "0"), ("3", "1")]
    assert rows == rows_of(tmp_path / "two")
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert result["finished"] and result["table"]["linear"]["3"]["mean"] > 25  # four classes


def test_fine_tuning_is_run_for_each_draw_stopped_and_continued(shards, tmp_path, nursery):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 4\nsteps: 4\nmixing: {mixup: 0, cutmix: 0}\noptim: {base_lr: 0.05}\n")
    given = options(shards, tmp_path / "run", method="finetune", finetune_config=f"[{recipe}]", shots="[1]", draws="1")
    runs = tmp_path / "run" / "finetune"
    with nursery.run(1, given, code=CODE) as ranks:  # stopped while the first fine-tuning is on its way
        wait_until(lambda: bool(list(runs.glob("1-labels-seed0-*.txt"))), alive=ranks)
        os.kill(ranks[0].pid, signal.SIGTERM)
        assert ranks[0].ended() == 75, ranks[0].said()
    assert not json.loads((tmp_path / "run" / "result.json").read_text())["finished"]
    with nursery.run(1, given, code=CODE) as ranks:
        assert ranks[0].ended() == 0, ranks[0].said()
    rows = rows_of(tmp_path / "run")
    found = [json.loads(path.read_text())["val_top1"] for path in sorted(runs.glob("*/result.json"))]
    assert [(row["method"], row["labels_per_class"], row["seed"], float(row["val_top1"])) for row in rows] == [
        ("finetune", "1", "0", found[0])
    ]
    images = [json.loads(path.read_text())["train_samples"] for path in runs.glob("*/environment.json")]
    assert images == [4]  # one of each class
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    start(shards, given.pop("run_dir"), **given)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")} == before  # nothing is run again


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.val": "null"}, "data.val is not given"),
        ({"data.samples_per_class": "3"}, "leave it null"),
        ({"shots": "[1,99]"}, "has 15 samples"),
        ({"shots": "[0]"}, "shots is 0: it must be at least 1"),
        ({"method": "both"}, "give --finetune_config"),
        ({"method": "both", "finetune_config": "[nowhere.yaml]"}, "nowhere.yaml: no such file"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "data.img_size": "32",
          "encoder.args": "{embed_dim: 12, depths: [1, 1], num_heads: [1, 1], window_size: 2}",
          "input": "token"}, "input token: this encoder has only avg"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(shards, tmp_path, capsys, change, said):
    with pytest.raises(SystemExit):
        start(shards, tmp_path / "run", **change)
    errors = capsys.readouterr().err
    assert said in errors and errors.startswith("error: ")


def test_a_fine_tuning_that_fails_is_reported_with_its_reason(shards, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch_size: 3\nsteps: 4\n")
    with pytest.raises(SystemExit):
        start(shards, tmp_path / "run", method="finetune", finetune_config=f"[{recipe}]")
    assert "the command failed (mixup and cutmix need an even number of images" in capsys.readouterr().err
