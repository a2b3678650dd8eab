"""A grid of linear classifiers against each one trained alone by plain torch, and the command's figures."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.finetune.config import LinearProbeConfig
from quarterlight.finetune.linear_probe import grid_accuracy, linear_probe, probe_features, train_grid
from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.randoms import hashes

DIM, CLASSES, SEED = 12, 6, 3
BASE_LRS = (0.01, 0.5, 5.0)
GENERATOR = torch.Generator().manual_seed(0)
CENTERS = torch.randn(CLASSES, DIM, generator=GENERATOR)


def blobs(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (count,), generator=GENERATOR)
    return 3 * CENTERS[labels] + 4 * torch.randn(count, DIM, generator=GENERATOR) + 5, labels


TRAIN, VAL = blobs(150), blobs(61)


def trained_alone(which: int, *, epochs: int, batch_size: int) -> nn.Sequential:
    """Trains the classifier of one learning rate as anybody would, from the weights it has in the grid."""
    features, labels = TRAIN
    torch.manual_seed(SEED)
    initial = [torch.randn(CLASSES, DIM) * 0.01 for _ in BASE_LRS][which]
    linear = nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(initial)
        linear.bias.zero_()
    model = nn.Sequential(nn.BatchNorm1d(DIM, affine=False, eps=1e-6), linear).train()
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


def grid(epochs: int = 4, batch_size: int = 32, base_lrs: tuple[float, ...] = BASE_LRS):
    return train_grid(*TRAIN, num_classes=CLASSES, base_lrs=base_lrs, epochs=epochs, batch_size=batch_size, seed=SEED)


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 32), (4, 32), (4, 150), (4, 1024), (2, 75)])
def test_each_learning_rate_gives_the_weights_of_training_alone(epochs: int, batch_size: int):
    together = grid(epochs, batch_size)
    for which in range(len(BASE_LRS)):
        alone = trained_alone(which, epochs=epochs, batch_size=batch_size)
        torch.testing.assert_close(together.weights[which], alone[1].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.biases[which], alone[1].bias, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.norm.running_mean, alone[0].running_mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.norm.running_var, alone[0].running_var, rtol=1e-5, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(together(VAL[0])[which], alone(VAL[0]), rtol=0, atol=1e-4)


def test_the_grid_comes_back_in_eval_mode_and_the_same_each_time():
    first, second = grid(), grid()
    assert not first.training
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)


def test_training_leaves_the_features_alone():
    before = TRAIN[0].clone()
    grid()
    assert torch.equal(TRAIN[0], before)


@pytest.mark.parametrize("chunk", [1, 7, 61, 4096])
def test_accuracies_are_those_of_scikit_learn(chunk: int):
    trained = grid()
    top1, top5 = grid_accuracy(trained, *VAL, chunk=chunk)
    with torch.no_grad():
        logits = trained(VAL[0]).numpy()
    for which in range(len(BASE_LRS)):
        for k, found in ((1, top1), (5, top5)):
            score = top_k_accuracy_score(VAL[1].numpy(), logits[which], k=k, labels=range(CLASSES))
            assert float(found[which]) == pytest.approx(100 * score, abs=1e-3)


def test_with_fewer_than_five_classes_top5_is_always_right():
    features, labels = torch.randn(20, 3, generator=GENERATOR), torch.arange(20) % 2
    small = train_grid(features, labels, num_classes=2, base_lrs=(0.1,), epochs=1, batch_size=8, seed=0)
    assert grid_accuracy(small, features, labels)[1].tolist() == [100.0]


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


def probed(config: LinearProbeConfig = CONFIG, val_labels: Tensor = VAL[1]) -> dict:
    train = ({"avg": TRAIN[0], "token": NOISE[0]}, TRAIN[1])
    val = ({"avg": VAL[0], "token": NOISE[1]}, val_labels)
    return probe_features(train, val, num_classes=CLASSES, config=config, device=torch.device("cpu"))


def test_the_chosen_probe_is_the_best_on_the_held_out_part():
    result = probed()
    assert len(result["all_probes"]) == 2 * len(BASE_LRS)
    best = max(probe["holdout_top1"] for probe in result["all_probes"])
    assert result["chosen"] in result["all_probes"]
    assert result["chosen"]["holdout_top1"] == best
    assert (result["linear_top1"], result["linear_top5"]) == (
        result["chosen"]["val_top1"],
        result["chosen"]["val_top5"],
    )
    for pool, probe in result["best_by_pool"].items():
        of_pool = [other for other in result["all_probes"] if other["pool"] == pool]
        assert probe["holdout_top1"] == max(other["holdout_top1"] for other in of_pool)
    assert result["chosen"]["pool"] == "avg"


def test_labels_to_report_on_do_not_take_part_in_the_choice():
    usual, turned = probed(), probed(val_labels=(VAL[1] + 1) % CLASSES)
    assert [p["holdout_top1"] for p in turned["all_probes"]] == [p["holdout_top1"] for p in usual["all_probes"]]
    assert turned["chosen"]["base_lr"] == usual["chosen"]["base_lr"]
    assert turned["linear_top1"] < usual["linear_top1"]


def test_a_probe_learns_what_can_be_learned():
    result = probed(dataclasses.replace(CONFIG, epochs=20))
    assert result["linear_top1"] > 60
    noise = [probe["val_top1"] for probe in result["all_probes"] if probe["pool"] == "token"]
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
    train, val = ({"avg": TRAIN[0][:3]}, TRAIN[1][:3]), ({"avg": VAL[0]}, VAL[1])
    config = dataclasses.replace(CONFIG, holdout_share=0.6)
    with pytest.raises(InputError, match="holdout_share"):
        probe_features(train, val, num_classes=CLASSES, config=config, device=torch.device("cpu"))


@pytest.fixture
def config(shards: tuple[str, str], tmp_path: Path) -> Iterator[LinearProbeConfig]:
    yield LinearProbeConfig(
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
    )
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


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
    cached = {path: path.stat().st_mtime_ns for path in (run_dir / "features").iterdir()}
    assert len(cached) == 2
    assert linear_probe(config) == result
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "features").iterdir()} == cached


def test_without_val_shards_the_command_is_refused(config: LinearProbeConfig):
    with pytest.raises(InputError, match="data.val"):
        linear_probe(dataclasses.replace(config, data=dataclasses.replace(config.data, val=None)))


def test_a_few_samples_of_each_class_may_be_trained_on(config: LinearProbeConfig):
    few = dataclasses.replace(config.data, samples_per_class=5)
    result = linear_probe(dataclasses.replace(config, data=few))
    assert (result["train_images"], result["val_images"]) == (20, 21)
