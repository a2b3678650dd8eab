"""A grid of linear classifiers against each one trained alone by plain torch, and the command's figures."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TINY
from ranks import Nursery, wait_until
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.finetune.config import LinearProbeConfig
from quarterlight.finetune.intervals import wilson
from quarterlight.finetune.linear_probe import linear_probe, probe_features
from quarterlight.finetune.probe_grid import Columns, HeadGrid, View, grid_accuracy, inputs_of, train_grids
from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.processes import build_accelerator
from quarterlight.ssl.randoms import hashes

DIM, CLASSES, SEED = 12, 6, 3
BASE_LRS = (0.01, 0.5, 5.0)
GENERATOR = torch.Generator().manual_seed(0)
CENTERS = torch.randn(CLASSES, DIM, generator=GENERATOR)


def blobs(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (count,), generator=GENERATOR)
    return 3 * CENTERS[labels] + 4 * torch.randn(count, DIM, generator=GENERATOR) + 5, labels


TRAIN, VAL = blobs(150), blobs(61)


def trained_alone(which: int, *, epochs: int, batch_size: int, batch_norm: bool = True) -> nn.Sequential:
    """Trains the classifier of one learning rate as anybody would, from the weights it has in the grid."""
    features, labels = TRAIN
    torch.manual_seed(SEED)
    linear = nn.Linear(DIM, CLASSES)
    torch.manual_seed(SEED)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(CLASSES, DIM) * 0.01)
        linear.bias.zero_()
    norm = nn.BatchNorm1d(DIM, affine=False, eps=1e-6) if batch_norm else nn.Identity()
    model = nn.Sequential(norm, linear).train()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    batch_size = min(batch_size, len(features))
    per_epoch = len(features) // batch_size
    peak = BASE_LRS[which] * batch_size / 256
    for epoch in range(epochs):
        order = hashes(SEED, f"probe {epoch}", np.arange(len(features)), 1)[:, 0].argsort()
        for i in range(per_epoch):
            progress = (epoch * per_epoch + i) / (epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * progress)) / 2
            ids = torch.from_numpy(order[i * batch_size : (i + 1) * batch_size])
            optimizer.zero_grad()
            F.cross_entropy(model(features[ids]), labels[ids]).backward()
            optimizer.step()
    return model.eval()


ALONE, WITHOUT = View("avg", True), View("avg", False)
CPU = torch.device("cpu")
EVERYTHING = np.arange(len(TRAIN[1]))


def grids(epochs: int = 4, batch_size: int = 32, base_lrs: tuple[float, ...] = BASE_LRS, views=(ALONE,)):
    rates = {"base_lrs": base_lrs, "epochs": epochs, "batch_size": batch_size, "seed": SEED}
    inputs = {view: ("avg",) for view in views}
    return train_grids(Columns({"avg": TRAIN[0]}, CPU), TRAIN[1], EVERYTHING, inputs, num_classes=CLASSES, **rates)


def grid(*given, **named) -> HeadGrid:
    return grids(*given, **named)[ALONE]


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 32), (4, 32), (4, 150), (4, 1024), (2, 75)])
@pytest.mark.parametrize("view", [ALONE, WITHOUT])
def test_each_learning_rate_gives_the_weights_of_training_alone(view: View, epochs: int, batch_size: int):
    together = grids(epochs, batch_size, views=(ALONE, WITHOUT))[view]
    for which in range(len(BASE_LRS)):
        alone = trained_alone(which, epochs=epochs, batch_size=batch_size, batch_norm=view.batch_norm)
        size = float(alone[1].weight.detach().abs().max())  # without a norm, the largest rate shoots far
        torch.testing.assert_close(together.weight[which], alone[1].weight, rtol=0, atol=1e-5 * max(1, size))
        torch.testing.assert_close(together.bias[which], alone[1].bias, rtol=0, atol=1e-5 * max(1, size))
        if view.batch_norm:
            torch.testing.assert_close(together.norm.running_mean, alone[0].running_mean, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.norm.running_var, alone[0].running_var, rtol=1e-5, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(together(VAL[0])[:, which], alone(VAL[0]), rtol=0, atol=1e-3 * max(1, size))


def test_the_grid_comes_back_in_eval_mode_and_does_not_depend_on_the_other_classifiers():
    first, second = grid(base_lrs=(0.01, 0.5)), grids(base_lrs=(0.5, 2.0), views=(WITHOUT, ALONE))[ALONE]
    assert not first.training
    torch.testing.assert_close(first.weight[1], second.weight[0], rtol=0, atol=1e-6)


def test_a_rate_that_diverges_leaves_the_others_alone_and_counts_as_nothing_right():
    trained = grids(base_lrs=(1e38, 0.5), views=(WITHOUT,))[WITHOUT]
    assert not torch.isfinite(trained.weight[0]).all() and torch.isfinite(trained.weight[1]).all()
    top1, top5 = accuracy(trained)
    assert top1[0] == top5[0] == 0 and top1[1] > 30


def accuracy(trained: HeadGrid, features: Tensor = VAL[0], labels: Tensor = VAL[1], chunk: int = 4096):
    return grid_accuracy(
        trained, ("avg",), Columns({"avg": features}, CPU), labels, np.arange(len(labels)), chunk=chunk
    )


@pytest.mark.parametrize(("fold", "c"), [(0, 0.1), (1, 1.0)])
def test_at_one_rate_and_enough_epochs_the_digits_are_told_apart_as_by_scikit_learn(fold: int, c: float):
    """Within 0.3 points: of some 898 images that neither saw, at most two."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    train, val = order[fold::2], order[1 - fold :: 2]
    columns, y = Columns({"avg": torch.from_numpy(pixels).float()}, CPU), torch.from_numpy(classes)
    given = {"base_lrs": (0.2,), "epochs": 300, "batch_size": len(train), "seed": 0}
    given["weight_decay"] = 1 / (c * len(train))
    ours = train_grids(columns, y, train, {ALONE: ("avg",)}, num_classes=10, **given)[ALONE]
    top1, _ = grid_accuracy(ours, ("avg",), columns, y, val)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(pixels[train], classes[train])
    assert float(top1[0]) == pytest.approx(100 * model.score(pixels[val], classes[val]), abs=0.3)


