"""What does a run over two machines do when the cable between them is pulled out? Prints tables and one JSON line.

python benchmarks/two_machines.py --dir runs/two-machines          (as root, on Linux, with iproute2)

Two network namespaces of this machine, joined by a switch in a third one, are machines of two processes each;
the real command is started on both by the real launchers. The link is cut for 30 s, and for good; then the same
commands are started again. Everything is compared with a run that was not disturbed.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hosts import ADDRESSES, Hosts, two_hosts, why_not  # noqa: E402

LAUNCHERS = {
    "accelerate": "accelerate launch --config_file configs/accelerate/nodes2_cpu.yaml",
    "torchrun": "torchrun --rdzv_backend c10d",
}


def command(launcher: str, machine: int, options: list[str]) -> list[str]:
    if launcher == "accelerate":
        config = str(ROOT / "configs/accelerate/nodes2_cpu.yaml")
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_machines", "2"]
        start += ["--num_processes", "4", "--machine_rank", str(machine), "--main_process_ip", ADDRESSES[0]]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
        start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "--rdzv_id", "two-machines"]
    return [*start, str(ROOT / "launch" / "pretrain.py"), *options]


class Machine:
    """One machine's part of a run: its launcher, and what it said and when."""

    def __init__(self, hosts: Hosts, launcher: str, number: int, options: list[str], log: Path) -> None:
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0"}
        self.number, self.lines = number, []
        self.ended_at: float | None = None
        self.process = subprocess.Popen(
            hosts.words(number, command(launcher, number, options)),
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._log = log.open("a")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))
            self._log.write(f"{time.monotonic():.1f} {line}")
            self._log.flush()
        self.process.wait()
        self.ended_at = time.monotonic()

    def wait(self, limit_s: float) -> int | None:
        """Returns the exit code, or None where the launcher has not ended."""
        self._reader.join(limit_s)
        return self.process.poll()

    def said(self, word: str) -> list[tuple[float, str]]:
        return [(at, line) for at, line in self.lines if line.startswith(word)]


def start(hosts: Hosts, launcher: str, options: list[str], log: Path) -> list[Machine]:
    return [Machine(hosts, launcher, number, options, log.with_name(f"{log.name}-{number}.txt")) for number in (0, 1)]


def wait_for_step(both: list[Machine], step: int, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not both[0].said(f"step {step}/"):
        if time.monotonic() > deadline or any(machine.process.poll() is not None for machine in both):
            raise SystemExit("\n".join(line for machine in both for _, line in machine.lines[-30:]))
        time.sleep(0.01)


def seen(run_dir: Path) -> list[tuple]:
    """Returns (step, key, pixels, mask) of every sample that was seen, as often as it was."""
    lines = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in lines)


def compared(run_dir: Path, reference: Path) -> dict[str, bool]:
    ours, wanted = (load_file(folder / "encoder.safetensors") for folder in (run_dir, reference))
    return {
        "samples_as_owed": seen(run_dir) == seen(reference),
        "weights_equal": all(torch.equal(ours[name], wanted[name]) for name in wanted),
        "losses_equal": _losses(run_dir) == _losses(reference),
    }


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def for_a_while(hosts: Hosts, launcher: str, options: list[str], run_dir: Path, at_step: int, cut_s: float):
    """Cuts the link for `cut_s`. Returns how the run went on."""
    both = start(hosts, launcher, options, run_dir)
    wait_for_step(both, at_step)
    hosts.cut()
    cut_at = time.monotonic()
    time.sleep(cut_s)
    hosts.mend()
    codes = [machine.wait(600) for machine in both]
    steps = [at for at, _ in both[0].said("step ")]
    pauses = [(after - before, after) for before, after in zip(steps, steps[1:], strict=False)]
    pause, resumed_at = max(pauses, default=(0.0, cut_at))
    errors = [line for machine in both for _, line in machine.said("error: ")]
    return {"codes": codes, "pause_s": round(pause, 1), "resumed_s": round(resumed_at - cut_at, 1), "errors": errors}


