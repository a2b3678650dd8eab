"""Shows the whole way on real data in about two minutes on two CPU cores: python launch/demo.py

scikit-learn's handwritten digits become shards; a small ViT learns to fill in three hidden quarters of each; then
k-NN, a linear probe and fine-tuning with five labels a class show what it has learned, against the same network
untrained. Every step is a command that you can run yourself: it is printed as it starts, and its output goes to a file
beside its run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ACCELERATE = "accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


class Step:
    """A command that runs in the background, with its output in a file."""

    def __init__(self, title: str, command: list[str], log: Path, *, threads: int) -> None:
        self.title, self.log = title, log
        print(f"{title}\n  $ {shlex.join(command)}", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        scripts = str(Path(sys.executable).parent)  # accelerate and python of this environment, activated or not
        environment["PATH"] = scripts + os.pathsep + environment["PATH"]
        self.output = log.open("w")
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, env=environment)

    def last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run_together(steps: list[Step]) -> None:
    """Waits for all steps, showing how they get on; ends the demo when one of them fails."""
    shown: dict[str, str] = {}
    while any(step.process.poll() is None for step in steps):
        time.sleep(0.5)
        for step in steps:
            line = step.last_line()
            if line.startswith("step ") and line != shown.get(step.title):
                kind = step.title.rpartition(": ")[2] + "  " if len(steps) > 1 else ""
                print(f"    {kind}{'  '.join(line.split('  ')[:4])}", flush=True)
                shown[step.title] = line
    for step in steps:
        step.output.close()
        if step.process.returncode:
            sys.exit(
                f"error: this step failed ({step.title}); its output is in {step.log}:\n{step.log.read_text()[-2000:]}"
            )


def draw(out: Path, table: list[tuple[str, float, float]]) -> Path:
    """Writes one picture with reconstructions and the table of accuracies, and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture = out / "demo.png"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 3.1), width_ratios=(1.9, 1), layout="constrained")
    left.imshow(pyplot.imread(out / "mae" / "reconstructions.png"))
    left.set_title("digits it was not trained on: 25 % shown | filled in | original")
    cells = [[f"{before:.1f} %", f"{after:.1f} %"] for _, before, after in table]
    grid = right.table(
        cells,
        rowLabels=[name for name, *_ in table],
        colLabels=["untrained", "pretrained"],
        loc="center",
        cellLoc="center",
        bbox=(0.42, 0.1, 0.58, 0.7),
    )
    grid.auto_set_font_size(False)
    grid.set_fontsize(10)
    right.set_title("digits told apart with few labels", y=0.86)
    for axes in (left, right):
        axes.axis("off")
    figure.savefig(picture, dpi=110)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="folder for all of it (default: %(default)s)"
    )
    out = parser.parse_args().dir
    started_at = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = Path(os.path.relpath(ROOT))
    data = ["--data.train", f"{out}/shards/train-*.tar", "--data.val", f"{out}/shards/val-*.tar"]

    def step(title: str, script: str, recipe: str, run: str, *more: str, threads: int) -> Step:
        given = ["--config", str(here / "configs" / recipe), *data, "--run_dir", f"{out}/{run}", *more]
        return Step(
            title, [*ACCELERATE.split(), str(here / "launch" / script), *given], out / f"{run}.txt", threads=threads
        )

    shards = ["python", str(here / "launch" / "shards.py"), "digits", f"{out}/shards"]
    run_together([Step("1/4  1,797 handwritten digits into shards", shards, out / "shards.txt", threads=cores)])
    title = "2/4  pretraining with 75 % of every image hidden, no labels"
    run_together([step(title, "pretrain.py", "pretrain/digits.yaml", "mae", threads=cores)])
    share = max(1, cores // 2)  # the next steps come in pairs
    kinds = {"pretrained": [], "untrained": ["--untrained", "true"]}
    for number, script, recipe, name, what in (
        ("3/4", "linear_probe.py", "linear_probe/digits.yaml", "probe", "k-NN and linear probe, 10 labels a class"),
        ("4/4", "finetune.py", "finetune/digits.yaml", "finetune", "fine-tuning, 5 labels a class"),
    ):
        few = ["--data.samples_per_class", "10"] if name == "probe" else []
        init = ["--init", f"{out}/mae", *few]
        pair = [
            step(f"{number}  {what}: {kind}", script, recipe, f"{name}-{kind}", *init, *more, threads=share)
            for kind, more in kinds.items()
        ]
        run_together(pair)

    def both(name: str, figure: str) -> tuple[float, float]:
        results = [
            json.loads((out / f"{name}-{kind}" / "result.json").read_text()) for kind in ("untrained", "pretrained")
        ]
        before, after = (result | result.get("knn_top1", {}) for result in results)
        return before[figure], after[figure]

    table = [
        ("k-NN (k = 10), 10 labels a class", *both("probe", "avg_k10")),
        ("linear probe, 10 labels a class", *both("probe", "linear_top1")),
        ("fine-tuned, 5 labels a class", *both("finetune", "val_top1")),
    ]
    print(f"\n{'':34}{'untrained':>12}{'pretrained':>12}")
    for name, before, after in table:
        print(f"{name:34}{before:10.1f} %{after:10.1f} %")
    print(
        f"\npicture: {draw(out, table)}\nweights: {out}/mae/encoder.safetensors, and for timm: local-dir:{out}/mae/hub"
    )
    print(f"curves:  tensorboard --logdir {out}\n{time.perf_counter() - started_at:.0f} s")


if __name__ == "__main__":
    main()