def test_training_leaves_the_features_alone():
    before = TRAIN[0].clone()
    grid()
    assert torch.equal(TRAIN[0], before)


@pytest.mark.parametrize("chunk", [1, 7, 61, 4096])
def test_accuracies_are_those_of_scikit_learn(chunk: int):
    trained = grid()
    top1, top5 = accuracy(trained, chunk=chunk)
    with torch.no_grad():
        logits = trained(VAL[0]).numpy()
    for which in range(len(BASE_LRS)):
        for k, found in ((1, top1), (5, top5)):
            score = top_k_accuracy_score(VAL[1].numpy(), logits[:, which], k=k, labels=range(CLASSES))
            assert float(found[which]) == pytest.approx(100 * score, abs=1e-3)


def test_with_fewer_than_five_classes_top5_is_always_right():
    features, labels = torch.randn(20, 3, generator=GENERATOR), torch.arange(20) % 2
    given = {"base_lrs": (0.1,), "epochs": 1, "batch_size": 8, "seed": 0}
    columns = Columns({"avg": features}, CPU)
    small = train_grids(columns, labels, np.arange(20), {ALONE: ("avg",)}, num_classes=2, **given)[ALONE]
    assert accuracy(small, features, labels)[1].tolist() == [100.0]


def test_inputs_are_what_stands_side_by_side():
    features = {name: torch.randn(30, width) for name, width in (("avg", 3), ("token", 3), ("last2", 2), ("last3", 2))}
    inputs = inputs_of(list(features))
    assert inputs == {
        "avg": ("avg",), "token": ("token",), "both": ("token", "avg"), "last4": ("token", "last2", "last3"),
        "last4_avg": ("token", "last2", "last3", "avg"),
    }  # fmt: skip
    assert inputs_of(["avg", "last2"]) == {"avg": ("avg",), "last4": ("avg", "last2")}
    whole = {"x": torch.cat([features[name] for name in inputs["last4_avg"]], dim=1)}
    view, labels = View("last4_avg", True), torch.arange(30) % 4
    given = {"num_classes": 4, "base_lrs": (0.3,), "epochs": 3, "batch_size": 10, "seed": 1}
    ours = train_grids(Columns(features, CPU), labels, np.arange(30), {view: inputs["last4_avg"]}, **given)[view]
    same = train_grids(Columns(whole, CPU), labels, np.arange(30), {view: ("x",)}, **given)[view]
    torch.testing.assert_close(ours.weight, same.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 10), (500, 1000), (49_000, 50_000)])
