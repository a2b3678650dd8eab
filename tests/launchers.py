"""Runs under the real launchers, which get a signal in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import ROOT, arguments
from ranks import PATIENCE_S, is_running, steps_logged, wait_until

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
LAUNCHERS = {
    "accelerate, 1 process": [*ACCELERATE, str(ROOT / "configs/accelerate/cpu.yaml")],
    "accelerate, 2 processes": [*ACCELERATE, str(ROOT / "configs/accelerate/cpu2.yaml"), "--main_process_port", "0"],
    "torchrun, 2 processes": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@dataclass
class Outcome:
    """What became of a run whose launcher got a signal."""

    code: int  # of the launcher
    launcher_s: float  # until it had ended
    processes_s: float  # until all training processes had
    began_at: int  # the step from which this start continued
    said: str


def signalled(launcher: str, number: signal.Signals, options: dict[str, str], run_dir: Path, output: Path) -> Outcome:
    """Starts or continues a run, sends its launcher a signal after some steps, and waits for all of its processes."""
    before, environment = steps_logged(run_dir), os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    words = [*LAUNCHERS[launcher], str(ROOT / "launch" / "pretrain.py"), *arguments(options)]
    with output.open("w") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    ours: list[int] = []
    try:
        wait_until(lambda: steps_logged(run_dir) > before + 5 or process.poll() is not None)
        assert process.poll() is None, output.read_text()[-4000:]
        ours = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        sent_at = time.monotonic()
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
        launcher_s = time.monotonic() - sent_at
        wait_until(lambda: not any(map(is_running, ours)))
        return Outcome(code, launcher_s, time.monotonic() - sent_at, before, output.read_text())
    finally:
        process.kill()
        for pid in filter(is_running, ours):
            os.kill(pid, signal.SIGKILL)


def saved_step(run_dir: Path) -> int:
    """Returns the step of which result.json says that it was saved; fails unless its state is there."""
    result = json.loads((run_dir / "result.json").read_text())
    assert result["preempted"] and not result["finished"], result
    assert (run_dir / "state" / f"step-{result['step']:08d}" / "progress.json").exists()
    return result["step"]
