"""The page of benchmarks/cifar10.py: tables of what runs have left in result.json, and their losses as curves."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from quarterlight.finetune.pictures.curves import read_metrics
from quarterlight.finetune.pictures.figure import COLORS, new_picture, save_figure
from quarterlight.finetune.sub_runs import finished_result


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in markdown, or nothing where it has no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    if len(lines) == 1:
        return ""
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns mean, standard deviation and range of some values in words."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (one run)"
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def headline(folder: Path, seeds: Sequence[int], labels: int) -> str:
    """Returns the table of the encoders pretrained with each seed beside those untrained or trained from scratch.

    `labels` is how many of each class the probes have.
    """
    figures = {  # what is measured: (runs with, runs without, figure in result.json)
        f"linear probe, {labels:,} labels a class": ("probe-pretrained", "probe-untrained", "linear_top1"),
        f"k-NN (k = 20, average), {labels:,} labels a class": ("probe-pretrained", "probe-untrained", "knn_top1"),
        "fine-tuning, 300 labels a class": ("finetune", "scratch", "val_top1"),
        "fine-tuning, 5,000 labels a class": ("all_labels-mae", "all_labels-scratch-mae", "val_top1"),
    }
    rows = []
    for words, (with_it, without, key) in figures.items():
        found: list[list[float]] = []
        for prefix in (with_it, without):
            results = [finished_result(folder / f"{prefix}-{seed}") for seed in seeds]
            values = [result[key] for result in results if result]
            found.append([v["avg_k20"] if isinstance(v, dict) else v for v in values])
        if not all(found):
            continue
        gap = min(found[0]) - max(found[1])
        rows.append([words, spread(found[0]), spread(found[1]), f"{gap:+.2f}"])
    return table(["top-1 %", "pretrained", "untrained, or from scratch", "worst of one over best of the other"], rows)


def options_table(folder: Path, rows: Sequence[tuple[str, str]]) -> str:
    """Returns a line for every run that compares options, given as (name, what it changes)."""
    lines = []
    for name, changed in rows:
        if found := finished_result(folder / name):
            figures = [found[key] for key in ("probe_linear_avg", "probe_knn_avg")]
            lines.append([changed, f"{found['loss']:.4f}", *(f"{x:.2f}" for x in figures)])
    return table(["changed", "loss", "linear %", "k-NN %"], lines)


def others_table(folder: Path, names: Sequence[str]) -> str:
    """Returns a line for every run that is finished: its loss, or its accuracies."""
    figures = {"loss": ".4f", "linear_top1": ".2f", "val_top1": ".2f"}
    lines = []
    for name in names:
        if (found := finished_result(folder / name)) and set(found) & set(figures):
            k_nn = f"{found['knn_top1']['avg_k20']:.2f}" if "knn_top1" in found else ""
            told = [format(found[key], form) if key in found else "" for key, form in figures.items()]
            lines.append([f"`{name}`", *told[:2], k_nn, told[2]])
    return table(["run", "training loss", "linear probe %", "k-NN %", "fine-tuned %"], lines)


def few_shot_table(folder: Path, names: Sequence[str]) -> str:
    """Returns accuracy by labels a class: mean and standard deviation over the draws, a line a run."""
    lines, shots = [], []
    for name in names:
        if not (found := finished_result(folder / name)):
            continue
        scores: dict[int, list[float]] = {}
        for score in found["scores"]:
            scores.setdefault(score["labels_per_class"], []).append(score["val_top1"])
        shots = sorted(scores)
        lines.append([name.rpartition("-")[2], *(f"{mean(scores[k]):.2f} ± {stdev(scores[k]):.2f}" for k in shots)])
    return table(["top-1 %", *(f"{k} labels a class" for k in shots)], lines)


def draw_losses(path: Path, title: str, runs: dict[str, Path], batch_sizes: dict[str, int]) -> None:
    """Draws the training loss of runs over the images that they have seen."""
    picture = new_picture(
        path.stem, title, "Means over the steps of a log interval; images seen, repeats counted.", height=3.6
    )
    axes = picture.figure.subplots()
    for i, (name, run_dir) in enumerate(runs.items()):
        points = [(r["step"], r["loss"]) for r in read_metrics(run_dir) if r.get("loss") is not None]
        images = [step * batch_sizes[name] / 1000 for step, _ in points]
        style = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--")[i // len(COLORS) % 2]}
        axes.plot(images, [loss for _, loss in points], label=name, linewidth=1.3, **style)
    axes.set_yscale("log")
    axes.set_yticks([0.4, 0.5, 0.6, 0.8, 1.0, 1.2], labels=["0.4", "0.5", "0.6", "0.8", "1", "1.2"])
    axes.minorticks_off()
    axes.set_xlabel("thousand images", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, edgecolor="none", ncols=2)
    save_figure(path, picture.figure)


def write_reference(run_dir: Path, folder: Path) -> None:
    """Writes metrics.jsonl of a run to another folder: losses and rates in four digits, and nothing of its machine."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in read_metrics(run_dir):
        if record.get("loss") is not None:
            rounded = {key: float(f"{record[key]:.4g}") for key in ("loss", "lr", "grad_norm")}
            lines.append(json.dumps({"step": int(record["step"]), "epoch": round(record["epoch"], 3), **rounded}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def commands(lines: Iterable[list[str]]) -> str:
    """Returns command lines, given without the interpreter, in markdown."""
    return "```sh\n" + "\n".join(f"python {shlex.join(line)}" for line in lines) + "\n```"
