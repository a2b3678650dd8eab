"""A short form of benchmarks/chaos.py: the real command, killed where a state takes another one's place."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import write_tars
from test_stopping import ENVIRONMENT

CHAOS = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


def test_kills_in_rotation_lose_nothing(tmp_path):
    train, val = write_tars(tmp_path / "shards", "train", 60), write_tars(tmp_path / "shards", "val", 21)
    words = ["--train", train, "--val", val, "--dir", str(tmp_path / "runs"), "--runs", "pretrain-1"]
    words += ["--kills", "3", "--only", "in rotation"]
    done = subprocess.run([sys.executable, str(CHAOS), *words], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"faults": 3, "runs_compared": 1, "nothing_lost": True}