def test_intervals_are_wilsons_as_scipy_has_them(right: int, count: int):
    wanted = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right, count) == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-9)


CONFIG = LinearProbeConfig(
    run_dir="unused",
    data=DataConfig(train="t"),
    base_lrs=BASE_LRS,
    epochs=3,
    batch_size=32,
    neighbors=(5, 20),
    seed=SEED,
)
NOISE = (torch.randn(150, DIM, generator=GENERATOR), torch.randn(61, DIM, generator=GENERATOR))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def probed(
    config: LinearProbeConfig = CONFIG, train_labels: Tensor = TRAIN[1], val_labels: Tensor = VAL[1], count: int = 150
) -> dict:
    train = ({"avg": TRAIN[0][:count], "token": NOISE[0][:count]}, train_labels[:count])
    val = ({"avg": VAL[0], "token": NOISE[1]}, val_labels)
    views = [View(name, norm) for name in ("avg", "token") for norm in (True, False)]
    given = {"views": views, "num_classes": CLASSES, "config": config, "accelerator": build_accelerator("no")}
    return probe_features(train, val, **given)


def test_the_chosen_probe_is_the_best_on_the_held_out_part():
    result = probed()
    assert len(result["all_probes"]) == 2 * 2 * len(BASE_LRS)
    best = max(probe["holdout_top1"] for probe in result["all_probes"])
    assert result["chosen"] in result["all_probes"]
    assert result["chosen"]["holdout_top1"] == best
    assert (result["linear_top1"], result["linear_top5"]) == (
        result["chosen"]["val_top1"],
        result["chosen"]["val_top5"],
    )
    for name, probe in result["best_by_input"].items():
        of_input = [other for other in result["all_probes"] if other["input"] == name]
        assert probe["holdout_top1"] == max(other["holdout_top1"] for other in of_input)
    assert result["chosen"]["input"] == "avg"
    low, high = result["linear_top1_interval"]
    assert low < result["linear_top1"] < high
    assert result["knn_top1_interval"].keys() == result["knn_top1"].keys()


def test_labels_to_report_on_do_not_take_part_in_the_choice():
    usual, turned = probed(), probed(val_labels=(VAL[1] + 1) % CLASSES)
    assert [p["holdout_top1"] for p in turned["all_probes"]] == [p["holdout_top1"] for p in usual["all_probes"]]
    assert turned["chosen"]["base_lr"] == usual["chosen"]["base_lr"]
    assert turned["linear_top1"] < usual["linear_top1"]


def test_a_probe_learns_what_can_be_learned():
    result = probed(dataclasses.replace(CONFIG, epochs=20))
    assert result["linear_top1"] > 60
    noise = [probe["val_top1"] for probe in result["all_probes"] if probe["input"] == "token"]
    assert max(noise) < 45


@pytest.mark.parametrize("k", [5, 20])
def test_nearest_neighbors_are_looked_up_among_all_training_features(k: int):
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = 100 * model.fit(TRAIN[0].double(), TRAIN[1]).score(VAL[0].double(), VAL[1])
    assert probed()["knn_top1"][f"avg_k{k}"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.999, 1.0, -0.5])
def test_a_holdout_that_is_empty_or_everything_is_refused(share: float):
    with pytest.raises(InputError, match="holdout_share"):
        probed(dataclasses.replace(CONFIG, holdout_share=share))


def test_a_holdout_that_leaves_one_image_to_train_on_is_refused():
    with pytest.raises(InputError, match="holdout_share"):
        probed(dataclasses.replace(CONFIG, holdout_share=0.6), count=3)


