"""Runs that are asked to stop: by any signal, at any moment, on one process or several."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, command
from safetensors.torch import load_file

LONG = TINY_PRETRAIN | {"steps": "150", "log_every_steps": "1", "save_every_steps": "1000", "record_samples": "true"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


# Sends the process the signal itself, so that it stops behind a known step.
UNTIL = """
import os, runpy, signal
from quarterlight.ssl import engine
original = engine._Loop._step
def step(self, number):
    if number + 1 == {stop_at} and number + 1 < self.total_steps and self.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    original(self, number)
engine._Loop._step = step
runpy.run_path({script!r}, run_name="__main__")
"""


def start(script: str, options: dict[str, str], **more) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(script, options, **more), env=ENVIRONMENT, start_new_session=True, **pipes)


def wait_for(path: Path, what: Callable[[str], bool], process: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and what(path.read_text()):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"{path} is not as it was to be after {timeout_s} s")


def lines(count: int) -> Callable[[str], bool]:
    return lambda text: text.count("\n") >= count


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def seen(run_dir: Path) -> list[tuple]:
    records = [
        x for file in run_dir.glob("samples-rank*.jsonl") for x in map(json.loads, file.read_text().splitlines())
    ]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in records)


def assert_same_weights(a: Path, b: Path, name: str = "encoder.safetensors") -> None:
    ours, wanted = load_file(a / name), load_file(b / name)
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    options = LONG | {"data.train": shards[0], "run_dir": str(run_dir)}
    subprocess.run(command("pretrain.py", options), env=ENVIRONMENT, check=True, capture_output=True)
    return run_dir


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_at_the_end_of_the_step_and_the_same_command_goes_on(undisturbed, shards, tmp_path, name):
    run_dir = tmp_path / "run"
    options = LONG | {"data.train": shards[0], "run_dir": str(run_dir), "num_workers": "1"}
    process = start("pretrain.py", options)
    wait_for(run_dir / "metrics.jsonl", lines(5), process)
    os.killpg(process.pid, getattr(signal, name))  # data workers get it as well, as from a terminal or SLURM
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    stopped = result(run_dir)
    assert stopped["preempted"] and not stopped["finished"] and stopped["signal"] == name
    assert 5 <= stopped["step"] < 150 and logged(run_dir)[-1]["step"] == stopped["step"]
    assert f"{name}: saving at the end of this step" in said
    assert f"stopped behind step {stopped['step']} of 150, its state saved" in said and "Traceback" not in said
    assert [path.name for path in (run_dir / "state").iterdir()] == [f"step-{stopped['step']:08d}"]
    subprocess.run(command("pretrain.py", options), env=ENVIRONMENT, check=True, capture_output=True)
    assert result(run_dir)["finished"]
    assert_same_weights(run_dir, undisturbed)
    assert seen(run_dir) == seen(undisturbed)
    assert [x["step"] for x in logged(run_dir)] == list(range(1, 151))


def test_a_signal_to_one_of_two_processes_stops_both(shards, tmp_path):
    run_dir = tmp_path / "run"
    options = LONG | {"data.train": shards[0], "run_dir": str(run_dir)}
    process = start("pretrain.py", options, processes=2)
    wait_for(run_dir / "metrics.jsonl", lines(3), process)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and result(run_dir)["preempted"], said
    assert len(list((run_dir / "state").glob("step-*"))) == 1
    done = subprocess.run(command("pretrain.py", options, processes=2), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(seen(run_dir)) == 150 * 8 and {step for step, *_ in seen(run_dir)} == set(range(150))


def pid_of_rank(launcher: int, rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def test_the_second_signal_stops_at_once(shards, tmp_path):
    run_dir = tmp_path / "run"
    # A loader that never gives a second batch: the step that the first signal waits for does not end.
    slow = "import sys, time\nfrom quarterlight.ssl.batches import Samples\noriginal = Samples.batch\n"
    slow += "def batch(self, start, *more):\n    time.sleep(600 * start)\n    return original(self, start, *more)\n"
    slow += "Samples.batch = batch\n"
    slow += f"import runpy\nrunpy.run_path({command('pretrain.py', {})[-1]!r}, run_name='__main__')"
    options = LONG | {"data.train": shards[0], "run_dir": str(run_dir)}
    words = [sys.executable, "-c", slow, *command("pretrain.py", options)[2:]]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(run_dir / "metrics.jsonl", lines(1), process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a launcher's copy of the first
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)  # a warning is no second request
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not (run_dir / "state").exists()


FORKSERVER = """
import runpy
from quarterlight.ssl import loader
original = loader._start_method
loader._start_method = lambda cuda: original(True)
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_workers_as_they_are_started_beside_a_gpu_do_not_die_of_a_jobs_signal(shards, tmp_path, name):
    """16 micro-batches a step: it cannot be finished by what has been read ahead."""
    run_dir = tmp_path / "run"
    given = {"num_workers": "1", "batch_size": "16", "micro_batch_size": "1", "run_dir": str(run_dir)}
    words = command("pretrain.py", LONG | given | {"data.train": shards[0]})
    script = tmp_path / "forkserver.py"
    script.write_text(FORKSERVER.replace("SCRIPT", repr(words[1])))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([words[0], str(script), *words[2:]], env=ENVIRONMENT, start_new_session=True, **pipes)
    wait_for(run_dir / "metrics.jsonl", lines(2), process)
    os.killpg(process.pid, getattr(signal, name))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in said, said
    assert len(list((run_dir / "state").glob("step-*"))) == 1


