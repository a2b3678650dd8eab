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
from typing import Any, NamedTuple

import timm
import torch
from timing import WARMUP, interleaved, measured_on
from torch import Tensor, nn
from transformers import PreTrainedModel, SwinConfig, SwinForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import build_autoencoder
from quarterlight.ssl.masking import random_masking

VITS = {"vit_small": (384, 12, 6), "vit_base": (768, 12, 12), "vit_large": (1024, 24, 16)}  # width, blocks, heads
SWINS = {"swin_tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]), "swin_base": (128, [2, 2, 18, 2], [4, 8, 16, 32])}
OURS = "ours"
PIXELS = 3 * 16**2, 3 * 32**2  # values in a unit of a ViT, of a Swin
MEMORY = ("peak", "peak_each_more", "saved_each_more")
LEGEND = """\
`x ours`: step time over that of `ours` in the same round, median. `peak`: memory of forward and backward pass beyond
weights, gradients and optimizer state. `each more`: what one more image in the batch adds to it, so without what does
not grow, such as weights cast to bf16. `saved`: what autograd keeps for the backward pass, for one more image.
`timm dense` encodes all patches and predicts nothing. `MFU`: the operations of matrix products that the step needs by
formula (two for a multiplication, three forward passes for a step) over those that the device could do
(`--peak_tflops`)."""


class Contestant(NamedTuple):
    """Masks are drawn outside of what is timed, since in a real run the loader's workers draw them."""

    model: nn.Module
    draw: Callable[[int, int], Any]  # (batch, seed) to masks
    loss: Callable[[Tensor, Any], Tensor]  # of (images, masks)


def ours(name: str, mask_ratio: float, **args: Any) -> Contestant:
    model = build_autoencoder(name, **args)
    return Contestant(
        model,
        lambda batch, seed: model.encoder.sample_masking(batch, mask_ratio, seed=seed),
        lambda images, masking: model(images, masking, only_scored=True).loss,
    )


def hf_vit_mae(comparison: str, attention: str) -> Contestant:
    width, depth, heads = VITS[comparison]
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    config = ViTMAEConfig(**shape, num_attention_heads=heads, norm_pix_loss=True, attn_implementation=attention)
    model = ViTMAEForPreTraining(config)

    def draw(batch: int, seed: int) -> Tensor:
        return torch.rand(batch, 196, generator=torch.Generator().manual_seed(seed))

    return Contestant(model, draw, lambda images, noise: model(images, noise=noise).loss)


def hf_swin(comparison: str, attention: str) -> Contestant:
    width, depths, heads = SWINS[comparison]
    shape = {"embed_dim": width, "depths": depths, "num_heads": heads, "encoder_stride": 32}
    config = SwinConfig(**shape, drop_path_rate=0.0, attn_implementation=attention)
    model = SwinForMaskedImageModeling(config)

    def draw(batch: int, seed: int) -> Tensor:
        units = random_masking(batch, 49, 0.6, generator=torch.Generator().manual_seed(seed)).is_masked.view(-1, 7, 7)
        return units.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)  # 32-pixel units of 8 x 8 patches

    return Contestant(model, draw, lambda images, masked: model(images, bool_masked_pos=masked).loss)


def timm_dense(name: str) -> Contestant:
    model = timm.create_model(name, num_classes=0, drop_path_rate=0.0)

    def loss(images: Tensor, _: Tensor) -> Tensor:
        return model.forward_features(images).float().abs().mean()

    return Contestant(model, lambda batch, seed: torch.empty(0), loss)


def contestants(comparison: str) -> dict[str, Callable[[], Contestant]]:
    """Returns how to build each contestant: ours, ours in another mode, and the others."""
    if comparison in VITS:
        name, hf, build_hf = f"{comparison}_patch16_224", "HF ViTMAE", hf_vit_mae
        normal, mode, hidden = {}, "cross decoder, 1/3 of the masked", 0.75
        special = {"decoder": DecoderConfig(name="cross"), "pred_share": 1 / 3}
    else:
        name, hf, build_hf = f"{comparison}_patch4_window7_224", "HF SwinForMaskedImageModeling", hf_swin
        normal, mode, hidden = {"decoder": DecoderConfig(depth=1)}, "SimMIM mode", 0.6
        special = {"encode_masked": True, "decoder": DecoderConfig(name="linear"), "target": "pixels", "loss": "l1"}
    return {
        OURS: partial(ours, name, 0.75, **normal),
        f"{OURS}, {mode}": partial(ours, name, hidden, **special),
        f"{hf} sdpa": partial(build_hf, comparison, "sdpa"),
        f"{hf} eager": partial(build_hf, comparison, "eager"),
        "timm dense": partial(timm_dense, name),
    }


def block_flops(queries: float, keys: float, width: int) -> float:
    """Returns operations of a transformer block: 2 * 12 C^2 a token, and 4 C for every key of a query."""
    return queries * (24 * width**2 + 4 * keys * width)


def vit_flops(width: int, depth: int, tokens: float) -> float:
    """Returns operations of a ViT's encoder; `tokens` is the number of patches seen, of 196 that are embedded."""
    return 2 * PIXELS[0] * width * 196 + depth * block_flops(tokens + 1, tokens + 1, width)


