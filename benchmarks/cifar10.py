"""Every run behind benchmarks/results/cifar10_story_*.md, and the page itself.

python launch/shards.py cifar10 shards/cifar10
python benchmarks/cifar10.py --shards shards/cifar10 --dir runs/cifar10 --scale cpu --jobs 2
python benchmarks/cifar10.py --dir runs/cifar10 --scale cpu --page benchmarks/results/cifar10_story_2cpu.md

`cpu`: recipes of 6 blocks that two cores do in some three hours in all. `gpu`: the whole recipes, and a hundred epochs
to compare options. What is finished is left alone and what was stopped continues, so after a kill the same command goes
on. `--list` prints the commands, each of which can be run by itself.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from cifar10_page import (
    commands,
    draw_losses,
    few_shot_table,
    headline,
    options_table,
    others_table,
    write_reference,
)
from timing import cpu_name

from quarterlight.finetune.config import FinetuneConfig, LinearProbeConfig
from quarterlight.finetune.probe_config import FewShotConfig
from quarterlight.finetune.sub_runs import POLL_S, finished_result
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.errors import InputError, Stopped
from quarterlight.ssl.index import open_index
from quarterlight.ssl.parent import signal_at_parents_death
from quarterlight.ssl.runs import open_run
from quarterlight.ssl.signals import StopSignals

ROOT = Path(__file__).parents[1]
SEEDS = 0, 1, 2
PLAIN = {None: "null", True: "true", False: "false"}
CONFIGS: dict[str, Any] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linear_probe": LinearProbeConfig,
    "few_shot": FewShotConfig,
}
ONLY_AT_THE_END = 10**9  # steps between two looks at the features


@dataclass(frozen=True)
class Run:
    """A command of launch/ and the folder it leaves."""

    group: str  # the table it stands in
    name: str
    command: str
    config: str
    options: dict[str, Any]
    init: str | None = None  # the run whose encoder it takes
    changed: str = ""  # what it changes of the recipe, where that is what it is for


@dataclass(frozen=True)
class Scale:
    """What differs between a CPU and a GPU."""

    vit: str  # names of recipes in configs/*/
    swin: str
    batch_size: int  # of the recipe
    short_images: int  # that a run sees which compares options
    rates: list[dict[str, Any]]  # what is compared beside OPTIONS; base_lr is for 256 images, whatever the batch
    few_labels: dict[str, Any]  # fine-tuning on 300 labels a class
    longer: dict[str, Any]  # twice as long, for training from scratch
    all_labels: dict[str, Any] | None  # fine-tuning on 5,000 labels a class, where there is time for it
    probe: dict[str, Any]


def length(steps: int) -> dict[str, Any]:
    """Returns the options of a pretraining run of so many steps, a tenth of them to warm up."""
    return {"epochs": None, "steps": steps, "optim.warmup_epochs": None, "optim.warmup_steps": steps // 10}


FEW = {"data.samples_per_class": 300, "evaluate_every_steps": 0}
SCALES = {
    "cpu": Scale(
        vit="cifar10_vit_cpu",
        swin="cifar10_swin_cpu",
        batch_size=128,
        short_images=1200 * 128,
        rates=[{"optim.base_lr": 1e-3}, {"batch_size": 256}, {"batch_size": 256, "optim.base_lr": 1e-3}],
        few_labels={},
        longer={"epochs": 30, "optim.warmup_epochs": 4},
        all_labels=None,
        probe={"data.samples_per_class": 1000},
    ),
    "gpu": Scale(
        vit="cifar10_vit_tiny",
        swin="cifar10_swin_tiny",
        batch_size=256,
        short_images=100 * 50_000,
        rates=[{"optim.base_lr": 2e-3}, {"batch_size": 128, "optim.base_lr": 2e-3}, {"batch_size": 1024}],
        few_labels=FEW | {"epochs": 300, "optim.warmup_epochs": 20},
        longer={"epochs": 600, "optim.warmup_epochs": 40},
        all_labels={},
        probe={},
    ),
}
# What a comparison changes of the recipe. All see as many images.
OPTIONS: list[dict[str, Any]] = [
    {"seed": 0},
    {"seed": 1},
    {"mask.ratio": 0.5},
    {"mask.ratio": 0.9},
    {"target": "pixels"},
    {"decoder.name": "cross", "pred_share": 0.5},
    {"decoder.depth": 1},
    {"mask.strategy": "block"},
    {"decoder.depth": 4},
    {"decoder.name": "cross"},
    {"mask.strategy": "grid"},
    {"seed": 2},
]


def story(scale: Scale) -> list[Run]:
    """Returns all runs, each behind those whose encoder it takes."""
    seen = {"probe.every_steps": ONLY_AT_THE_END, "picture_every_steps": 0}
    runs = [Run("headline", f"mae-{seed}", "pretrain", scale.vit, {"seed": seed, **seen}) for seed in SEEDS]
    few, longer = scale.few_labels, scale.few_labels | scale.longer
    scratch = {"untrained": True, "optim.layer_decay": 1.0}
    for seed in SEEDS:
        init = f"mae-{seed}"
        for name, untrained in (("pretrained", False), ("untrained", True)):
            options = {"untrained": untrained, "seed": seed, **scale.probe}
            runs.append(Run("probe", f"probe-{name}-{seed}", "linear_probe", scale.vit, options, init))
        runs.append(Run("finetune", f"finetune-{seed}", "finetune", scale.vit, {**few, "seed": seed}, init))
        runs.append(Run("finetune", f"scratch-{seed}", "finetune", scale.vit, {**few, "seed": seed, **scratch}, init))
    for change in OPTIONS + scale.rates:
        name = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in change.items())
        short = length(scale.short_images // change.get("batch_size", scale.batch_size))
        told = ", ".join(f"`{key} {value}`" for key, value in change.items())
        options = {**short, **seen, **change}
        runs.append(Run("options", f"short-{name}", "pretrain", scale.vit, options, changed=told))
    runs.append(Run("swin", "swin", "pretrain", scale.swin, seen))
    for name, untrained in (("pretrained", False), ("untrained", True)):
        options = {"untrained": untrained, **scale.probe}
        runs.append(Run("swin", f"swin-probe-{name}", "linear_probe", scale.swin, options, "swin"))
    runs.append(Run("finetune", "scratch-longer", "finetune", scale.vit, {**longer, "seed": 0, **scratch}, "mae-0"))
    for name, untrained in (("pretrained", False), ("untrained", True)):
        options = {"untrained": untrained, "data.crop_pct": 1.0}
        runs.append(Run("few_shot", f"few_shot-{name}", "few_shot", "", options, "mae-0"))
    if scale.all_labels is not None:
        # github.com/IcarusWizard/MAE has 89.77 % after 2,000 epochs at patches of 2, and 74.13 % without pretraining.
        finer = {
            "encoder.args": "{patch_size: 2}",
            "decoder.embed_dim": 192,
            "decoder.depth": 4,
            "decoder.num_heads": 3,
        }
        runs.append(Run("patches of 2", "patch2", "pretrain", scale.vit, {**finer, **seen}))
        for init in ("patch2", *(f"mae-{seed}" for seed in SEEDS)):
            seed = {"seed": int(init[-1]) if init != "patch2" else 0}
            runs.append(Run("all labels", f"all_labels-{init}", "finetune", scale.vit, seed, init))
            runs.append(Run("all labels", f"all_labels-scratch-{init}", "finetune", scale.vit, scratch | seed, init))
        # As many images as pretraining and fine-tuning see together.
        whole = scratch | {"epochs": 500, "optim.warmup_epochs": 20}
        runs.append(Run("all labels", "all_labels-scratch-500_epochs", "finetune", scale.vit, whole, "mae-0"))
    return runs


def words(run: Run, shards: str, folder: Path) -> list[str]:
    """Returns the command line of a run, without the interpreter."""
    options = {
        "data.train": f"{shards}/train-*.tar",
        "data.val": f"{shards}/val-*.tar",
        "run_dir": folder / run.name,
        **({"init": folder / run.init} if run.init else {}),
        **run.options,
    }
    out = [f"launch/{run.command}.py"]
    if run.config:
        out += ["--config", f"configs/{run.command}/{run.config}.yaml"]
    for key, value in options.items():
        out += [f"--{key}", PLAIN.get(value, value) if value is None or isinstance(value, bool) else str(value)]
    return out


def finished(run: Run, shards: str, folder: Path) -> bool:
    """Returns whether a run has left its final figures. Raises InputError when they are those of other options."""
    if finished_result(folder / run.name) is None:
        return False
    open_run(parse_config(CONFIGS[run.command], None, words(run, shards, folder)[1:]))
    return True


def start(run: Run, shards: str, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """Starts a run, with its output behind what it said before in a file beside its folder."""
    line = words(run, shards, folder)
    print(f"$ python {shlex.join(line)}", flush=True)
    with (folder / f"{run.name}.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *line],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            preexec_fn=lambda: signal_at_parents_death(signal.SIGUSR1),  # it saves and ends when this command is killed
        )


def carry_out(runs: list[Run], shards: str, folder: Path, jobs: int) -> list[str]:
    """Runs what is not finished, `jobs` at a time, each with its share of the cores. Returns what failed and why.

    Raises Stopped when a signal comes, behind the ends of what runs.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    waiting = [run for run in runs if not finished(run, shards, folder)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failures: list[str] = []
    with StopSignals() as signals:
        told = False
        while waiting or running:
            if signals.received is not None and not told:
                told, waiting = True, []
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if code := running.pop(name).returncode:
                    log = folder / f"{name}.txt"
                    said = log.read_text(errors="replace").strip().rpartition("\n")[2]  # of this start, not one before
                    failures.append(f"{name} ended with {code} ({said.removeprefix('error: ')}): {log} has its output")
            unfinished = {run.name for run in waiting} | set(running)
            ready = [run for run in waiting if run.init not in unfinished]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                if run.init and finished_result(folder / run.init) is None:
                    failures.append(f"{run.name} takes the encoder of {run.init}, which is not there")
                else:
                    running[run.name] = start(run, shards, folder, threads)
            time.sleep(POLL_S)
        if told:
            print("stopped: the same command goes on", flush=True)
            raise Stopped
    return failures


def write_page(runs: list[Run], scale: str, page: Path, shards: str, folder: Path) -> None:
    """Writes tables and commands of finished runs, and their losses as PNGs beside the page, where they have run."""
    of = {name: [run for run in runs if run.group == name] for name in ("headline", "options", "probe", "finetune")}
    others = [run.name for run in runs if run.group not in of or run.name == "scratch-longer"]
    sizes = {run.name: run.options.get("batch_size", SCALES[scale].batch_size) for run in runs}
    labels = SCALES[scale].probe.get("data.samples_per_class", 5000)
    sections = {
        "Pretrained, and not": (headline(folder, SEEDS, labels), "headline"),
        "What options change": (options_table(folder, [(run.name, run.changed) for run in of["options"]]), "options"),
        "Other runs": (others_table(folder, others), ""),
        "Few labels, frozen encoder": (few_shot_table(folder, ["few_shot-pretrained", "few_shot-untrained"]), ""),
    }
    environment = json.loads((folder / runs[0].name / "environment.json").read_text())
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "timm", "accelerate"))
    device = environment["device"]
    hardware = f"{cpu_name()}, {environment['torch_threads']} thread(s) a run" if device.endswith("CPU") else device
    text = f"# CIFAR-10 from images to figures\n\n{date.today()} · {hardware} · {versions}\n\n"
    text += "50,000 images to train on, and 10,000 to report on.\n"
    for title, (body, group) in sections.items():
        if not body:
            continue
        text += f"\n## {title}\n\n{body}\n"
        if group and of[group]:
            picture = page.with_name(f"{page.stem}_{group}.png")
            draw_losses(picture, title, {run.name: folder / run.name for run in of[group]}, sizes)
            text += f"\n![Training loss over images]({picture.name})\n"
    text += f"\n## Commands\n\n{commands([words(run, shards, folder) for run in runs])}\n"
    there = {run.name for run in runs}
    if missing := [run.name for run in story(SCALES[scale]) if run.name not in there]:
        text += f"\nNot run: {', '.join(f'`{name}`' for name in missing)}.\n"
    page.write_text(text)
    print(page, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/cifar10", help="folder of what launch/shards.py has made")
    parser.add_argument("--dir", type=Path, default=Path("runs/cifar10"), help="folder of the runs")
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; cores are divided among them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    parser.add_argument("--page", type=Path, help="write tables and curves of what is finished, and run none")
    parser.add_argument(
        "--curves", type=Path, help="write the losses of finished recipes for docs/curves, and run none"
    )
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    if given.jobs < 1:
        raise InputError(f"--jobs {given.jobs}: give at least 1")
    runs = story(SCALES[given.scale])
    if given.only:
        runs = [run for run in runs if run.name.startswith(tuple(given.only))]
        if not runs:
            raise InputError(f"--only: no run's name begins with {' or '.join(given.only)}: --list shows them")
    if given.list:
        for run in runs:
            print(f"python {shlex.join(words(run, given.shards, given.dir))}")
        return
    if given.page or given.curves:
        there = [run for run in runs if finished(run, given.shards, given.dir.resolve())]
        if not there:
            raise InputError(f"--dir {given.dir} holds no finished run of these")
        print(f"{len(there)} of {len(runs)} runs are finished", flush=True)
        if given.page:
            write_page(there, given.scale, given.page, given.shards, given.dir)
        for run in there:
            if given.curves and run.name in ("mae-0", "swin"):
                write_reference(given.dir / run.name, given.curves / run.config)
        return
    open_index(f"{given.shards}/train-*.tar")  # a mistake shows once, and not in every run
    given.dir.mkdir(parents=True, exist_ok=True)
    if failures := carry_out(runs, str(Path(given.shards).resolve()), given.dir.resolve(), given.jobs):
        raise InputError("; ".join(failures))


if __name__ == "__main__":
    run_command(parse, main)
