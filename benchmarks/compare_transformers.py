"""Ours beside transformers' ViTMAE on the same images: loss over images seen, and over seconds.

python benchmarks/compare_transformers.py --shards shards/cifar10 --out runs/compare_transformers

Every step draws one batch for all contestants, with the crops and masks of launch/pretrain.py:

- `ours`: what launch/pretrain.py trains, with its optimizer.
- `ViTMAE, our start and optimizer`: the same initial weights (written by quarterlight as a transformers folder), masks,
  groups of weight decay, betas and schedule. Its losses should be ours but for rounding.
- `ViTMAE, its example's recipe`: a new ViTMAEForPreTraining (normal weights of 0.02 instead of Xavier's, norms of eps
  1e-12 instead of 1e-6) with the paper's fixed sine-cosine positions and normal mask and class tokens put in, trained
  as examples/pytorch/image-pretraining does by transformers' Trainer: AdamW with betas 0.9 and 0.999, weight decay but
  for biases and norms, gradients clipped to a norm of 1, cosine with 5 % of warm-up. The peak rate is `--base_lr`, as
  for ours; the example's default is 1e-3.
- `ViTMAE, its own start, our optimizer`: the same model under our optimizer: what of the difference is the start.
- `ViTMAE as shipped`: the example's recipe with nothing put in: transformers 5 leaves positions and both tokens at
  zero, and the positions are frozen.

losses.jsonl in --out has every step; curves.png, table.md and summary.json are made of it, also after a kill by
--summarize.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from contestants import autoencoder, hf_vit_mae
from models import MASK_RATIO, Vit
from timing import interleaved, measured_on
from torch import Tensor
from transformers import ViTMAEForPreTraining, get_cosine_schedule_with_warmup
from transformers.trainer_pt_utils import get_parameter_names

from quarterlight.finetune.pictures.figure import COLORS, new_picture, save_figure
from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import Normalize, random_crop
from quarterlight.ssl.batches import Batch, Samples
from quarterlight.ssl.command import run_command
from quarterlight.ssl.config import DataConfig, OptimConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.mae import MaskedAutoencoder
from quarterlight.ssl.optim import build_adamw, build_schedule, decay_groups, set_lr
from quarterlight.ssl.order import ShuffledOrder
from quarterlight.ssl.pos_embed import sincos_pos_embed
from quarterlight.ssl.small_images import find_small_images
from quarterlight.ssl.spans import Spans
from quarterlight.ssl.spec import ModelSpec
from quarterlight.ssl.write_transformers import hf_autoencoder, write_folder

IMG_SIZE, PATCH = 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
OURS, SAME = "ours", "ViTMAE, our start and optimizer"
TITLES = {  # by the names that --contestants takes
    "ours": OURS,
    "same": SAME,
    "own_start": "ViTMAE, its own start, our optimizer",
    "example": "ViTMAE, its example's recipe at our rate",
    "shipped": "ViTMAE as shipped, likewise",
}


class Racer(NamedTuple):
    """A model's loss, its optimizer, and the rate of each step."""

    loss: Callable[[Tensor, Batch], Tensor]  # of normalized images
    optimizer: torch.optim.Optimizer
    prepare: Callable[[int], None]  # sets the rate of a step
    clip_grad: float | None = None

    def step(self, images: Tensor, batch: Batch, number: int, precision: str) -> float:
        self.prepare(number)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss(images, batch)
        loss.backward()
        if self.clip_grad is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        self.optimizer.step()
        return loss.item()


def size_of(given: argparse.Namespace) -> Vit:
    return Vit("vit_tiny_patch16_224", 192, given.depth, 3, patch=PATCH, side=IMG_SIZE, decoder=(128, 2, 4))


def ours(given: argparse.Namespace) -> MaskedAutoencoder:
    torch.manual_seed(given.seed)
    return autoencoder(size_of(given)).model  # type: ignore[return-value]


