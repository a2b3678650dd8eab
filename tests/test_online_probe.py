"""Probes during pretraining: their figures against scikit-learn's, and that they change nothing of the run."""

import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_PRETRAIN, arguments, write_tars
from PIL import Image
from ranks import LONG, Nursery, steps_logged, wait_until
from safetensors.torch import load_file
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.index import open_index
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.pretrain import pretrain
from quarterlight.ssl.released import encoder_with_weights, read_weights
from quarterlight.ssl.ridge import fit_ridge

PROBE = {"probe.every_steps": "4", "probe.neighbors": "5"}


def run(shards: tuple[str, str], run_dir: Path, **more: str) -> Path:
    given = TINY_PRETRAIN | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir)} | more
    run_command(lambda: parse_config(PretrainConfig, "", arguments(given)), pretrain)
    return run_dir


def probed(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Returns the figures of the probes in metrics.jsonl by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "probe_knn_avg" in line}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "state").iterdir())[-1] / "model.safetensors")


def features(run_dir: Path, pattern: str, name: str = "encoder.safetensors") -> tuple[np.ndarray, np.ndarray]:
    """Returns averages of the patch tokens by timm's own forward, and labels."""
    found = read_weights(str(run_dir / name))
    assert found.spec is not None
    model = encoder_with_weights(found.spec, found)[0].timm.eval()
    index = open_index(pattern)
    samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((16, 16), 1.0), 0)
    batch = samples.batch(0, len(index))
    with torch.no_grad():
        tokens = model.forward_features(Normalize(found.spec.mean, found.spec.std)(batch.images))
    return tokens[:, 1:].mean(dim=1).double().numpy(), batch.labels.numpy()


@pytest.fixture(scope="module")
def without(shards, tmp_path_factory) -> Path:
    return run(shards, tmp_path_factory.mktemp("without") / "run", ema_decay="0.9")


@pytest.fixture(scope="module")
def with_probes(shards, tmp_path_factory) -> Path:
    return run(shards, tmp_path_factory.mktemp("with") / "run", ema_decay="0.9", **PROBE)


def test_a_run_with_probes_has_the_bits_of_one_without(without, with_probes):
    ours, wanted = weights(with_probes), weights(without)
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (without, with_probes)
    ]
    assert losses[0] == [loss for loss in losses[1] if loss is not None]


def test_they_come_when_they_are_due_and_at_the_end(with_probes):
    assert list(probed(with_probes)) == [4, 8, 12]
    result = json.loads((with_probes / "result.json").read_text())
    assert result["probe_knn_avg"] == probed(with_probes)[12]["probe_knn_avg"]
    kinds = {f"{kind}_{name}" for kind in ("knn", "linear") for name in ("avg", "token")}
    wanted = {f"{prefix}_{kind}" for prefix in ("probe", "probe_ema") for kind in kinds}
    assert wanted | {"probe_s"} == {name for name in result if name.startswith("probe")}


@pytest.mark.parametrize(("prefix", "file"), [("probe", "encoder"), ("probe_ema", "encoder_ema")])
def test_figures_are_those_of_scikit_learn_on_the_released_encoder(shards, with_probes, prefix, file):
    result = json.loads((with_probes / "result.json").read_text())
    train, val = (features(with_probes, pattern, f"{file}.safetensors") for pattern in shards)
    votes = {"weights": lambda distance: np.exp((1 - distance) / 0.07)}
    knn = KNeighborsClassifier(5, metric="cosine", algorithm="brute", **votes).fit(*train)
    assert result[f"{prefix}_knn_avg"] == pytest.approx(100 * knn.score(*val), abs=1e-3)
    chosen = fit_ridge(torch.from_numpy(train[0]), torch.from_numpy(train[1]), num_classes=4).penalty
    ridge = make_pipeline(StandardScaler(), RidgeClassifier(chosen * len(train[0]))).fit(*train)
    assert result[f"{prefix}_linear_avg"] == pytest.approx(100 * ridge.score(*val), abs=1e-3)


def test_two_processes_find_the_figures_of_one_and_every_process_may_be_stopped(shards, with_probes, tmp_path):
    nursery = Nursery(tmp_path)
    try:
        given = TINY_PRETRAIN | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / "two")}
        with nursery.run(2, given | PROBE) as ranks:
            assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].said()
        one, two = probed(with_probes), probed(tmp_path / "two")
        assert list(two) == [4, 8, 12]
        for name in ("probe_knn_avg", "probe_linear_avg", "probe_knn_token", "probe_linear_token"):  # of 21 images
            assert abs(two[4][name] - one[4][name]) < 5, name  # bits of sums differ, and so may one image
        given = LONG | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / "stopped")}
        with nursery.run(2, given | {"probe.every_steps": "1"}) as ranks:
            wait_until(lambda: steps_logged(tmp_path / "stopped") >= 2, alive=ranks)
            os.kill(ranks[1].pid, signal.SIGTERM)
            assert [rank.ended() for rank in ranks] == [75, 75]
        assert json.loads((tmp_path / "stopped" / "result.json").read_text())["preempted"]
    finally:
        nursery.close()


def test_a_continued_run_ends_with_the_same_figures(shards, with_probes, tmp_path):
    run_dir = tmp_path / "run"
    run(shards, run_dir, ema_decay="0.9", keep_states="3", **PROBE)
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "state" / "step-00000012")
    shutil.rmtree(run_dir / "state" / "step-00000008")
    run(shards, run_dir, ema_decay="0.9", keep_states="3", **(PROBE | {"probe.every_steps": "6"}))  # a neutral option
    assert {6, 12} <= probed(run_dir).keys()
    timeless = [
        {name: value for name, value in probed(folder)[12].items() if name != "probe_s"}
        for folder in (run_dir, with_probes)
    ]
    assert timeless[0] == timeless[1]


def test_a_swin_is_probed_on_sets_of_its_own(shards, tmp_path):
    labelled = write_tars(tmp_path / "labelled", "other", 30)
    swin = {
        "encoder.name": "swin_tiny_patch4_window7_224", "data.img_size": "64", "steps": "2", "probe.every_steps": "2",
        "encoder.args": "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], window_size: 2}",
        "probe.train": labelled, "probe.val": shards[1], "probe.images": "13", "data.val": "null",
    }  # fmt: skip
    result = json.loads((run(shards, tmp_path / "run", **swin) / "result.json").read_text())
    assert {name for name in result if name.startswith("probe")} == {"probe_knn_avg", "probe_linear_avg", "probe_s"}
    assert round(result["probe_knn_avg"] * 13 / 100, 3).is_integer()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.val": "null"}, "nothing to report on: give data.val or probe.val"),
        ({"probe.val": "nowhere.tar"}, "nowhere.tar"),
        ({"probe.every_steps": "-1"}, "probe.every_steps is -1: it must be at least 0"),
        ({"probe.train": "UNLABELLED"}, "probe.train: no sample has a label"),
    ],
)
def test_a_mistake_gets_one_sentence(shards, tmp_path, capsys, change, said):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, format="PNG")
    with tarfile.open(tmp_path / "bare.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(buffer.getvalue())
        tar.addfile(member, io.BytesIO(buffer.getvalue()))
    change = {key: value.replace("UNLABELLED", str(tmp_path / "bare.tar")) for key, value in change.items()}
    with pytest.raises(SystemExit):
        run(shards, tmp_path / "run", **(PROBE | change))
    assert said in capsys.readouterr().err
