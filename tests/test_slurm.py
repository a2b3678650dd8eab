"""launch/slurm/run.sbatch as SLURM runs it, with an `srun` and a `scontrol` that start processes on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY_PRETRAIN, arguments

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "run.sbatch"

# As SLURM does: tasks side by side, each told who it is, and the highest of their exit statuses.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
    echo $! >> "$SCRATCH/pids"
done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$*" >> "$SCRATCH/requeued"; fi
"""


def free_job_id() -> int:
    """Returns the id of a job whose port is free."""
    for number in range(os.getpid() % 9000, 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20_000 + number)):
                return number
    raise AssertionError("no free port")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a job of two tasks."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": str(free_job_id()), "JOB_NODELIST": "localhost", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    mine = {"PATH": path, "SCRATCH": str(tmp_path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return os.environ | {f"SLURM_{key}": value for key, value in slurm.items()} | mine


def test_what_sbatch_is_asked_for():
    asked = re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.M)
    assert {"--signal=USR1@180", "--requeue", "--open-mode=append"} <= set(asked)


def test_tasks_know_who_they_are_and_other_ends_are_not_queued_again(tmp_path, job):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"import os; os.write(1, ' '.join([*map(os.environ.get, {names})]).encode() + b'\\n'); "
    code += "exit(1 + int(os.environ['RANK']))"
    done = subprocess.run(["bash", SCRIPT, "-c", code], env=job, capture_output=True, text=True, timeout=60)
    port = 20_000 + int(job["SLURM_JOB_ID"])
    assert sorted(done.stdout.splitlines()) == [f"{rank} {rank} 2 2 localhost {port}" for rank in (0, 1)]
    assert done.returncode == 2 and not (tmp_path / "requeued").exists()


def test_a_signal_before_the_run_has_begun_queues_it_again(tmp_path, job):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    done = subprocess.run(["bash", SCRIPT, "-c", code], env=job, capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").exists()


def test_a_run_out_of_time_is_queued_again_and_goes_on_to_its_end(shards, tmp_path, job):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = {"data.train": shards[0], "run_dir": str(run_dir), "steps": "40", "log_every_steps": "1"}
    words = ["bash", str(SCRIPT), "launch/pretrain.py", *arguments(TINY_PRETRAIN | more | {"save_every_steps": "1000"})]
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=job, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while "step 2/40" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            for pid in map(int, (tmp_path / "pids").read_text().split()):
                os.kill(pid, signal.SIGUSR1)
            assert process.wait(120) == 75, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["preempted"] and not result["finished"] and result["signal"] == "SIGUSR1"
    assert [path.name for path in (run_dir / "state").iterdir()] == [f"step-{result['step']:08d}"]
    done = subprocess.run(words, cwd=ROOT, env=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {result['step']} of 40" in done.stdout
    assert json.loads((run_dir / "result.json").read_text())["finished"]
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
