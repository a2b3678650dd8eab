"""How does the time of an image grow with its size, for full attention (ViT-S) and for windows (Swin-T)?

python benchmarks/bench_image_size.py --device cpu --threads 2 --out benchmarks/results/image_size_2cpu.png

Prints a table of measured times beside the Swin paper's formulas, draws a plot, and prints one JSON line. Every round
times forward and backward pass of each model at each size in turn; figures are medians over rounds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib import pyplot
from timing import WARMUP, interleaved, measured_on

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder

MASK_RATIO = 0.75
MODELS = {"ViT-S/16": "vit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}
# Of each stage: pixels on a token's side, width, blocks.
STAGES = {"ViT-S/16": [(16, 384, 12)], "Swin-T": [(4, 96, 2), (8, 192, 2), (16, 384, 6), (32, 768, 2)]}
DECODER = (512, 1)  # width, blocks; on ViT's patches and on Swin's 32-pixel units, with full attention
PARTS = WHOLE, QUARTER, AUTOENCODER = "encoder, all tokens", "encoder, a quarter of the tokens", "masked autoencoder"
LEGEND = """\
From `time` on, figures are relative to the first size. `time`: measured, median over rounds of the ratio in a round.
`blocks`: multiplications of the model's own transformer blocks, attention and MLPs (8 hw C^2). The last two: those of
attention alone, if it were over the whole image (4 hw C^2 + 2 (hw)^2 C) and if it were in windows (4 hw C^2 + 2 M^2 hw
C). With hidden tokens, hw and M^2 are what is left of them."""
STYLES = {"ViT-S/16": ("#D55E00", "o"), "Swin-T": ("#0072B2", "s")}  # two that color-blind readers tell apart


def attention_cost(tokens: float, keys: float, width: int) -> float:
    """Returns multiplications: 4 hw C^2 + 2 (hw)^2 C with all tokens as keys, 4 hw C^2 + 2 M^2 hw C with a window's."""
    return 4 * tokens * width**2 + 2 * tokens * keys * width


def formulas(model: str, what: str, size: int) -> dict[str, float]:
    """Returns multiplications: of attention over the image, over 7 x 7 windows, of MLPs, and of the model's blocks."""
    share = 1.0 if what == WHOLE else 1 - MASK_RATIO
    costs = {"full": 0.0, "windows": 0.0, "mlp": 0.0}
    for side, width, depth in STAGES[model]:
        tokens = share * (size / side) ** 2
        costs["full"] += depth * attention_cost(tokens, tokens, width)
        costs["windows"] += depth * attention_cost(tokens, share * 49, width)
        costs["mlp"] += depth * 8 * tokens * width**2
    costs["blocks"] = costs["mlp"] + costs["windows" if model.startswith("Swin") else "full"]
    if what == AUTOENCODER:
        width, depth = DECODER
        tokens = (size / STAGES[model][-1][0]) ** 2
        costs["blocks"] += depth * (attention_cost(tokens, tokens, width) + 8 * tokens * width**2)
    return costs


def pass_of(
    model: MaskedAutoencoder, what: str, given: argparse.Namespace, batch: int, size: int
) -> Callable[[int], None]:
    """Returns a function of the round that runs forward and backward pass; masks are drawn here, as workers do."""
    device = torch.device(given.device)
    images = torch.randn(batch, 3, size, size).to(device)
    rounds = range(WARMUP + given.rounds)
    masks = [model.encoder.sample_masking(batch, MASK_RATIO, seed=seed).to(device) for seed in rounds]

    def run(r: int) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
            if what == AUTOENCODER:
                loss = model(images, masks[r], only_scored=True).loss
            else:
                loss = model.encoder(images, None if what == WHOLE else masks[r]).float().abs().mean()
        loss.backward()

    return run


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each model, part of it and size."""
    device = torch.device(given.device)
    steps = {}
    for label, name in MODELS.items():
        for size, batch in zip(given.sizes, given.batch_sizes, strict=True):
            model = build_autoencoder(
                name, img_size=size, decoder=DecoderConfig(embed_dim=DECODER[0], depth=DECODER[1])
            )
            choose_attention(model.to(device).train(), device, given.precision)
            for what in PARTS:
                steps[label, what, size, batch] = pass_of(model, what, given, batch, size)
    each = {
        key: [s / key[3] for s in seconds] for key, seconds in interleaved(steps, given.rounds, given.device).items()
    }
    rows = []
    for (label, what, size, batch), seconds in each.items():
        first = each[label, what, given.sizes[0], given.batch_sizes[0]]
        before, now = formulas(label, what, given.sizes[0]), formulas(label, what, size)
        row = {"model": label, "what": what, "size": size, "batch": batch, "ms": 1000 * median(seconds)}
        row["time"] = median(a / b for a, b in zip(seconds, first, strict=True))
        rows.append(row | {name: now[name] / before[name] for name in now})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | | pixels | ms an image | time | blocks | attention if full | attention if in windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (PARTS.index(row["what"]), row["model"], row["size"])):
        ratios = [f"{row[name]:.2f}" for name in ("time", "blocks", "full", "windows")]
        cells = [row["what"], row["model"], f"{row['size']}²", f"{row['ms']:.1f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws a panel for each part: milliseconds an image against pixels, with slopes 1 and 2 to compare."""
    pyplot.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.8), sharey=True, layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    pixels = [size**2 for size in sizes]
    for axis, what in zip(axes, PARTS, strict=True):
        lines = {
            label: [
                next(r["ms"] for r in rows if (r["model"], r["what"], r["size"]) == (label, what, s)) for s in sizes
            ]
            for label in MODELS
        }
        start = min(times[0] for times in lines.values()) / 1.5  # below the curves, out of their way
        for power, style, name in ((1, "--", "in proportion to pixels"), (2, ":", "to their square")):
            axis.plot(pixels, [start * (p / pixels[0]) ** power for p in pixels], style, color="0.55", label=name)
        for label, times in lines.items():
            color, marker = STYLES[label]
            axis.plot(pixels, times, color=color, marker=marker, linewidth=2, label=label)
        axis.set(xscale="log", yscale="log", title=what, xlabel="pixels of an image")
        axis.set_xticks(pixels, [f"{size}²" for size in sizes])
        axis.minorticks_off()
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("ms an image, forward and backward")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="224,448,672", help="sides in pixels, multiples of 224")
    parser.add_argument("--batch_sizes", default="9,2,1", help="images at once of each size, best as many pixels")
    parser.add_argument("--rounds", type=int, default=8, help=f"after {WARMUP} of warm-up")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--out", type=Path, required=True, help="the plot, a .png")
    given = parser.parse_args()
    given.sizes, given.batch_sizes = ([int(x) for x in t.split(",")] for t in (given.sizes, given.batch_sizes))
    torch.set_num_threads(given.threads)
    print(f"# Time of an image against its size\n\n{measured_on(given, 'torch', 'timm')}\n", flush=True)
    rows = measure(given)
    print(f"{table(rows)}\n\n{LEGEND}")
    plot(rows, "Time of an image against its size: full attention (ViT-S/16) and windows (Swin-T)", given.out)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