@pytest.fixture
def config(shards: tuple[str, str], tmp_path: Path) -> LinearProbeConfig:
    return LinearProbeConfig(
        run_dir=str(tmp_path / "probe"),
        data=DataConfig(train=shards[0], val=shards[1], img_size=16, crop_pct=1.0),
        encoder=EncoderConfig(
            name="vit_tiny_patch16_224", args={"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
        ),
        precision="no",
        num_workers=0,
        epochs=3,
        batch_size=16,
        neighbors=(5,),
        base_lrs=BASE_LRS,
    )


def test_the_command_leaves_its_figures_and_finds_them_again(
    config: LinearProbeConfig, capsys: pytest.CaptureFixture[str]
):
    result = linear_probe(config)
    run_dir = Path(config.run_dir)
    written = json.loads((run_dir / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert (written["command"], written["finished"]) == ("linear_probe", True)
    assert (written["train_images"], written["val_images"]) == (60, 21)
    assert written["knn_top1"].keys() == {"avg_k5", "token_k5"}
    out = capsys.readouterr().out
    assert f"{written['linear_top1']:.2f}" in out
    assert "<- chosen" in out
    cached = {path: path.stat().st_mtime_ns for path in (run_dir / "features").glob("*/*")}
    assert len(cached) == 2
    assert linear_probe(config) == result
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "features").glob("*/*")} == cached
    inputs = {"avg", "token", "both"}  # one block has no earlier one
    assert {probe["input"] for probe in result["all_probes"]} == inputs


def test_inputs_that_an_encoder_does_not_have_are_refused(config: LinearProbeConfig):
    swin = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
    encoder = EncoderConfig(name="swin_tiny_patch4_window7_224", args=swin)
    bare = dataclasses.replace(config, inputs=("token", "both"), encoder=encoder)
    with pytest.raises(InputError, match="this encoder has only avg"):
        linear_probe(bare)
    with pytest.raises(InputError, match="holdout_share 1"):
        linear_probe(dataclasses.replace(bare, inputs=("avg",), holdout_share=1.0))
    assert not (Path(bare.run_dir) / "features").exists()  # before anything is computed


def test_it_stops_when_it_is_told_to_and_the_same_command_goes_on(shards: tuple[str, str], tmp_path: Path):
    given = TINY | {
        "data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / "run"), "epochs": "1000000",
        "batch_size": "16", "extract_batch_size": "16",
    }  # fmt: skip
    code = (
        "from quarterlight.finetune.config import LinearProbeConfig\n"
        "from quarterlight.finetune.linear_probe import linear_probe\n"
        'run_command(lambda: parse_config(LinearProbeConfig, ""), linear_probe)'
    )
    nursery, cache = Nursery(tmp_path), tmp_path / "run" / "features"
    try:
        with nursery.run(2, given, code=code) as ranks:
            wait_until(lambda: len(list(cache.glob("*/*.safetensors"))) == 2, alive=ranks)
            os.kill(ranks[0].pid, signal.SIGTERM)
            assert [rank.ended() for rank in ranks] == [75, 75], ranks[0].said()
        assert json.loads((tmp_path / "run" / "result.json").read_text())["preempted"]
        kept = {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}
        with nursery.run(1, given, code=code) as ranks:  # one process instead of two finds all there is
            wait_until(lambda: not (tmp_path / "run" / "result.json").exists(), alive=ranks)
            time.sleep(1)
            os.kill(ranks[0].pid, signal.SIGINT)
            assert ranks[0].ended() == 75, ranks[0].said()
        assert {path: path.stat().st_mtime_ns for path in cache.glob("*/*")} == kept
    finally:
        nursery.close()


def test_without_val_shards_the_command_is_refused(config: LinearProbeConfig):
    with pytest.raises(InputError, match="data.val"):
        linear_probe(dataclasses.replace(config, data=dataclasses.replace(config.data, val=None)))


def test_a_few_samples_of_each_class_may_be_trained_on_and_duplicates_among_them_are_warned_of(
    config: LinearProbeConfig, capsys: pytest.CaptureFixture[str]
):
    few = dataclasses.replace(config.data, samples_per_class=5, val=config.data.train)
    result = linear_probe(dataclasses.replace(config, data=few))
    assert (result["train_images"], result["val_images"]) == (20, 60)
    assert "warning: 20 of the 60 images of data.val are in data.train too" in capsys.readouterr().out
