"""The results file of bench_gpu.py: verdicts, tables, profiles, and the figures themselves to go on from."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from flops import forward_flops
from gpu_rows import UNSEARCHED, VARIANTS, Row
from models import MODELS, Vit

LEGEND = """\
A step is the trainer's: uint8 images that are on the device, normalization, loss under autocast, backward pass, norm of
the gradients, fused AdamW. Eager rows take the batch size with the most images/s (doubled from {smallest} while that
pays), the others that of the eager row, or without one a fixed size (`not searched`), which another may beat.
`images/s`: from the median step. `MFU`: operations of matrix products by formula (`benchmarks/flops.py`) over the
maker's nominal dense rate, {nominal}; `of matmul`: over the rate of one large product, {matmul} here. `ours`: images/s
of ours over this row's, of the same model and variant. `peak`, `reserved`: GiB of the device's memory in use at most,
and held by torch. `first step`: seconds, with compilation where there is any; kernels that an earlier run compiled are
taken from its cache."""
TARGETS = {"vit_base": 5500, "vit_large": 2800, "swin_base": 10000}  # images/s on an H200 in bf16
SIMMIM_TARGET, SHARDS_TARGET = 3.5, 0.95
LABELS = {
    "ours": "ours",
    "cross": "ours, cross decoder, 1/3 of the hidden",
    "simmim": "ours, SimMIM mode",
}
MISSING = "not measured"
Figures = dict[str, dict[str, Any]]  # of rows and their parts, by name


def label(row: Row) -> str:
    """Returns the contestant's name in a table."""
    if row.contestant == "hf":
        return "HF ViTMAEForPreTraining" if isinstance(MODELS[row.model], Vit) else "HF SwinForMaskedImageModeling"
    return LABELS[row.contestant]


def rate(found: Figures, model: str, contestant: str, variant: str) -> float | None:
    return found.get(Row("steps", model, contestant, variant).name, {}).get("images_per_s")


def best(found: Figures, model: str, contestant: str) -> tuple[float, str] | None:
    """Returns the most images/s of a contestant and the variant that reaches it."""
    rates = [(value, v) for v in VARIANTS if (value := rate(found, model, contestant, v)) is not None]
    return max(rates, default=None)


def failures(found: Figures, model: str, contestant: str) -> str:
    """Returns why a figure is missing."""
    names = [Row("steps", model, contestant, variant).name for variant in VARIANTS]
    errors = [found[name]["error"] for name in names if "error" in found.get(name, {})]
    return f"{MISSING}: {errors[0]}" if errors else MISSING


def verdict(figure: float, target: float) -> str:
    return "met" if figure >= target else f"missed by {100 * (1 - figure / target):.1f} %"


def verdicts(found: Figures) -> list[tuple[str, str, str]]:
    """Returns, for each target, what was asked, the figure and the verdict."""
    rows = []
    for model, target in TARGETS.items():
        asked = f"{model}: {target} images/s"
        if (top := best(found, model, "ours")) is None:
            rows.append((asked, "", failures(found, model, "ours")))
        else:
            rows.append((asked, f"{top[0]:.0f} ({top[1]})", verdict(top[0], target)))
    asked = f"swin_base: {SIMMIM_TARGET} times SimMIM's images/s, of the same variant"
    ratios = {}
    for variant in VARIANTS:
        ours, simmim = (rate(found, "swin_base", contestant, variant) for contestant in ("ours", "simmim"))
        if ours and simmim:
            ratios[variant] = ours / simmim
    if ratios:
        figure = ", ".join(f"{value:.2f} ({variant})" for variant, value in ratios.items())
        rows.append((asked, figure, verdict(min(ratios.values()), SIMMIM_TARGET)))
    else:
        rows.append((asked, "", failures(found, "swin_base", "simmim")))
    return [*rows, shards_verdict(found)]


def shards_verdict(found: Figures, model: str = "vit_base") -> tuple[str, str, str]:
    asked = f"{model} from shards: {100 * SHARDS_TARGET:.0f} % of synthetic, or the loader's limit"
    name = Row("shards", model, "ours").name
    fed = [x for key, x in found.items() if key.startswith(f"{name} ") and "workers" in x]
    synthetic = found.get(name, {}).get("images_per_s")
    if not fed or not synthetic:
        error = found.get(name, {}).get("error")
        return asked, "", f"{MISSING}: {error}" if error else MISSING
    top = max(fed, key=lambda x: x["images_per_s"])
    share = top["images_per_s"] / synthetic
    figure = f"{100 * share:.1f} % ({top['workers']} workers)"
    if share >= SHARDS_TARGET:
        return asked, figure, "met"
    if top["alone"] < synthetic:
        reached = 100 * top["images_per_s"] / top["alone"]
        limit = f"the loader alone makes {top['alone']:.0f} images/s where steps take {synthetic:.0f}"
        return asked, figure, f"limited by the loader: {limit}; fed steps reach {reached:.0f} % of it"
    return asked, figure, f"{verdict(share, SHARDS_TARGET)}, though the loader alone makes {top['alone']:.0f} images/s"


def cells(*words: Any) -> str:
    return f"| {' | '.join(str(word).replace('|', '/') for word in words)} |"


