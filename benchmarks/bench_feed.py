"""Does the loader keep up with a device? Pretraining steps on batches from shards, beside steps on one that is there.

python benchmarks/bench_feed.py --images imagenet-200.tar --device cuda --workers 4 8 16

Prints images a second without a loader and for each number of workers, and the share of time that the device waits: by
how much steps take longer than those without a loader. The last line is a JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_loader import facts, open_shards, read_images, write_set
from step import MEAN, STD, Arrival, Step

from quarterlight.ssl.augment import Normalize, random_crop
from quarterlight.ssl.batches import Batch, Samples
from quarterlight.ssl.config import DataConfig
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.order import ShuffledOrder
from quarterlight.ssl.pretrain import PretrainTask
from quarterlight.ssl.spans import Spans

MASK_RATIO = 0.75
WARMUP = 5  # steps before time is taken, and with workers so many more that what lay ready at the start is used up


def warmup(workers: int) -> int:
    return WARMUP + 4 * workers


def seconds_a_step(step: Step | Arrival, batches: Iterator[Batch], count: int, workers: int = 0) -> float:
    """Returns the mean over `count` steps after those that warm up, from the device's idleness to its idleness."""

    def take(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step(next(batches))
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    take(warmup(workers))
    return take(count) / count


def samples_of(folder: Path, autoencoder: MaskedAutoencoder) -> Samples:
    """Returns what pretraining of the autoencoder reads of the set in `folder`."""
    index, encoder = open_shards(folder), autoencoder.encoder
    order, crop = ShuffledOrder(np.arange(len(index)), 0), random_crop(DataConfig(train=""), encoder.img_size)
    return Samples(index, order, crop, 0, masks=encoder.mask_sampler(MASK_RATIO))


def batches_of(samples: Samples, batch_size: int, steps: int, workers: int) -> Iterator[Batch]:
    """Returns batches for so many steps behind those that warm up."""
    steps += warmup(workers)
    spans = Spans(range(steps), batch_size=batch_size, micro_batch_size=batch_size, rank=0, world_size=1)
    return iter(build_loader(samples, spans, num_workers=workers))


def the_same(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and returns its figures."""
    device = torch.device(given.device)
    autoencoder = build_autoencoder(given.encoder, img_size=given.img_size)
    samples = samples_of(folder, autoencoder)
    task = PretrainTask(autoencoder, Normalize(MEAN, STD))
    step = Step(task, device, "bf16" if device.type == "cuda" else "no")
    there = next(batches_of(samples, given.batch_size, given.steps, 0)).to(device)
    alone = seconds_a_step(step, the_same(there), given.steps)
    print("| batches | images/s | waiting |\n|---|---|---|")
    print(f"| there already | {given.batch_size / alone:.0f} | |", flush=True)
    found: dict[str, Any] = {"images_per_s": given.batch_size / alone}
    for workers in given.workers:
        fed = seconds_a_step(step, batches_of(samples, given.batch_size, given.steps, workers), given.steps, workers)
        waiting = max(0.0, 1 - alone / fed)
        print(f"| by {workers} workers | {given.batch_size / fed:.0f} | {100 * waiting:.1f} % |", flush=True)
        found |= {f"images_per_s_{workers}_workers": given.batch_size / fed, f"waiting_{workers}_workers": waiting}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a tar of JPEGs or a folder of images at any depth")
    parser.add_argument("--samples", type=int, default=2048, help="in the shards; images repeat")
    parser.add_argument("--encoder", default="vit_base_patch16_224")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    given = parse()
    found = facts(argparse.Namespace(workers=max(given.workers)))
    if given.device == "cuda":
        found["hardware"] = f"{torch.cuda.get_device_name()}, {found['hardware']}"
    print(f"{found['date']} · {found['hardware']} · {found['versions']}\n\n`{found['command']}`\n")
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "set", read_images(given.images, given.samples), given.samples)
        found |= measure(Path(folder) / "set", given)
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}))


if __name__ == "__main__":
    main()