HANGING = """
import os, signal, sys, threading, time
import torch.distributed as dist, torch
from quarterlight.ssl.signals import StopSignals
dist.init_process_group("gloo")
with StopSignals():
    if dist.get_rank() == 0:
        print("waiting", flush=True)
        dist.all_reduce(torch.ones(1))  # in C++, where no handler of Python's runs
    else:
        time.sleep(600)
"""


def test_the_second_signal_ends_a_process_that_waits_for_another_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING],
            env=ENVIRONMENT | group | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while "waiting" not in (line := ranks[0].stdout.readline()):
            assert line, "it ended"
        time.sleep(1)
        ranks[0].send_signal(signal.SIGTERM)
        assert "SIGTERM: saving at the end of this step" in ranks[0].stdout.readline()
        time.sleep(1.2)
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(30) == 128 + signal.SIGTERM
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


TINY_FINETUNE = TINY | {
    "batch_size": "8", "steps": "40", "optim.warmup_steps": "2", "optim.base_lr": "1e-3", "log_every_steps": "1",
    "save_every_steps": "1000", "evaluate_every_steps": "10", "micro_batch_size": "2",
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_an_evaluation_stops_it_and_the_evaluation_is_done_again(shards, tmp_path, processes):
    def options(name: str) -> dict[str, str]:
        return TINY_FINETUNE | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / name)}

    more = {"processes": processes}
    subprocess.run(command("finetune.py", options("a"), **more), env=ENVIRONMENT, check=True, capture_output=True)
    # Evaluation batches wait for a file, so that the signal comes in the middle of the second evaluation.
    gate = tmp_path / "gate"
    wait = "import os, sys, time\nfrom quarterlight.ssl.batches import Samples\noriginal = Samples.batch\ncalls = [0]\n"
    wait += "def batch(self, start, *more):\n    from quarterlight.ssl.augment import CenterCrop\n"
    wait += (
        "    if isinstance(self.transform, CenterCrop):\n        calls[0] += 1\n        while calls[0] > 14 and not "
    )
    wait += (
        f"os.path.exists({str(gate)!r}):\n            open({str(gate) + '.reached'!r}, 'w').close(); time.sleep(0.01)\n"
    )
    wait += "    return original(self, start, *more)\nSamples.batch = batch\n"
    script = tmp_path / "gated.py"
    main = "import runpy\nrunpy.run_path({!r}, run_name='__main__')"
    script.write_text(wait + main.format(command("finetune.py", {})[-1]))
    words = command("finetune.py", options("b"), **more)
    words = [str(script) if word.endswith("finetune.py") else word for word in words]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "gate.reached", lambda text: True, process)
    os.kill(pid_of_rank(process.pid, 1) if processes == 2 else process.pid, signal.SIGTERM)
    time.sleep(0.2)
    gate.touch()
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 75 if processes == 1 else process.returncode, said
    stopped = result(tmp_path / "b")
    assert stopped["preempted"] and stopped["step"] in (10, 20, 30), stopped
    done = subprocess.run(command("finetune.py", options("b"), **more), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "a", tmp_path / "b", "classifier.safetensors")
    assert_same_weights(tmp_path / "a", tmp_path / "b", "classifier_best.safetensors")
    ours, wanted = ([x for x in logged(tmp_path / name) if "val_top1" in x] for name in "ba")
    assert ours == wanted and [x["step"] for x in ours] == [10, 20, 30, 40]
