"""Does a run depend on how many processes and workers share it, or on being killed? Prints a table and one JSON line.

python benchmarks/determinism.py --train 'shards/cifar10/train-*.tar' --dir runs/determinism

Runs the real pretraining command for some steps with 1 and 2 processes and 0, 1 and 3 workers, recording a hash of
the key, pixels and mask of every sample, and once more with SIGKILL at random moments.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SETTINGS = [(1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 3)]  # processes, workers


def command(train: str, run_dir: Path, steps: int, workers: int, processes: int, *more: str) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        *start, str(ROOT / "launch" / "pretrain.py"), "--config", str(ROOT / "configs/pretrain/cifar10_vit_tiny.yaml"),
        "--data.train", train, "--run_dir", str(run_dir), "--epochs", "null", "--steps", str(steps),
        "--batch_size", "64", "--optim.warmup_epochs", "null", "--optim.warmup_steps", "5",
        "--num_workers", str(workers), "--precision", "no", "--log_every_steps", "1", "--save_every_steps", "5",
        "--record_samples", "true", *more,
    ]  # fmt: skip


def seen(run_dir: Path) -> dict[int, list[tuple]]:
    """Returns (key, pixel hash, mask hash) of every sample by step, whichever process saw it."""
    steps: dict[int, set[tuple]] = {}
    for file in run_dir.glob("samples-rank*.jsonl"):
        for x in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(x["step"], set()).add((x["key"], x["pixels"], x["mask"]))
    return {step: sorted(samples) for step, samples in steps.items()}


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_killed(words: list[str], run_dir: Path, moments: list[float]) -> list[int]:
    """Starts `words` again and again, killing it at each moment, and lets it end at last.

    A moment is a step and a fraction: of a second, after that step was logged. Returns the exit codes: -9 for a process
    that was really killed.
    """
    codes = []
    for moment in moments:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) > int(moment):
                time.sleep(moment % 1)
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="CIFAR-10 training shards")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1: what one GPU can do")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    reference = given.dir / "1-process-0-workers"
    figures = []
    print(f"{'processes':>9} {'workers':>7} {'samples equal':>13} {'largest loss difference':>23}")
    for processes, workers in SETTINGS:
        if processes not in given.processes:
            continue
        run_dir = given.dir / f"{processes}-process-{workers}-workers"
        words = command(given.train, run_dir, given.steps, workers, processes)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        equal = seen(run_dir) == seen(reference) and len(seen(run_dir)) == given.steps
        difference = max(abs(a - b) for a, b in zip(losses(run_dir), losses(reference), strict=True))
        print(f"{processes:9} {workers:7} {equal!s:>13} {difference:23.1e}", flush=True)
        figures.append(
            {"processes": processes, "workers": workers, "samples_equal": equal, "loss_difference": difference}
        )
    killed = given.dir / "killed"
    words = command(given.train, killed, given.steps, 1, 1)
    rng = random.Random(0)
    moments = sorted(rng.uniform(0, given.steps - 2) for _ in range(given.kills))
    codes = run_killed(words, killed, moments)
    ours, wanted = (load_file(run_dir / "encoder.safetensors") for run_dir in (killed, reference))
    bits = all(torch.equal(ours[name], wanted[name]) for name in wanted)
    print(
        f"killed at steps {', '.join(f'{m:.1f}' for m in moments)} (exit codes {codes}): weights bit-identical: {bits}"
    )
    same = seen(killed) == seen(reference)
    print(
        json.dumps({"settings": figures, "kills": codes.count(-9), "bit_identical": bits, "killed_samples_equal": same})
    )


if __name__ == "__main__":
    main()
