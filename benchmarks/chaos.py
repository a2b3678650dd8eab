"""Break a run again and again, start the same command each time, and compare what comes out with an undisturbed run.

python benchmarks/chaos.py --train 'shards/train-*.tar' --val 'shards/val-000000.tar' --dir runs/chaos --kills 120

Real commands (pretraining and fine-tuning, on 1 and 2 CPU processes under accelerate's launcher) are killed, stopped
and starved of disk in every way of FAULTS, in turn, at random steps. After each fault the newest state may be no
further behind than the save interval. At the end the samples seen must be those owed, and weights and moments the same
bits as without faults. Prints a table and one JSON line; its status is 1 if anything was lost. Needs Linux, and root
for a small disk (tmpfs).
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 4
COMMON = {
    "encoder.name": "vit_tiny_patch16_224", "encoder.args": "{patch_size: 4, embed_dim: 48, depth: 2, num_heads: 3}",
    "data.img_size": "32", "data.crop_pct": "1", "precision": "no", "batch_size": "32", "num_workers": "1",
    "save_every_steps": str(SAVE_EVERY), "log_every_steps": "1", "record_samples": "true", "optim.warmup_steps": "5",
}  # fmt: skip
STAGES = {
    "pretrain": {"decoder": "{embed_dim: 32, depth: 1, num_heads: 2}", "picture_every_steps": "8"},
    "finetune": {"micro_batch_size": "16", "evaluate_every_steps": "8"},
}
MARK = "QUARTERLIGHT_CHAOS_RUN"
CHAOS = "QUARTERLIGHT_CHAOS"  # what a process does to itself: EVENT|PART OF THE PATH|COUNT


def at_event(what: str, part: str) -> Callable[["Run", random.Random], None]:
    """Returns a fault: the main process kills itself before it does `what` to a path with `part` in it."""

    def fault(run: "Run", rng: random.Random) -> None:
        run.start({CHAOS: f"{what}|{part}|{rng.randint(1, 2)}"})
        run.wait()

    return fault


def after_steps(hit: Callable[["Run", random.Random], None]) -> Callable[["Run", random.Random], None]:
    """Returns a fault that happens some steps and a fraction of one after the start."""

    def fault(run: "Run", rng: random.Random) -> None:
        run.start()
        run.until_logged(run.logged() + rng.randint(0, 5))
        time.sleep(rng.uniform(0, 0.1))
        hit(run, rng)
        run.wait()

    return fault


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def full_disk(run: "Run", rng: random.Random) -> None:
    del rng
    with run.little_room():
        run.start()
        run.wait()


FAULTS: dict[str, Callable[["Run", random.Random], None]] = {
    "SIGKILL of one rank": after_steps(lambda run, rng: kill([rng.choice(run.ranks())])),
    "SIGKILL of all processes": after_steps(lambda run, rng: kill(list(processes_of(run.mark)))),
    "SIGKILL of the launcher": after_steps(lambda run, rng: kill([run.process.pid])),
    "SIGKILL of a data worker": after_steps(lambda run, rng: kill(run.workers(rng.choice(run.ranks()))[:1])),
    "SIGTERM to the launcher": after_steps(lambda run, rng: kill([run.process.pid], signal.SIGTERM)),
    "SIGUSR1 to one rank": after_steps(lambda run, rng: kill([rng.choice(run.ranks())], signal.SIGUSR1)),
    "SIGINT to all processes": after_steps(lambda run, rng: kill(list(processes_of(run.mark)), signal.SIGINT)),
    "SIGKILL as a state is begun": at_event("os.mkdir", ".partial"),
    "SIGKILL within a state": at_event("open", ".partial/progress.json"),
    "SIGKILL before a state is renamed": at_event("os.rename", ".partial"),
    "SIGKILL in rotation, before renaming": at_event("os.rename", "state/step-"),
    "SIGKILL in rotation, before deleting": at_event("shutil.rmtree", ".old"),
    "SIGKILL in rotation, in mid-deletion": at_event("os.remove", "model.safetensors"),
    "SIGKILL before weights are released": at_event("os.rename", "encoder.safetensors"),
    "SIGKILL in an evaluation": at_event("evaluation", ""),
    "a full disk": full_disk,
}


class Run:
    """One run, started again and again."""

    def __init__(self, stage: str, processes: int, given: argparse.Namespace, run_dir: Path, steps: int) -> None:
        self.stage, self.processes, self.run_dir, self.steps = stage, processes, run_dir, steps
        options = COMMON | STAGES[stage] | {"data.train": given.train, "steps": str(steps), "run_dir": str(run_dir)}
        options |= {"data.val": given.val} if stage == "finetune" else {}
        self.words = [sys.executable]
        if processes > 1:
            config = str(ROOT / "configs/accelerate/cpu2.yaml")
            self.words += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", config]
            self.words += ["--main_process_port", "0"]
        self.words += [str(Path(__file__)), "--as", str(ROOT / "launch" / f"{stage}.py")]
        self.words += [word for key, value in options.items() for word in (f"--{key}", value)]
        self.process: Any = None
        self.said = ""

    def start(self, more: dict[str, str] | None = None) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", MARK: self.mark}
        self.output = self.run_dir.parent / f"{self.run_dir.name}.log"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self.words, env=environment | (more or {}), stdout=output, stderr=output, start_new_session=True
            )

    def wait(self, timeout_s: float = 240) -> int:
        """Waits for the launcher and all that it started; what is left after `timeout_s` is an error."""
        code = self.process.wait(timeout_s)
        deadline = time.monotonic() + timeout_s
        while alive := [pid for pid in processes_of(self.mark) if pid != self.process.pid]:
            if time.monotonic() > deadline:
                kill(alive)
                raise AssertionError(f"processes {alive} outlived their launcher by {timeout_s} s")
            time.sleep(0.02)
        self.said = self.output.read_text()
        return code

    def logged(self) -> int:
        """Returns the last step that is logged."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def until_logged(self, step: int, timeout_s: float = 120) -> None:
        """Waits until something was logged, and at least `step`, or the run has ended."""
        before, deadline = self.size(), time.monotonic() + timeout_s
        while self.process.poll() is None and (self.size() == before or self.logged() < step):
            assert time.monotonic() < deadline, f"step {step} was not reached: {self.output.read_text()[-2000:]}"
            time.sleep(0.01)

    def size(self) -> tuple[float, int]:
        try:
            found = (self.run_dir / "metrics.jsonl").stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_mtime_ns, found.st_size

    def saved(self) -> int:
        """Returns the step of the newest state."""
        return max((int(path.name[5:]) for path in (self.run_dir / "state").glob("step-*")), default=0)

    def ranks(self) -> list[int]:
        """Returns the processes that train."""
        if self.processes == 1:
            return [self.process.pid]
        found = [pid for pid in processes_of(self.mark) if parent(pid) == self.process.pid]
        return sorted(pid for pid in found if b"--as" in command_of(pid)) or [self.process.pid]

    def workers(self, rank: int) -> list[int]:
        """Returns the data workers of a training process."""
        return [pid for pid in processes_of(self.mark) if parent(pid) == rank and b"--as" in command_of(pid)]

    def little_room(self) -> "LittleRoom":
        return LittleRoom(self.run_dir.parent)