def as_vit_mae(network: MaskedAutoencoder, attention: str) -> ViTMAEForPreTraining:
    """Returns transformers' model with the weights of ours, by way of a folder as launch/export.py writes it."""
    spec = ModelSpec("vit_tiny_patch16_224", {"img_size": IMG_SIZE, "patch_size": PATCH}, MEAN, STD)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), hf_autoencoder(network, MASK_RATIO), spec, 1.0)
        model = ViTMAEForPreTraining.from_pretrained(folder, attn_implementation=attention)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.requires_grad_(False)  # as a new model has them; transformers 5.24 loads them as trainable
    return model


def new_vit_mae(given: argparse.Namespace, attention: str) -> ViTMAEForPreTraining:
    torch.manual_seed(given.seed)
    return hf_vit_mae(size_of(given), attention).model  # type: ignore[return-value]


@torch.no_grad()
def put_positions_in(model: ViTMAEForPreTraining) -> None:
    """Gives a new model what the paper starts from: fixed sine-cosine positions, normal class and mask tokens."""
    grid = (IMG_SIZE // PATCH, IMG_SIZE // PATCH)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table[0, 1:] = sincos_pos_embed(table.shape[-1], grid)
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        torch.nn.init.normal_(token, std=0.02)


def our_loss(model: MaskedAutoencoder) -> Callable[[Tensor, Batch], Tensor]:
    return lambda images, batch: model(images, batch.masking, only_scored=True).loss  # type: ignore[arg-type]


def hf_loss(model: ViTMAEForPreTraining) -> Callable[[Tensor, Batch], Tensor]:
    # ViTMAE keeps the patches with the smallest noise; what restores our shuffling is the rank of each patch in it.
    return lambda images, batch: model(images, noise=batch.masking.ids_restore.float()).loss  # type: ignore[union-attr]


def by_our_schedule(loss: Any, model: torch.nn.Module, given: argparse.Namespace) -> Racer:
    optim = OptimConfig(base_lr=given.base_lr, warmup_steps=given.steps // 10)
    optimizer = build_adamw(decay_groups(model, optim.weight_decay), optim)
    schedule = build_schedule(optim, total_steps=given.steps, samples=50_000, batch_size=given.batch_size)
    return Racer(loss, optimizer, lambda number: set_lr(optimizer, schedule.lr_at(number)))


def by_its_example(loss: Any, model: torch.nn.Module, given: argparse.Namespace) -> Racer:
    names = get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "layernorm"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if name in names], "weight_decay": 0.05},
        {"params": [p for name, p in parameters.items() if name not in names], "weight_decay": 0.0},
    ]
    peak_lr = given.base_lr * given.batch_size / 256
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.999), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.05 * given.steps), given.steps)
    return Racer(loss, optimizer, lambda number: schedule.step() if number else None, clip_grad=1.0)


def faster_attention(given: argparse.Namespace, images: Tensor, batch: Batch) -> str:
    """Returns which of transformers' attention settings makes the faster step here."""
    steps = {}
    for attention in ("eager", "sdpa"):
        model = new_vit_mae(given, attention).to(given.device).train()
        racer = by_its_example(hf_loss(model), model, given)
        steps[attention] = lambda _, racer=racer: racer.step(images, batch, 0, given.precision)
    seconds = {name: median(taken) for name, taken in interleaved(steps, 5, given.device).items()}
    return min(seconds, key=seconds.__getitem__)


def contestants(given: argparse.Namespace, attention: str) -> dict[str, Racer]:
    """Returns those that were asked for, by their titles; those that start alike do so by the seed."""
    found = {}
    for name in given.contestants:
        model: Any = ours(given)
        if name == "same":
            model = as_vit_mae(model, attention)
        elif name != "ours":
            model = new_vit_mae(given, attention)
            if name != "shipped":
                put_positions_in(model)
        model.to(given.device).train()
        if name == "ours":
            choose_attention(model, torch.device(given.device), given.precision)
        loss = our_loss(model) if name == "ours" else hf_loss(model)
        by_example = name in ("example", "shipped")
        build = by_its_example if by_example else by_our_schedule
        found[TITLES[name]] = build(loss, model, given)
    return found


