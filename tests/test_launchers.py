"""A launcher that is asked to end, or is killed: its processes save their state and end, and the command continues."""

import os
import subprocess
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import psutil
import pytest
from conftest import ROOT, arguments
from launchers import LAUNCHERS, saved_step, signalled
from ranks import LONG, is_running, steps_logged, wait_until


@pytest.mark.parametrize(
    ("launcher", "signals"),
    [
        ("accelerate, 1 process", (SIGTERM, SIGKILL)),  # it tells its process nothing
        ("accelerate, 2 processes", (SIGUSR1,)),
        ("torchrun, 2 processes", (SIGINT,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(x.name for x in value),
)
def test_processes_save_and_end_with_their_launcher(shards, tmp_path, launcher, signals):
    assert launcher in LAUNCHERS
    run_dir = tmp_path / "run"
    given = LONG | {"data.train": shards[0], "run_dir": str(run_dir)}
    saved = 0
    for i, number in enumerate(signals):
        outcome = signalled(launcher, number, given, run_dir, tmp_path / f"output-{i}.txt")
        if saved:
            assert f"continuing from step {saved} of" in outcome.said
        assert outcome.code != 0  # so that no script takes the run for finished
        saved = saved_step(run_dir)
        assert saved == steps_logged(run_dir) > outcome.began_at  # the last step that was done
        assert f"stopped behind step {saved} of" in outcome.said


def test_a_process_ends_with_its_launcher_also_before_the_first_step(shards, tmp_path):
    given = LONG | {"data.train": shards[0], "run_dir": str(tmp_path / "run")}
    words = [*LAUNCHERS["accelerate, 1 process"], str(ROOT / "launch" / "pretrain.py"), *arguments(given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "run").exists)
    (process,) = [child.pid for child in psutil.Process(launcher.pid).children()]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_running(process))