def steps_table(rows: list[Row], found: Figures, peak: float | None, matmul: float | None) -> list[str]:
    head = ["model", "contestant", "variant", "batch", "ms a step", "images/s", "ours", "MFU, %", "of matmul, %"]
    head += ["peak", "reserved", "first step"]
    lines = [cells(*head), "|---" * len(head) + "|"]
    order = list(MODELS), ["ours", "cross", "simmim", "hf"]
    for row in sorted(rows, key=lambda row: (order[0].index(row.model), order[1].index(row.contestant))):
        if (x := found.get(row.name)) is None:
            continue
        start = row.model, label(row), row.variant
        if "error" in x:
            lines.append(cells(*start, f"{MISSING}: {x['error']}", *[""] * (len(head) - 4)))
            continue
        work = 3 * forward_flops(MODELS[row.model], row.contestant) * x["images_per_s"] / 1e12
        ours = rate(found, row.model, "ours", row.variant)
        shares = [f"{100 * work / tflops:.1f}" if tflops else "" for tflops in (peak, matmul)]
        memory = [f"{x[key]:.1f}" if key in x else "" for key in ("allocated_gib", "reserved_gib")]
        times = (
            f"{1000 * x['step_s']:.1f}",
            f"{x['images_per_s']:.0f}",
            f"{ours / x['images_per_s']:.2f}" if ours else "",
        )
        batch = f"{x['batch_size']}{' (not searched)' if x['search'] == UNSEARCHED else ''}"
        lines.append(cells(*start, batch, *times, *shares, *memory, f"{x['first_step_s']:.1f}"))
    return lines


def shards_lines(row: Row, found: Figures) -> list[str]:
    if (there := found.get(row.name)) is None:
        return []
    lines = ["", f"## {row.model} from shards", ""]
    if "error" in there:
        return [*lines, f"{MISSING}: {there['error']}"]
    synthetic = there["images_per_s"]
    lines += [
        f"Batches of {there['batch_size']}, {there['variant']}, JPEGs of {there['file_kb']:.0f} kB on average.",
        "",
    ]
    lines += ["| batches | images/s | of synthetic, % | loader without steps, images/s |", "|---|---|---|---|"]
    lines.append(cells("there already (synthetic)", f"{synthetic:.0f}", "100.0", ""))
    for name, x in found.items():
        if name.startswith(f"{row.name} ") and "workers" in x:
            shares = f"{x['images_per_s']:.0f}", f"{100 * x['images_per_s'] / synthetic:.1f}", f"{x['alone']:.0f}"
            lines.append(cells(f"by {x['workers']} workers", *shares))
    return lines


def profile_lines(row: Row, found: Figures) -> list[str]:
    if (x := found.get(f"profile of {row.name}")) is None:
        return []
    lines = ["", f"## What is left of {row.model}, {row.variant}", ""]
    if "error" in x:
        return [*lines, f"{MISSING}: {x['error']}"]
    lines += [
        f"A step of {1000 * x['step_s']:.1f} ms has {x['launches']} kernels, which run for "
        f"{1000 * x['kernel_s']:.1f} ms; for {100 * x['gap_share']:.1f} % of it none runs (gaps between launches).",
        "",
        "| kind of kernel | share of kernels' time, % |",
        "|---|---|",
    ]
    lines += [cells(kind, f"{100 * share:.1f}") for kind, share in x["kinds"].items()]
    lines += ["", "| kernel | share, % |", "|---|---|"]
    return lines + [cells(f"`{shortened(name)}`", f"{100 * share:.1f}") for name, share in x["kernels"].items()]


def shortened(kernel: str) -> str:
    """Returns a kernel's name in at most 100 characters, without what C++ repeats in it."""
    return re.sub(r"`|^void |at::native::|\(anonymous namespace\)::|at_cuda_detail::", "", kernel)[:100]


def text(rows: list[Row], found: Figures, heading: str, peak: float | None, smallest: int) -> str:
    """Returns the results file for what is there of the rows."""
    device = found.get("device", {})
    matmul = device.get("matmul_tflops")
    nominal = f"{peak:g} TFLOP/s" if peak else "not known for this device and precision"
    large = f"{matmul:.1f} TFLOP/s ({device['matmul_size']} a side)" if matmul else "not measured"
    lines = ["# Pretraining steps on one GPU", "", heading, "", "| asked for, on an H200 in bf16 | figure | verdict |"]
    lines += ["|---|---|---|", *(cells(*words) for words in verdicts(found)), ""]
    lines += [LEGEND.format(nominal=nominal, matmul=large, smallest=smallest), "", "## Steps on synthetic batches", ""]
    lines += steps_table([row for row in rows if row.kind == "steps"], found, peak, matmul)
    for row in rows:
        lines += shards_lines(row, found) if row.kind == "shards" else profile_lines(row, found)
    lines += [
        "",
        *(f"Broken off: {name[8:]}: {x['error']}" for name, x in found.items() if name.startswith("rest of ")),
    ]
    if left := [row.name for row in rows if row.name not in found]:
        lines += ["", f"Not reached: {', '.join(left)}. The same command with `--resume` measures these."]
    return "\n".join([*lines, "", "```json", json.dumps(found), "```", ""])


def read(path: Path) -> Figures:
    """Returns the figures of a results file. Ends with a message for another file."""
    _, block, rest = path.read_text().partition("```json\n")
    if not block:
        sys.exit(f"error: {path} is no results file of bench_gpu.py: name another one by --out")
    return json.loads(rest.split("\n```")[0])