def batches(given: argparse.Namespace) -> Iterator[Batch]:
    """Yields the batches of launch/pretrain.py with this seed."""
    index = open_index(f"{given.shards}/train-*.tar")
    masks = ours(given).encoder.mask_sampler(MASK_RATIO)
    crop = random_crop(DataConfig(train="", crop_scale=(0.2, 1.0)), (IMG_SIZE, IMG_SIZE))
    order, small = ShuffledOrder(np.arange(len(index)), given.seed), find_small_images(index, 3, given.out)
    samples = Samples(index, order, crop, given.seed, masks=masks, small=small)
    size = given.batch_size
    spans = Spans(range(given.steps), batch_size=size, micro_batch_size=size, rank=0, world_size=1)
    return iter(build_loader(samples, spans, num_workers=1))


def race(given: argparse.Namespace) -> None:
    """Trains all contestants side by side and writes a line a step: the loss and the seconds of each."""
    normalize = Normalize(MEAN, STD).to(given.device)
    stream = batches(given)
    batch = next(stream).to(torch.device(given.device))
    attention = faster_attention(given, normalize(batch.images), batch)
    racers = contestants(given, attention)
    given.out.mkdir(parents=True, exist_ok=True)
    facts = {"measured": measured_on(given, "torch", "transformers", "timm"), "attention": attention}
    (given.out / "facts.json").write_text(json.dumps(facts | {"batch_size": given.batch_size}))
    with (given.out / "losses.jsonl").open("w") as file:
        for number in range(given.steps):
            images, losses = normalize(batch.images), {}

            def run(name: str, images: Tensor = images, batch: Batch = batch, number: int = number) -> None:
                losses[name] = racers[name].step(images, batch, number, given.precision)  # noqa: B023

            steps = {name: (lambda _, name=name: run(name)) for name in racers}
            seconds = interleaved(steps, 1, given.device, warmup=0, first=number)
            in_order = {name: losses[name] for name in racers}
            taken = {name: seconds[name][0] for name in racers}
            line = {"step": number + 1, "loss": in_order, "seconds": taken}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if (number + 1) % 20 == 0:
                shown = "  ".join(f"{name} {loss:.4f}" for name, loss in in_order.items())
                print(f"step {number + 1}/{given.steps}  {shown}", flush=True)
            if number + 1 < given.steps:
                batch = next(stream).to(torch.device(given.device))


