"""What goes wrong in the middle of a run: numbers, disks, and another number of processes than before."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY_PRETRAIN, command
from safetensors.torch import load_file
from test_stopping import ENVIRONMENT, UNTIL, assert_same_weights, logged, seen

NAN_AT = """
import os, runpy, sys
import torch
from quarterlight.ssl import pretrain
steps, rank = {steps}, int(os.environ.get("RANK", 0))
original, calls = pretrain.PretrainTask.forward, [0]
def forward(self, batch):
    loss, metrics = original(self, batch)
    step = calls[0] // {passes}
    calls[0] += 1
    return (loss * float("{value}") if step in steps and rank == {rank} else loss), metrics
pretrain.PretrainTask.forward = forward
runpy.run_path({script!r}, run_name="__main__")
"""


def with_nan(tmp_path: Path, options: dict[str, str], processes: int = 1, **how) -> subprocess.CompletedProcess:
    """Runs pretraining with the loss of some steps multiplied by a value, on one rank."""
    words = command("pretrain.py", options, processes=processes)
    at = next(i for i, word in enumerate(words) if word.endswith("pretrain.py"))
    script = tmp_path / "nan.py"
    script.write_text(NAN_AT.format(script=words[at], **{"passes": 1, "rank": 0, "value": "nan"} | how))
    words[at] = str(script)
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


def options(shards, run_dir: Path, **more: str) -> dict[str, str]:
    return TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(run_dir), "log_every_steps": "1"} | more


def run(given: dict[str, str], *, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    words = command("pretrain.py", given, processes=processes)
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert not (check and done.returncode), done.stdout + done.stderr
    return done


@pytest.mark.parametrize("how", [{}, {"value": "inf"}, {"processes": 2, "rank": 1}])
def test_a_step_whose_loss_is_not_finite_is_skipped_on_all_processes_alike(shards, tmp_path, how):
    done = with_nan(tmp_path, options(shards, tmp_path / "run", record_samples="true"), steps=[3, 4, 8], **how)
    assert done.returncode == 0, done.stderr
    records = logged(tmp_path / "run")
    assert [x["step"] for x in records if x["loss"] is None] == [4, 5, 9]
    assert records[-1]["skipped_steps"] == 3 and "skipped_steps 3" in done.stdout
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [x["step"] for x in bad] == [3, 4, 8] and all(not re.match(r"-?\d", x["loss"]) for x in bad)
    for x in bad:
        assert sorted(x["keys"]) == sorted(key for step, key, *_ in seen(tmp_path / "run") if step == x["step"])
    assert "step 4: the loss is" in done.stdout and "so it is skipped" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 3


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(shards, tmp_path):
    for name, steps in (("a", "4"), ("b", "6")):
        given = options(shards, tmp_path / name, **{"steps": steps, "optim.base_lr": "1e-2", "optim.warmup_steps": "1"})
        done = with_nan(tmp_path, given | {"optim.min_lr": "0", "save_every_steps": "4"}, steps=[4, 5])
        assert done.returncode == 0, done.stderr
    states = tmp_path / "b" / "state"
    for file in ("model", "optimizer"):
        assert_same_weights(states / "step-00000004", states / "step-00000006", f"{file}.safetensors")


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_way_out(shards, tmp_path):
    given = options(shards, tmp_path / "run", max_skipped_steps="2")
    done = with_nan(tmp_path, given, steps=[2, 3, 5, 6, 7])
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "the loss is nan at step 8, and 3 steps in a row were skipped" in done.stderr
    assert "lower optim.base_lr" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "state" / "step-00000004").is_dir()


@contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A tmpfs of so many kilobytes at `folder`."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def room_for(shards, tmp_path) -> tuple[int, Path]:
    """Returns the kilobytes of a state, and an undisturbed run."""
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(
        command("pretrain.py", options(shards, undisturbed)), env=ENVIRONMENT, check=True, capture_output=True
    )
    state = undisturbed / "state" / "step-00000012"
    return sum(file.stat().st_size for file in state.iterdir()) // 1024, undisturbed


@pytest.mark.parametrize("processes", [1, 2])
def test_on_a_full_disk_a_run_goes_on_to_the_next_save_and_then_ends(shards, tmp_path, processes):
    state_kb, undisturbed = room_for(shards, tmp_path)
    disk = tmp_path / "disk"
    with small_disk(disk, int(1.75 * state_kb) + 60):
        given = options(shards, disk / "run")
        done = run(given, processes=processes, check=False)
        assert done.returncode == 1 and done.stderr.count("error: step 12: ") == 1, done.stdout + done.stderr
        assert re.search(
            r"step 8: .* cannot be written \(.*No space left.*the state of step-00000004 is whole", done.stdout
        )
        assert "The run goes on" in done.stdout and "Make room or mend the disk" in done.stderr
        assert [path.name for path in (disk / "run" / "state").iterdir()] == ["step-00000004"]
        subprocess.run(["mount", "-o", f"remount,size={20 * state_kb}k", str(disk)], check=True)
        done = run(given, processes=processes, check=False)
        assert done.returncode == 0 and "continuing from step 4 of 12" in done.stdout, done.stderr
        if processes == 1:
            assert_same_weights(disk / "run", undisturbed)
        assert [x["step"] for x in logged(disk / "run")] == list(range(1, 13))


def test_a_run_saves_again_once_there_is_room(shards, tmp_path):
    state_kb, undisturbed = room_for(shards, tmp_path)
    disk = tmp_path / "disk"
    with small_disk(disk, int(1.75 * state_kb) + 60):
        given = options(shards, disk / "run", steps="4000", save_every_steps="400", log_every_steps="400")
        process = subprocess.Popen(command("pretrain.py", given), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "The run goes on" in line:
                subprocess.run(["mount", "-o", f"remount,size={20 * state_kb}k", str(disk)], check=True)
                break
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert "cannot be written" not in said
        assert len(list((disk / "run" / "state").glob("step-*"))) == 2


def test_a_full_disk_for_records_only_is_said_once_and_ends_nothing(shards, tmp_path):
    # /dev/full takes nothing: it stands in for metrics.jsonl alone.
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    code = (
        "from pathlib import Path\nfrom quarterlight.ssl.log import RunLog\n"
        f"log = RunLog(Path({str(run_dir)!r}), first_step=0, total_steps=9, enabled=True)\n"
        f"Path({str(run_dir / 'metrics.jsonl')!r}).symlink_to('/dev/full')\n"
        "for step in range(3):\n    log.metrics(step + 1, {'loss': 1.0, 'lr': 0.1})\nlog.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records cannot be written (No space left on device)") == 1
    assert done.stdout.count("loss 1") == 3


def test_a_run_moves_between_numbers_of_processes_in_mid_epoch(shards, tmp_path):
    """60 images in batches of 8: no stop falls on the end of an epoch."""
    given = {"steps": "24", "save_every_steps": "1000", "record_samples": "true", "data.img_size": "16"}
    alone = options(shards, tmp_path / "alone", **given)
    run(alone)
    moved = options(shards, tmp_path / "moved", **given)
    for processes, stop_at, more in (
        (1, 5, {}),
        (2, 11, {"num_workers": "1", "micro_batch_size": "2"}),
        (4, 17, {"micro_batch_size": "1"}),
        (1, 24, {"num_workers": "2", "micro_batch_size": "4"}),
    ):
        words = command("pretrain.py", moved | more | {"save_every_steps": str(stop_at)}, processes=processes)
        script = tmp_path / f"until{stop_at}.py"
        at = next(i for i, word in enumerate(words) if word.endswith("pretrain.py"))
        script.write_text(UNTIL.format(stop_at=stop_at, script=words[at]))
        words[at] = str(script)
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert (done.returncode == 0) == (stop_at == 24), done.stderr
    assert seen(tmp_path / "moved") == seen(tmp_path / "alone")
    ours, wanted = logged(tmp_path / "moved"), logged(tmp_path / "alone")
    assert [x["step"] for x in ours] == list(range(1, 25))
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-3) for a, b in zip(ours, wanted, strict=True))
    assert [a["lr"] for a in ours] == [b["lr"] for b in wanted]


@pytest.mark.parametrize(("processes", "said"), [(3, "batch_size 8 is not a multiple of the 3 processes: use 6 or 9")])
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(shards, tmp_path, processes, said):
    words = command("pretrain.py", options(shards, tmp_path / "run"), processes=processes)
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and done.stderr.count(said) == 1, done.stderr


def test_the_moving_average_is_part_of_the_state(shards, tmp_path):
    given = {"ema_decay": "0.8", "save_every_steps": "1000", "data.img_size": "16"}
    run(options(shards, tmp_path / "whole", **given))
    for stop_at, processes in ((5, 1), (12, 2)):
        words = command("pretrain.py", options(shards, tmp_path / "moved", **given), processes=processes)
        at = next(i for i, word in enumerate(words) if word.endswith("pretrain.py"))
        script = tmp_path / f"until{stop_at}.py"
        script.write_text(UNTIL.format(stop_at=stop_at, script=words[at]))
        words[at] = str(script)
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == (0 if stop_at == 12 else 75), done.stderr
    ours, wanted = (load_file(tmp_path / name / "encoder_ema.safetensors") for name in ("moved", "whole"))
    weights = load_file(tmp_path / "whole" / "encoder.safetensors")
    for name, value in wanted.items():
        if not name.endswith("qkv.bias"):  # the keys' part moves by rounding alone
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(value, weights[name]) for name, value in wanted.items())


def test_the_average_is_that_of_the_formula(shards, tmp_path):
    given = options(shards, tmp_path / "run", ema_decay="0.8", save_every_steps="1", keep_states="12")
    run(given)
    states = sorted((tmp_path / "run" / "state").iterdir())
    average = load_file(states[0] / "model.safetensors")  # the first step takes the weights over
    for state in states[1:]:
        model = load_file(state / "model.safetensors")
        average = {name: 0.8 * x + 0.2 * model[name] for name, x in average.items()}
    found = load_file(states[-1] / "ema.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_continues_from_the_state_before_a_damaged_one_and_says_why(shards, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    run(options(shards, undisturbed))
    run_dir = tmp_path / "run"
    run(options(shards, run_dir))
    newest = run_dir / "state" / "step-00000012"
    for name, damage, why in (
        ("model.safetensors", lambda path: flip(path, 0.5), "is damaged"),
        ("optimizer.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        ("progress.json", lambda path: path.unlink(), "cannot be read"),
    ):
        damage(newest / name)
        done = run(options(shards, run_dir))
        assert re.search(rf"step-00000012: {name} {why}.*; it is passed over", done.stdout), done.stdout
        assert "continuing from step 8 of 12" in done.stdout
        assert_same_weights(run_dir, undisturbed)
        assert [x["step"] for x in logged(run_dir)] == list(range(1, 13))


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_a_run_that_is_stopped_on_a_full_disk_says_that_its_state_is_not_saved(shards, tmp_path):
    state_kb, _ = room_for(shards, tmp_path)
    disk = tmp_path / "disk"
    with small_disk(disk, int(0.5 * state_kb) + 60):
        words = command("pretrain.py", options(shards, disk / "run", save_every_steps="1000"))
        script = tmp_path / "until.py"
        script.write_text(UNTIL.format(stop_at=5, script=words[1]))
        done = subprocess.run([words[0], str(script), *words[2:]], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout + done.stderr
        assert re.search(r"error: step 5: .*No space left on device.*; no state was saved before", done.stderr)
        assert "its state saved" not in done.stdout