def swin_flops(width: int, depths: list[int], share: float) -> float:
    """Returns operations of a Swin's encoder that sees this share of every window of 7 x 7."""
    total = 2 * 3 * 4**2 * width * share * 56**2
    for stage, depth in enumerate(depths):
        tokens, d = share * (56 >> stage) ** 2, width << stage
        total += depth * block_flops(tokens, share * 49, d) + (2 * 4 * (d // 2) * d * tokens if stage else 0)
    return total


def decoder_flops(encoder_width: int, depth: int, kept: int, hidden: int, values: int, *, tail: bool) -> float:
    """Returns operations of MAE's decoder, 512 wide; with `tail` its end is computed for hidden units only."""
    everything = kept + hidden
    ends = hidden if tail else everything
    total = 2 * encoder_width * 512 * kept + (depth - 1) * block_flops(everything, everything, 512)
    # Of the last block keys and values (a sixth of the linear layers' work) are those of all tokens either way.
    return total + block_flops(ends, everything, 512) + 4 * 512**2 * (everything - ends) + 2 * 512 * values * ends


def cross_flops(encoder_width: int, depth: int, kept: int, predicted: int, values: int) -> float:
    """Returns operations of the cross decoder: queries look at the kept tokens, of which keys and values are made."""
    total = 2 * encoder_width * 512 * kept + 2 * 512 * values * predicted
    return total + depth * (predicted * (20 * 512**2 + 4 * kept * 512) + 4 * 512**2 * kept)


def forward_flops(comparison: str) -> dict[str, float]:
    """Returns operations of a forward pass for one image, of each contestant in the order of `contestants`."""
    if comparison in VITS:
        width, depth, _ = VITS[comparison]
        visible, dense = vit_flops(width, depth, 49), vit_flops(width, depth, 196)
        normal = visible + decoder_flops(width, 8, 50, 147, PIXELS[0], tail=True)
        special = visible + cross_flops(width, 8, 50, 49, PIXELS[0])
        theirs = visible + decoder_flops(width, 8, 50, 147, PIXELS[0], tail=False)
    else:
        width, depths, _ = SWINS[comparison]
        visible, dense = swin_flops(width, depths, 12 / 49), swin_flops(width, depths, 1)
        normal = visible + decoder_flops(8 * width, 1, 12, 37, PIXELS[1], tail=True)
        special = dense + 2 * 8 * width * PIXELS[1] * 30  # of 49 units at a ratio of 0.6
        theirs = dense + 2 * 8 * width * PIXELS[1] * 49
    return dict(zip(contestants(comparison), (normal, special, theirs, theirs, dense), strict=True))


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
    if not isinstance(model, PreTrainedModel):  # timm's dense model gets the faster kernel too
        choose_attention(model, torch.device(given.device), given.precision)
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
    contestant = contestants(comparison)[name]()
    forward_backward, step = prepare(contestant, given)
    peak, saved, few, many = {}, {}, given.batch_size // 2, given.batch_size
    for size in (few, many):
        images, masks = torch.randn(size, 3, 224, 224).to(given.device), contestant.draw(size, 0).to(given.device)
        for _ in range(2):  # gradients and optimizer state exist from here on
            step(images, masks)
        run = partial(forward_backward, images, masks)
        peak[size] = median(peak_bytes(run, given.device) for _ in range(3)) / 2**20
        saved[size] = saved_bytes(run) / 2**20
    more = {key: (x[many] - x[few]) / (many - few) for key, x in {"peak": peak, "saved": saved}.items()}
    return {"peak": peak[many] / many, "peak_each_more": more["peak"], "saved_each_more": more["saved"]}


def measure(comparison: str, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns memory, unless it is not wanted, and step times of each contestant."""
    figures, steps = {}, {}
    images = torch.randn(given.batch_size, 3, 224, 224).to(given.device)
    for name, build in contestants(comparison).items():
        figures[name] = {}
        if not given.no_memory:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                figures[name] = pool.submit(memory, comparison, name, given).result()
        contestant = build()
        masks = [contestant.draw(given.batch_size, seed).to(given.device) for seed in range(WARMUP + given.rounds)]
        _, step = prepare(contestant, given)
        steps[name] = lambda r, step=step, masks=masks: step(images, masks[r])
    for name, seconds in interleaved(steps, given.rounds, given.device).items():
        rate = given.batch_size / median(seconds)
        figures[name] |= {"ms": 1000 * median(seconds), "images_per_s": rate, "seconds": seconds}
        if given.peak_tflops:
            figures[name]["mfu"] = 3 * forward_flops(comparison)[name] * rate / (1e12 * given.peak_tflops)
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
    parser.add_argument("--models", default="vit_base,swin_base", help=f"from {', '.join([*VITS, *SWINS])}")
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
        section = f"## {comparison}, {given.batch_size} images of 224 pixels\n\n{table(figures)}\n"
        text += f"\n{section}"
        print(section, flush=True)
    if given.out:
        given.out.write_text(text)
    print(json.dumps(found | {"comparisons": comparisons}))


if __name__ == "__main__":
    main()