def records_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the records of several folders as one: losses on the same batches, and seconds of the first folder."""
    lines: list[dict[str, Any]] = []
    for folder in folders:
        file = folder / "losses.jsonl"
        if not file.exists():
            raise InputError(f"{folder} holds no losses.jsonl, so nothing has been compared there")
        found = [json.loads(line) for line in file.read_text().splitlines()]
        lines = lines or [{"step": line["step"], "loss": {}, "seconds": {}} for line in found]
        for line, more in zip(lines, found, strict=False):
            line["loss"] |= more["loss"]
            line["seconds"] = line["seconds"] or more["seconds"]  # of those that ran side by side
        lines = lines[: len(found)]
    order = list(TITLES.values())
    for line in lines:
        line["loss"] = dict(sorted(line["loss"].items(), key=lambda item: order.index(item[0])))
    return lines


def table_of(lines: list[dict[str, Any]]) -> str:
    """Returns a line a contestant: means of up to 40 steps before eight steps, and the seconds of all its steps."""
    ends = sorted({max(1, len(lines) * k // 8) for k in range(1, 9)})
    text = ["| loss before step | " + " | ".join(map(str, ends)) + " | seconds |", "|---|" + "---|" * (len(ends) + 1)]
    for name in lines[0]["loss"]:
        means = [mean(line["loss"][name] for line in lines[max(0, end - 40) : end]) for end in ends]
        seconds = f"{sum(line['seconds'][name] for line in lines):.0f}" if name in lines[0]["seconds"] else ""
        text.append(f"| {name} | " + " | ".join(f"{x:.4f}" for x in means) + f" | {seconds} |")
    return "\n".join(text) + "\n"


def summarize(folders: Sequence[Path]) -> dict[str, Any]:
    """Draws losses.jsonl of the folders as curves.png, with a table, in the first; returns what is to be said of it."""
    out, lines = folders[0], records_of(folders)
    (out / "table.md").write_text(table_of(lines))
    facts = json.loads((out / "facts.json").read_text())
    names = list(lines[0]["loss"])
    last = lines[-max(2, len(lines) // 10) :]
    found: dict[str, Any] = {"steps": len(lines), "images": len(lines) * facts["batch_size"], **facts}
    if {OURS, SAME} <= set(names):
        apart = [line["loss"][OURS] - line["loss"][SAME] for line in lines]
        found["ours_minus_same"] = {
            "last tenth, mean": mean(apart[-len(last) :]),
            "last tenth, standard error": stdev(apart[-len(last) :]) / math.sqrt(len(last)),
            "largest of the first 20 steps": max(map(abs, apart[:20])),
            "largest": max(map(abs, apart)),
        }
    for name in names:
        found[name] = {"loss": mean(line["loss"][name] for line in last)}
        if name not in lines[0]["seconds"]:
            continue
        found[name]["seconds"] = sum(line["seconds"][name] for line in lines)
        if OURS in lines[0]["seconds"]:
            ratios = [line["seconds"][name] / line["seconds"][OURS] for line in lines]
            found[name]["step time / ours"] = median(ratios)
    picture = new_picture(
        "curves",
        "Training loss on the same batches, over images and over seconds",
        "Means of up to 20 steps. All see the same batches with the same masks; the seconds are those that each of "
        "those trained side by side spent in its own steps.",
        height=3.4,
    )
    axes = picture.figure.subplots(1, 2, sharey=True)
    every = min(20, max(1, len(lines) // 10))
    starts = range(0, len(lines) - every + 1, every)
    for i, name in enumerate(names):
        loss = [np.mean([x["loss"][name] for x in lines[k : k + every]]) for k in starts]
        images = [(k + every) * facts["batch_size"] / 1000 for k in starts]
        drawn = [(axes[0], images)]
        if name in lines[0]["seconds"]:
            drawn.append((axes[1], np.cumsum([line["seconds"][name] for line in lines])[every - 1 :: every]))
        for place, xs in drawn:
            dashes = "--" if name == SAME else "-"
            place.plot(xs, loss, label=name, color=COLORS[i], linestyle=dashes, linewidth=1.4)
    for place, label in zip(axes, ("thousand images", "seconds"), strict=True):
        place.set_xlabel(label, fontsize=9)
        place.grid(color="#dddddd", linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (normalized pixels)", fontsize=9)
    axes[0].legend(fontsize=7.5, edgecolor="none")
    save_figure(out / "curves.png", picture.figure)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/cifar10", help="folder of what launch/shards.py has made")
    parser.add_argument("--out", type=Path, required=True, help="folder for losses.jsonl, curves.png and summary.json")
    parser.add_argument("--contestants", default=",".join(TITLES), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--base_lr", type=float, default=2e-3, help="for 256 images")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the encoder, 192 wide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--summarize", action="store_true", help="train nothing: make picture, table and summary anew")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="other --out folders to --summarize with it")
    given = parser.parse_args()
    given.contestants = given.contestants.split(",")
    return given


def main(given: argparse.Namespace) -> None:
    if unknown := [name for name in given.contestants if name not in TITLES]:
        raise InputError(f"--contestants {unknown[0]} is unknown: use some of {','.join(TITLES)}")
    if given.steps < 2 or given.batch_size < 1:
        raise InputError(f"--steps {given.steps}, --batch_size {given.batch_size}: give at least 2 steps of an image")
    torch.set_num_threads(given.threads)
    if not given.summarize:
        if (given.out / "losses.jsonl").exists():
            raise InputError(f"--out {given.out} holds a record: name another folder, or --summarize it")
        race(given)
    print(json.dumps(summarize([given.out, *given.beside]), indent=1))


if __name__ == "__main__":
    run_command(parse, main)
