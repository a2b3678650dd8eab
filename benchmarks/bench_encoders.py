"""How long is a pretraining step and how much memory does it take, beside transformers and dense timm models?

python benchmarks/bench_encoders.py --device cpu --threads 2 --out benchmarks/results/encoders_2cpu.md
python benchmarks/bench_encoders.py --device cuda --models vit_base,vit_large,swin_base --batch_size 128 --rounds 20 \\
    --compile --no_memory --peak_tflops 989 --out benchmarks/results/encoders_h100.md

Every round takes one step of each contestant in turn, so that whatever else the machine does meets all of them; ratios
are medians over rounds. Prints a markdown table for each comparison and one JSON line.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import Contestant, builder
from flops import forward_flops
from models import MODELS, Vit
from timing import WARMUP, interleaved, measured_on
from torch import Tensor

from quarterlight.ssl.attention import choose_attention

OURS = "ours"
MEMORY = ("peak", "peak_each_more", "saved_each_more")
LEGEND = """\
`x ours`: step time over that of `ours` in the same round, median. `peak`: memory of forward and backward pass beyond
weights, gradients and optimizer state. `each more`: what one more image in the batch adds to it, so without what does
not grow, such as weights cast to bf16. `saved`: what autograd keeps for the backward pass, for one more image.
`timm dense` encodes all patches and predicts nothing. `MFU`: the operations of matrix products that the step needs by
formula (two for a multiplication, three forward passes for a step) over those that the device could do
(`--peak_tflops`)."""


def contestants(comparison: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns kind and arguments of each contestant: ours, ours in another mode, and the others."""
    if isinstance(MODELS[comparison], Vit):
        hf, special, mode = "HF ViTMAE", "cross", "cross decoder, 1/3 of the masked"
    else:
        hf, special, mode = "HF SwinForMaskedImageModeling", "simmim", "SimMIM mode"
    return {
        OURS: ("ours", {}),
        f"{OURS}, {mode}": (special, {}),
        f"{hf} sdpa": ("hf", {"attention": "sdpa"}),
        f"{hf} eager": ("hf", {"attention": "eager"}),
        "timm dense": ("dense", {}),
    }


def build(comparison: str, name: str) -> Contestant:
    """Returns a contestant by its name in the table."""
    kind, args = contestants(comparison)[name]
    return builder(comparison, kind, **args)()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Returns by how much memory rose during `run`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024  # given in kB

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM, the largest VmRSS so far, anew
    run()
    return status("VmHWM") - before


