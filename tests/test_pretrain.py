"""The pretraining command as users start it: real processes, killed and resumed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY_PRETRAIN, arguments, command
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.pretrain import pretrain


def options(shards: tuple[str, str], run_dir: Path, **more: str) -> dict[str, str]:
    return TINY_PRETRAIN | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(run_dir)} | more


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples(run_dir: Path) -> list[tuple]:
    """Returns what a run has seen, in the order of steps, whichever process saw it."""
    lines = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in lines)


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory) -> Path:
    """A run of one process, never disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = options(shards, run_dir, record_samples="true")
    subprocess.run(command("pretrain.py", given), check=True, env=environment, capture_output=True)
    return run_dir


def test_a_run_leaves_what_the_design_says(reference):
    names = {path.name for path in reference.iterdir()}
    wanted = {"config.yaml", "environment.json", "metrics.jsonl", "encoder.safetensors", "hub", "result.json", "state"}
    assert wanted | {"reconstructions.png"} <= names
    assert not [
        path for path in reference.rglob("*") if path.name.endswith((".partial", ".old", ".bin", ".pkl", ".pt"))
    ]
    assert [path.name for path in sorted((reference / "state").iterdir())] == ["step-00000008", "step-00000012"]
    result = json.loads((reference / "result.json").read_text())
    assert result["finished"] and result["steps"] == 12 and result["loss"] > 0
    assert [x["step"] for x in records(reference)] == [2, 4, 6, 8, 10, 12]


def test_released_weights_load_strictly_into_timm(reference):
    tensors = load_file(reference / "encoder.safetensors")
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    model.load_state_dict(tensors, strict=True)
    hub = timm.create_model(f"local-dir:{reference / 'hub'}", pretrained=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), hub.eval()(images), atol=1e-6, rtol=0)
    larger = timm.create_model(f"local-dir:{reference / 'hub'}", pretrained=True, img_size=24)
    assert larger.eval()(torch.randn(1, 3, 24, 24)).shape == (1, 24)


def test_tensorboard_holds_curves_and_pictures(reference):
    events = EventAccumulator(str(reference), size_guidance={"images": 0})
    events.Reload()
    assert {"loss", "lr", "images_per_s"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == 1


@pytest.mark.parametrize("more", [{"num_workers": "2"}, {"micro_batch_size": "2"}], ids=["workers", "accumulation"])
def test_workers_and_accumulation_change_nothing_seen(reference, shards, tmp_path, launch, more):
    launch("pretrain.py", options(shards, tmp_path / "run", record_samples="true", **more))
    assert samples(tmp_path / "run") == samples(reference)
    for ours, wanted in zip(records(tmp_path / "run"), records(reference), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-4)


def test_two_processes_see_and_learn_the_same_as_one(reference, shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run", record_samples="true", num_workers="1"), processes=2)
    assert samples(tmp_path / "run") == samples(reference)
    for ours, wanted in zip(records(tmp_path / "run"), records(reference), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-4)
    assert done.stdout.count("step 12/12") == 1


def test_killed_at_any_moment_the_run_ends_with_the_same_bits(reference, shards, tmp_path):
    run_dir = tmp_path / "run"
    given = options(shards, run_dir, record_samples="true", log_every_steps="1", save_every_steps="1")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for after in (0, 2, 7):  # killed once so many steps are logged, so in the middle of one or of its saving
        process = subprocess.Popen(
            command("pretrain.py", given), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        metrics = run_dir / "metrics.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > after:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command("pretrain.py", given), check=True, env=environment, capture_output=True)
    ours, wanted = load_file(run_dir / "encoder.safetensors"), load_file(reference / "encoder.safetensors")
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    moments = "state/step-00000012/optimizer.safetensors"
    ours, wanted = load_file(run_dir / moments), load_file(reference / moments)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert [x["step"] for x in records(run_dir)] == list(range(1, 13))
    assert set(samples(run_dir)) == set(samples(reference))


def test_the_same_command_after_the_end_changes_nothing(reference, shards, launch):
    before = load_file(reference / "encoder.safetensors")
    launch("pretrain.py", options(shards, reference, record_samples="true"))
    after = load_file(reference / "encoder.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((reference / "result.json").read_text())["loss"] > 0


def test_bf16_runs_work(shards, tmp_path, launch):
    launch("pretrain.py", options(shards, tmp_path / "run", precision="bf16", steps="3"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optim.base_lrr": "1"}, "Did you mean optim.base_lr?"),
        ({"data.train": "nowhere/train-*.tar"}, "matches no file"),
        ({"data.train": "nowhere/train-0.tar"}, "does not exist"),
        ({"data.img_size": "18"}, "not a multiple of the patch size 4: use 16 or 20"),
        ({"encoder.name": "vit_tny_patch16_224"}, "Did you mean vit_tiny_patch16_224"),
        ({"encoder.name": "swin_tiny_patch4_window7_224", "encoder.args": "{}"}, "not supported"),
        ({"init": "nowhere"}, "no such file or folder"),
        ({"micro_batch_size": "3"}, "use 1, 2, 4"),
        ({"mask.ratio": "1"}, "not in [0, 1)"),
        ({"steps": "null"}, "give exactly one"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"run_dir": "/proc/quarterlight"}, "/proc/quarterlight"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_mistake_gets_one_sentence(shards, tmp_path, capsys, change, said):
    words = arguments(options(shards, tmp_path / "run") | change)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: parse_config(PretrainConfig, "", words), pretrain)
    assert ended.value.code in (1, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and said in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_mistake_ends_the_process_without_a_traceback(shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run") | {"data.train": "nowhere/*.tar"}, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: shards: nowhere/*.tar matches no file")
    assert len(done.stderr.splitlines()) == 1


def test_a_batch_that_does_not_divide_is_refused_once(shards, tmp_path, launch):
    done = launch("pretrain.py", options(shards, tmp_path / "run", batch_size="7"), processes=2, check=False)
    assert done.returncode
    assert done.stderr.count("batch_size 7 is not a multiple of the 2 processes: use 6 or 8") == 1


def test_other_data_in_the_same_run_folder_is_refused(reference, shards, launch):
    done = launch("pretrain.py", options((shards[1], shards[1]), reference, record_samples="true"), check=False)
    assert "was trained on other shards" in done.stderr and done.returncode == 1