class LittleRoom:
    """The disk has room for records, but for no further state, while this is entered."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.disk)], check=True)

    def __enter__(self) -> None:
        found = os.statvfs(self.disk)
        self.resize((found.f_blocks - found.f_bfree) * found.f_frsize // 1024 + 64)

    def __exit__(self, *error: object) -> None:
        self.resize(1_000_000)


def command_of(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def parent(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return -1


def processes_of(mark: str) -> Iterator[int]:
    """Yields the living processes that have `mark` in their environment, whoever their parent is by now."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state not in "ZX" and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def seen(run_dir: Path) -> list[tuple]:
    """Returns (step, key, pixel hash, mask hash) of every sample that any process has recorded."""
    records = [json.loads(x) for file in run_dir.glob("samples-rank*.jsonl") for x in file.read_text().splitlines()]
    return sorted((x["step"], x["key"], x["pixels"], x["mask"]) for x in records)


def same_bits(a: Path, b: Path) -> bool:
    ours, wanted = load_file(a), load_file(b)
    return ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def campaign(
    stage: str, processes: int, given: argparse.Namespace, kills: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Returns a record of every fault of one run; the last one is that of the comparison at the end."""
    name = f"{stage}-{processes}"
    disk = given.dir / f"{name}-disk"
    disk.mkdir(parents=True)
    steps = max(40, kills * 4)
    plain, broken = Run(stage, processes, given, given.dir / f"{name}-plain", steps), None
    plain.start()
    assert plain.wait(1200) == 0, plain.said[-3000:]
    small_disks = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000000k", "none", str(disk)]).returncode == 0
    try:
        broken = Run(stage, processes, given, disk / "run", steps)
        names = [x for x in FAULTS if (small_disks or x != "a full disk") and (stage, x) not in NOT_OF]
        names = [x for x in names if given.only in x]
        records = []
        for i in range(kills):
            fault = names[(i + given.first) % len(names)]
            before = broken.saved()
            began_s = time.monotonic()
            FAULTS[fault](broken, rng)
            reached, saved = broken.logged(), broken.saved()
            lost = max(0, reached - saved)
            found = {"run": name, "fault": fault, "status": broken.process.returncode, "from": before}
            found |= {"reached": reached, "saved": saved, "lost_steps": lost, "took_s": time.monotonic() - began_s}
            records.append(found)
            print(json.dumps(records[-1]), flush=True)
            assert lost <= SAVE_EVERY * (2 if fault == "a full disk" else 1), broken.said[-3000:]
            if saved >= steps:  # it got to its end: begin anew, or further faults would hit nothing
                records.append(compare(broken, plain, name))
                shutil.rmtree(broken.run_dir)
        broken.start()
        assert broken.wait(1200) == 0, broken.said[-3000:]
        return [*records, compare(broken, plain, name)]
    finally:
        if broken is not None and broken.process is not None and broken.process.poll() is None:
            kill(list(processes_of(broken.mark)))
        if small_disks:
            subprocess.run(["umount", "-l", str(disk)], check=True)


NOT_OF = {("pretrain", "SIGKILL in an evaluation"), ("finetune", "SIGKILL before weights are released")}


def compare(broken: Run, plain: Run, name: str) -> dict[str, Any]:
    """Returns what differs between the two runs at their ends, nothing if all is well."""
    last = f"state/step-{plain.steps:08d}"
    release = "encoder.safetensors" if plain.stage == "pretrain" else "classifier_best.safetensors"
    files = [release, f"{last}/model.safetensors", f"{last}/optimizer.safetensors"]
    logged = [json.loads(x)["step"] for x in (broken.run_dir / "metrics.jsonl").read_text().splitlines() if '"lr"' in x]
    found = {
        "run": name,
        "samples_equal": seen(broken.run_dir) == seen(plain.run_dir),
        "samples_seen": len(seen(broken.run_dir)),
        "samples_owed": plain.steps * int(COMMON["batch_size"]),
        "same_bits": all(same_bits(broken.run_dir / file, plain.run_dir / file) for file in files),
        "every_step_logged_once": logged == list(range(1, plain.steps + 1)),
    }
    print(json.dumps(found), flush=True)
    return found


def run_as(script: str) -> None:
    """Runs a launch script whose main process kills itself at the event that the environment names."""
    event, part, count = os.environ.get(CHAOS, "||0").split("|")
    left = int(count)

    def hook(name: str, args: Any) -> None:
        nonlocal left
        if name == event and part in str(args[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if event == "evaluation":
        import quarterlight.finetune.evaluate as module

        judge = module.judge

        def judge_or_end(*args: Any, **more: Any) -> Any:  # once a batch
            hook(event, ("",))
            return judge(*args, **more)

        module.judge = judge_or_end
    elif event and os.environ.get("RANK", "0") == "0":
        sys.addaudithook(hook)
    sys.argv = [script, *sys.argv[3:]]
    runpy.run_path(script, run_name="__main__")


def table(records: list[dict[str, Any]]) -> str:
    """Returns a markdown table with a row for each kind of fault."""
    rows = ["| fault | times | exit statuses | most steps done again |", "|---|---|---|---|"]
    for fault in FAULTS:
        if hits := [x for x in records if x.get("fault") == fault and x["status"] != 0]:
            statuses = ", ".join(f"{code} ({n}x)" for code, n in sorted(Counter(x["status"] for x in hits).items()))
            rows.append(f"| {fault} | {len(hits)} | {statuses} | {max(x['lost_steps'] for x in hits)} |")
    rows += ["", "| run | samples equal | seen, owed | same bits | every step logged once |", "|---|---|---|---|---|"]
    for x in records:
        if "same_bits" in x:
            found = f"{x['samples_seen']}, {x['samples_owed']} | {x['same_bits']} | {x['every_step_logged_once']}"
            rows.append(f"| {x['run']} | {x['samples_equal']} | {found} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training shards")
    parser.add_argument("--val", required=True, help="some evaluation shards")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--kills", type=int, default=120, help="faults, over all runs")
    parser.add_argument("--runs", default="pretrain-1,pretrain-2,finetune-1,finetune-2", help="stage-processes, ...")
    parser.add_argument("--only", default="", help="faults with this in their names")
    parser.add_argument("--first", type=int, default=0, help="the fault to begin with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, runs = random.Random(given.seed), given.runs.split(",")
    records, began_s = [], time.monotonic()
    for run in runs:
        stage, _, processes = run.rpartition("-")
        records += campaign(stage, int(processes), given, -(-given.kills // len(runs)), rng)
    ends = [x for x in records if "same_bits" in x]
    good = all(x["samples_equal"] and x["same_bits"] and x["every_step_logged_once"] for x in ends)
    faults = sum(x.get("status", 0) != 0 for x in records)  # with 0 a run ended before it was hit
    print(f"\n{faults} faults in {(time.monotonic() - began_s) / 60:.0f} minutes, save interval {SAVE_EVERY} steps\n")
    print(table(records))
    print(json.dumps({"faults": faults, "runs_compared": len(ends), "nothing_lost": good}))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    run_as(sys.argv[2]) if sys.argv[1] == "--as" else main()
