"""Does a run depend on how many processes and workers share it, or on being killed? Prints a table and one JSON line.

python benchmarks/determinism.py --train 'shards/cifar10/train-*.tar' --dir runs/determinism

Runs the real pretraining command for some steps with 1 and 2 CPU processes and 0, 1 and 3 workers, recording a hash of
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


def run_killed(words: list[str], kills: int, longest_s: float, rng: random.Random) -> list[float]:
    """Starts `words` again and again, killing it after a random time, then lets it end. Returns these times."""
    times = []
    for _ in range(kills):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(rng.uniform(0.3, 1) * longest_s)
        time.sleep(times[-1])
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="CIFAR-10 training shards")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    reference = given.dir / "1-process-0-workers"
    figures = []
    print(f"{'processes':>9} {'workers':>7} {'samples equal':>13} {'largest loss difference':>23}")
    for processes, workers in SETTINGS:
        run_dir = given.dir / f"{processes}-process-{workers}-workers"
        started_at = time.perf_counter()
        words = command(given.train, run_dir, given.steps, workers, processes)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        elapsed_s = time.perf_counter() - started_at
        equal = seen(run_dir) == seen(reference) and len(seen(run_dir)) == given.steps
        difference = max(abs(a - b) for a, b in zip(losses(run_dir), losses(reference), strict=True))
        print(f"{processes:9} {workers:7} {equal!s:>13} {difference:23.1e}", flush=True)
        figures.append(
            {"processes": processes, "workers": workers, "samples_equal": equal, "loss_difference": difference}
        )
        if (processes, workers) == (1, 0):
            longest_s = elapsed_s
    killed = given.dir / "killed"
    words = command(given.train, killed, given.steps, 1, 1)
    times = run_killed(words, given.kills, longest_s, random.Random(0))
    ours, wanted = (load_file(run_dir / "encoder.safetensors") for run_dir in (killed, reference))
    bits = all(torch.equal(ours[name], wanted[name]) for name in wanted)
    print(f"killed {given.kills} times, after {', '.join(f'{t:.1f}' for t in times)} s: weights bit-identical: {bits}")
    same = seen(killed) == seen(reference)
    print(json.dumps({"settings": figures, "kills": given.kills, "bit_identical": bits, "killed_samples_equal": same}))


if __name__ == "__main__":
    main()