def for_good(hosts: Hosts, launcher: str, options: list[str], run_dir: Path, at_step: int) -> dict[str, Any]:
    """Cuts the link until both sides have ended, and starts the same commands again. Returns what each side said."""
    both = start(hosts, launcher, options, run_dir)
    wait_for_step(both, at_step)
    hosts.cut()
    cut_at = time.monotonic()
    sides = []
    for machine in both:
        code = machine.wait(900)
        ended_s = None if machine.ended_at is None else round(machine.ended_at - cut_at)
        said = [{"after_s": round(at - cut_at), "sentence": line} for at, line in machine.said("error: ")]
        sides.append({"machine": machine.number, "code": code, "ended_s": ended_s, "said": said})
    hosts.mend()
    again = start(hosts, launcher, options, run_dir)
    codes = [machine.wait(600) for machine in again]
    continued = [line for _, line in again[0].said("continuing ")]
    return {"sides": sides, "restart_codes": codes, "restart_said": continued}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a new folder for shards and runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--at_step", type=int, default=130, help="the link is cut behind it")
    parser.add_argument("--cut_s", type=float, default=30.0)
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    folder = given.dir.resolve()
    subprocess.run([sys.executable, str(ROOT / "launch/shards.py"), "digits", str(folder / "shards")], check=True)

    def options(run_dir: Path) -> list[str]:
        return [
            "--config", str(ROOT / "configs/pretrain/digits.yaml"), "--data.train", f"{folder}/shards/train-*.tar",
            "--run_dir", str(run_dir), "--epochs", "null", "--steps", str(given.steps), "--optim.warmup_epochs", "null",
            "--optim.warmup_steps", "20", "--log_every_steps", "1", "--save_every_steps", "50", "--num_workers", "0",
            "--precision", "no", "--record_samples", "true",
        ]  # fmt: skip

    figures: list[dict[str, Any]] = []
    with two_hosts(folder / "hosts") as hosts:
        reference = folder / "undisturbed"
        both = start(hosts, "accelerate", options(reference), reference)
        codes = [machine.wait(900) for machine in both]
        print(f"undisturbed: exit codes {codes}", flush=True)
        for launcher in given.launchers:
            run_dir = folder / f"{launcher}-cut"
            found = for_a_while(hosts, launcher, options(run_dir), run_dir, given.at_step, given.cut_s)
            found |= {"launcher": launcher, "cut": f"{given.cut_s:.0f} s"} | compared(run_dir, reference)
            figures.append(found)
            print(
                f"\n{LAUNCHERS[launcher]}, link cut for {given.cut_s:.0f} s: exit codes {found['codes']}, next step "
                f"{found['resumed_s']:.0f} s after the cut; errors: {found['errors'] or 'none'}; samples as owed: "
                f"{found['samples_as_owed']}, weights equal: {found['weights_equal']}",
                flush=True,
            )
            run_dir = folder / f"{launcher}-broken"
            found = for_good(hosts, launcher, options(run_dir), run_dir, given.at_step)
            found |= {"launcher": launcher, "cut": "for good"} | compared(run_dir, reference)
            figures.append(found)
            print(f"\n{LAUNCHERS[launcher]}, link cut for good:")
            print("| machine | seconds after the cut | what was said |\n|---|---|---|")
            for side in found["sides"]:
                for said in side["said"]:
                    print(f"| {side['machine']} | {said['after_s']} | {said['sentence']} |")
                print(f"| {side['machine']} | {side['ended_s']} | (the launcher ends with status {side['code']}) |")
            print(
                f"started again: exit codes {found['restart_codes']}, {found['restart_said']}, samples as owed: "
                f"{found['samples_as_owed']}, weights equal: {found['weights_equal']}",
                flush=True,
            )
    print(json.dumps({"steps": given.steps, "cases": figures}))


if __name__ == "__main__":
    main()
