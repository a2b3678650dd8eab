"""The fine-tuning and probing commands as users start them, on the weights of a real pretraining run."""

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, TINY_PRETRAIN, arguments, command, write_tars
from safetensors.torch import load_file

from quarterlight.finetune.classify import classes_of, finetune
from quarterlight.finetune.config import FinetuneConfig
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.entries import ShardEntries
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.released import encoder_with_weights, read_weights

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(run_dir)}
    subprocess.run(command("pretrain.py", given), check=True, env=ENVIRONMENT, capture_output=True)
    return run_dir


def options(shards: tuple[str, str], init: Path, run_dir: Path, **more: str) -> dict[str, str]:
    given = {key: value for key, value in TINY.items() if not key.startswith(("encoder", "data.img"))}
    return given | {
        "init": str(init), "data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir), "data.hflip": "0",
        "data.crop_scale": "[0.8,1.0]", "batch_size": "12", "steps": "40", "optim.base_lr": "5e-2",
        "optim.warmup_steps": "4", "log_every_steps": "5", "save_every_steps": "5", "evaluate_every_steps": "20",
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def finetuned(shards, pretrained, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finetuned") / "run"
    given = options(shards, pretrained, run_dir)
    subprocess.run(command("finetune.py", given), check=True, env=ENVIRONMENT, capture_output=True)
    return run_dir


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def test_it_learns_colors_and_counts_every_image(finetuned):
    found = result(finetuned)
    assert found["val_images"] == 21 and found["finished"]
    assert found["best_val_top1"] >= found["val_top1"] > 50  # four classes


def test_the_classifier_loads_strictly_into_timm_with_its_classes(finetuned):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, global_pool="avg", **ARGS)
    model.load_state_dict(load_file(finetuned / "classifier.safetensors"), strict=True)
    hub = timm.create_model(f"local-dir:{finetuned / 'hub'}", pretrained=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(hub.eval()(images), model.eval()(images), atol=1e-6, rtol=0)
    assert hub.pretrained_cfg["crop_pct"] == 1  # the run's, where timm has 0.9 for this model
    best = load_file(finetuned / "classifier_best.safetensors")
    assert best.keys() == model.state_dict().keys()


def test_killed_fine_tuning_ends_with_the_same_bits(finetuned, shards, pretrained, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command("finetune.py", options(shards, pretrained, run_dir)), env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (run_dir / "state" / "step-00000015").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command("finetune.py", options(shards, pretrained, run_dir)), check=True, env=ENVIRONMENT)
    ours, wanted = load_file(run_dir / "classifier.safetensors"), load_file(finetuned / "classifier.safetensors")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert result(run_dir)["best_val_top1"] == result(finetuned)["best_val_top1"]


def test_two_processes_count_every_image_once(shards, pretrained, tmp_path, launch):
    more = {"steps": "4", "num_workers": "1", "mixing.mixup": "0", "mixing.cutmix": "0", "mixing.random_erasing": "0"}
    plain = more | {"drop_path": "0"}
    launch("finetune.py", options(shards, pretrained, tmp_path / "two", **plain), processes=2)
    launch("finetune.py", options(shards, pretrained, tmp_path / "one", **plain))
    two, one = result(tmp_path / "two"), result(tmp_path / "one")
    assert two["val_images"] == one["val_images"] == 21
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": "7"}, "even number of images"),
        ({"num_classes": "2"}, "labels up to 3, but num_classes is 2: give num_classes 4"),
        ({"data.val": "null"}, "data.val is not given"),
        ({"encoder.name": "vit_base_patch16_224"}, "tensors did not load"),
        ({"init": "vit_tny_patch16_224"}, "no such file or folder"),
        ({"data.samples_per_class": "99"}, "has 15 samples"),
        ({"mixing.mixupp": "1"}, "Did you mean mixing.mixup?"),
        ({"pool": "max"}, "pool"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_mistake_gets_one_sentence(shards, pretrained, tmp_path, capsys, change, said):
    words = arguments(options(shards, pretrained, tmp_path / "run") | change)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: parse_config(FinetuneConfig, "", words), finetune)
    printed = capsys.readouterr().err
    assert ended.value.code in (1, 2) and printed.startswith("error: ") and said in printed
    assert len(printed.strip().splitlines()) == 1


def test_unlabelled_shards_are_refused(pretrained, shards, tmp_path, capsys):
    write_tars(tmp_path, "train", 4)
    with tarfile.open(tmp_path / "train-0000.tar") as old, tarfile.open(tmp_path / "bare.tar", "w") as new:
        for member in old:
            if member.name.endswith(".png"):
                new.addfile(member, old.extractfile(member))
    words = arguments(options((str(tmp_path / "bare.tar"), shards[1]), pretrained, tmp_path / "run"))
    with pytest.raises(SystemExit):
        run_command(lambda: parse_config(FinetuneConfig, "", words), finetune)
    assert "4 of 4 samples have no label" in capsys.readouterr().err


def test_probe_reports_both_poolings_and_neighbors_alike_for_one_and_two_processes(
    shards, pretrained, tmp_path, launch
):
    given = {
        key: value
        for key, value in options(shards, pretrained, tmp_path / "one").items()
        if key.startswith(("init", "data", "run_dir", "precision", "num_workers"))
    } | {"epochs": "10", "batch_size": "16", "holdout_share": "0.2", "neighbors": "[5]"}
    printed = launch("linear_probe.py", given).stdout
    launch("linear_probe.py", given | {"run_dir": str(tmp_path / "two")}, processes=2)
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert set(one["best_by_input"]) == {"avg", "token", "both", "last4", "last4_avg"} and set(one["knn_top1"]) == {
        "avg_k5",
        "token_k5",
    }
    assert one["val_images"] == 21 and one["knn_top1"]["avg_k5"] > 40
    assert (one["linear_top1"], one["knn_top1"]) == (two["linear_top1"], two["knn_top1"])
    assert "linear probe" in printed and "k-NN" in printed
    launch("linear_probe.py", given | {"run_dir": str(tmp_path / "untrained"), "untrained": "true"})
    assert result(tmp_path / "untrained")["encoder"].endswith("initial weights")


def test_the_best_classifier_of_an_attempt_that_saved_no_state_is_forgotten(
    shards, pretrained, tmp_path, launch, finetuned
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml", "environment.json", "classifier_best.safetensors"):
        shutil.copy(finetuned / name, run_dir / name)
    launch("finetune.py", options(shards, pretrained, run_dir, steps="5", **{"optim.base_lr": "0"}))
    assert result(run_dir)["best_val_top1"] == result(run_dir)["val_top1"] < result(finetuned)["best_val_top1"]


def test_a_fine_tuning_run_serves_as_init(finetuned):
    weights = read_weights(str(finetuned))
    assert weights.source.endswith("classifier.safetensors")
    encoder, report = encoder_with_weights(weights.spec, weights)
    assert "encoder tensors loaded" in report and encoder.timm.num_classes == 0
    wanted = load_file(finetuned / "classifier.safetensors")
    assert torch.equal(encoder.timm.blocks[1].mlp.fc1.weight, wanted["blocks.1.mlp.fc1.weight"])


def labelled(*labels: int, folder: str = "/nowhere") -> ShardIndex:
    zeros = np.zeros(len(labels), np.int64)
    keys = [str(i) for i in range(len(labels))]
    return ShardIndex([f"{folder}/x.tar"], [ShardEntries(zeros, zeros, np.array(labels), keys, [])])


def test_labels_with_huge_gaps_are_refused_where_nothing_says_how_many_there_are(tmp_path):
    for largest in (99, 3):
        assert classes_of(labelled(0, 1, largest), labelled(0), None) == largest + 1
    for train, val in (((0, 1, 100), (0,)), ((0, 1), (100,)), ((1_000_000,), (1_000_000,))):
        largest = max(train + val)
        with pytest.raises(
            InputError, match=f"labels up to {largest}, but only .*give num_classes {largest + 1} if"
        ) as caught:
            classes_of(labelled(*train), labelled(*val), None)
        assert f"only {len({*train, *val})} different ones" in str(caught.value)
        assert classes_of(labelled(*train), labelled(*val), largest + 1) == largest + 1
    many = range(0, 200, 10)  # 20 of them
    assert classes_of(labelled(*many, 199), labelled(0), None) == 200
    with pytest.raises(InputError, match="only 21 different ones"):
        classes_of(labelled(*many, 210), labelled(0), None)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": [str(i) for i in range(101)]}))
    assert classes_of(labelled(0, 1, 100, folder=str(tmp_path)), labelled(0), None) == 101


def test_the_moving_average_is_evaluated_and_released_beside_the_weights(shards, pretrained, tmp_path, launch):
    launch("finetune.py", options(shards, pretrained, tmp_path / "run", ema_decay="0.5"))
    found = result(tmp_path / "run")
    assert 0 <= found["val_ema_top1"] <= 100 and found["val_ema_loss"] > 0
    average, weights = (
        load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("classifier_ema", "classifier")
    )
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[name], weights[name]) for name in weights)