def saved_bytes(run: Callable[[], object]) -> int:
    """Returns the bytes that autograd saves for the backward pass in `run`, each storage counted once."""
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being given out twice

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def prepare(contestant: Contestant, given: argparse.Namespace) -> tuple[Callable[..., None], Callable[..., None]]:
    """Returns forward and backward pass, and a whole training step, as functions of images and masks."""
    model = contestant.model.to(given.device).train()
    choose_attention(model, torch.device(given.device), given.precision)  # timm's dense model gets the faster one too
    loss_of = contestant.loss
    if given.compile:  # a shape each: batches of two sizes would otherwise make the second graph one for any size
        loss_of = torch.compile(loss_of, dynamic=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)

    def forward_backward(images: Tensor, masks: Any) -> None:
        with torch.autocast(given.device, torch.bfloat16, enabled=given.precision == "bf16"):
            loss = loss_of(images, masks)
        loss.backward()

    def step(images: Tensor, masks: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward(images, masks)
        optimizer.step()

    return forward_backward, step


def memory(comparison: str, name: str, given: argparse.Namespace) -> dict[str, float]:
    """Returns MiB an image of one contestant; meant to be the first thing its process does."""
    torch.set_num_threads(given.threads)
    contestant, side = build(comparison, name), MODELS[comparison].side
    forward_backward, step = prepare(contestant, given)
    peak, saved, few, many = {}, {}, given.batch_size // 2, given.batch_size
    for size in (few, many):
        images, masks = torch.randn(size, 3, side, side).to(given.device), contestant.draw(size, 0).to(given.device)
        for _ in range(2):  # gradients and optimizer state exist from here on
            step(images, masks)
        run = partial(forward_backward, images, masks)
        peak[size] = median(peak_bytes(run, given.device) for _ in range(3)) / 2**20
        saved[size] = saved_bytes(run) / 2**20
    more = {key: (x[many] - x[few]) / (many - few) for key, x in {"peak": peak, "saved": saved}.items()}
    return {"peak": peak[many] / many, "peak_each_more": more["peak"], "saved_each_more": more["saved"]}


def measure(comparison: str, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns memory, unless it is not wanted, and step times of each contestant."""
    figures, steps, side = {}, {}, MODELS[comparison].side
    images = torch.randn(given.batch_size, 3, side, side).to(given.device)
    for name in contestants(comparison):
        figures[name] = {}
        if not given.no_memory:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                figures[name] = pool.submit(memory, comparison, name, given).result()
        contestant = build(comparison, name)
        masks = [contestant.draw(given.batch_size, seed).to(given.device) for seed in range(WARMUP + given.rounds)]
        _, step = prepare(contestant, given)
        steps[name] = lambda r, step=step, masks=masks: step(images, masks[r])
    for name, seconds in interleaved(steps, given.rounds, given.device).items():
        rate = given.batch_size / median(seconds)
        figures[name] |= {"ms": 1000 * median(seconds), "images_per_s": rate, "seconds": seconds}
        if given.peak_tflops:
            flops = 3 * forward_flops(MODELS[comparison], contestants(comparison)[name][0])
            figures[name]["mfu"] = flops * rate / (1e12 * given.peak_tflops)
    return figures


def ratio(figures: dict[str, dict[str, Any]], a: str, b: str) -> float:
    """Returns the median over rounds of the step time of `a` over that of `b`."""
    return median(x / y for x, y in zip(figures[a]["seconds"], figures[b]["seconds"], strict=True))


def headlines(comparison: str, figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the ratios that are quoted: of our two modes to each of the others."""
    found = {}
    for mode in list(figures)[:2]:  # ours come first
        for other in list(figures)[2:]:
            found[f"{comparison} {mode}: step rate vs {other}"] = ratio(figures, other, mode)
            for key, words in ("peak", "activation memory"), ("peak_each_more", "activation memory of one more image"):
                if key in figures[mode]:
                    found[f"{comparison} {mode}: {words} vs {other}"] = figures[mode][key] / figures[other][key]
    return {key: round(value, 3) for key, value in found.items()}


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | ms a step | images/s | MFU, % | x ours | peak, MiB an image | each more | saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, x in figures.items():
        sizes = " | ".join(f"{x[key]:.1f}" if key in x else "" for key in MEMORY)
        mfu = f"{100 * x['mfu']:.1f}" if "mfu" in x else ""
        rates = f"{x['ms']:.1f} | {x['images_per_s']:.1f} | {mfu} | {ratio(figures, name, OURS):.2f}"
        lines.append(f"| {name} | {rates} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="vit_base,swin_base", help=f"from {', '.join(MODELS)}")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step, at least 2")
    parser.add_argument("--rounds", type=int, default=8, help=f"after {WARMUP} of warm-up")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile forward and backward pass of all")
    parser.add_argument("--peak_tflops", type=float, help="what the device can do, dense, in this precision: for MFU")
    parser.add_argument("--no_memory", action="store_true", help="step times only: memory takes most of the time")
    parser.add_argument("--out", type=Path, help="a markdown file for the tables")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # For the processes that measure memory: glibc returns big blocks at once, so that VmRSS is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    text = f"# A pretraining step\n\n{measured_on(given, 'torch', 'timm', 'transformers')}\n\n{LEGEND}\n"
    print(text, flush=True)
    comparisons, found = {}, {}
    for comparison in given.models.split(","):
        figures = comparisons[comparison] = measure(comparison, given)
        found |= headlines(comparison, figures)
        section = (
            f"## {comparison}, {given.batch_size} images of {MODELS[comparison].side} pixels\n\n{table(figures)}\n"
        )
        text += f"\n{section}"
        print(section, flush=True)
    if given.out:
        given.out.write_text(text)
    print(json.dumps(found | {"comparisons": comparisons}))


if __name__ == "__main__":
    main()
