"""How much CPU does an image cost from shard to batch, beside webdataset or ImageFolder with torchvision on PIL images?

python benchmarks/bench_loader.py --images imagenet-200.tar --cifar cifar10-test.tar.gz --json loader.json

Builds data sets in a temporary folder (TMPDIR; about 10 MB for each 100 samples), then lets all pipelines make the same
random crops through torch's DataLoader. Prints tables and, as its last line, one JSON object. Linux only: it reads the
CPU clocks of the workers.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from timing import command_line, cpu_name, versions_of

SEED = 0
SUFFIXES = "jpg", "jpeg", "png", "webp"
SHARDS = 16
CIFAR_TIMES = 4  # as many samples, since they are small
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of random crops: area and width / height
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DEEP_STEP, LONG_EPOCH = 100_000, 1_281_167  # where a run resumes; ImageNet-1k's samples
PSNR_CROPS, PSNR_LIMIT = 512, 99.0  # equal images would have an infinite one
PARTS = "throughput", "read", "psnr", "resume"
BARE = "bare os.pread"
OURS, NORMALIZED, WDS, FOLDER = "ours", "ours + normalise", "webdataset + PIL", "ImageFolder + PIL"
LEGEND = """\
`CPU us`: CPU time of the main process and all workers for an image, median over rounds (smallest-largest). In a round
every pipeline, in random order, makes one pass over all samples; its workers have been there since a pass before that
counts for nothing. `ratio`: that time over ours in the same round. `wall`: images a second by the clock on the wall,
whatever else the machine does. The others yield normalized floats; ours uint8 that the device normalizes, and `ours +
normalise` does it on the main process's CPU instead. Images of up to 64 px are decoded once before, into an array
beside the shards, which is not counted."""

Images = list[tuple[str, bytes]]  # suffix and content of the files


def our_loader(index: Any, size: int, batch_size: int, workers: int, steps: range, epoch: int | None = None) -> Any:
    """Returns the loader that pretraining would build, without masks; with `epoch`, samples repeat up to that many."""
    from quarterlight.ssl.augment import random_crop
    from quarterlight.ssl.batches import Samples
    from quarterlight.ssl.config import DataConfig
    from quarterlight.ssl.loader import build_loader
    from quarterlight.ssl.order import ShuffledOrder
    from quarterlight.ssl.small_images import find_small_images
    from quarterlight.ssl.spans import Spans

    order = ShuffledOrder(np.resize(np.arange(len(index)), epoch or len(index)), SEED)
    crop = random_crop(DataConfig(train="", crop_scale=SCALE, crop_ratio=RATIO), (size, size))
    spans = Spans(steps, batch_size=batch_size, micro_batch_size=batch_size, rank=0, world_size=1)
    small = find_small_images(index, 3, Path(index.paths[0]).parent)
    samples = Samples(index, order, crop, SEED, small=small)
    return build_loader(samples, spans, num_workers=workers, persistent=True)


def our_reader(index: Any, batch_size: int) -> Iterator[tuple[bytes, str, int]]:
    """Yields bytes, key and label of an epoch's samples, with what the loader does to know them but no more."""
    from quarterlight.ssl.order import ShuffledOrder

    order = ShuffledOrder(np.arange(len(index)), SEED)
    for start in range(0, len(index), batch_size):
        ids = order.ids(np.arange(start, min(start + batch_size, len(index))))
        for i, label in zip(ids.tolist(), index.label[ids], strict=True):
            yield index.read(i), index.key(i), label


def bare_reader(index: Any) -> Callable[[], Iterator[bytes]]:
    """Returns what yields the same bytes in the same order by one os.pread each, with files and places at hand."""
    from quarterlight.ssl.order import ShuffledOrder

    ids = ShuffledOrder(np.arange(len(index)), SEED).ids(np.arange(len(index))).tolist()
    files = [os.open(path, os.O_RDONLY) for path in index.paths]
    places = [(files[index.shard[i]], int(index.size[i]), int(index.offset[i])) for i in ids]
    return lambda: (os.pread(*place) for place in places)


def our_boxes(files: list[bytes], size: int) -> list[tuple[tuple[int, int, int, int], bool]]:
    """Returns the box (left, top, right, bottom) that is cut at positions 0, 1, ... of these files, and the flips.

    Of a large photo decoded at a smaller scale that is the box that was drawn, widened to whole blocks of eight pixels.
    """
    from quarterlight.ssl.augment import RandomCrop, random_crop_box
    from quarterlight.ssl.decode import ImageFile
    from quarterlight.ssl.randoms import uniforms

    boxes = []
    draws = uniforms(SEED, "augment", np.arange(len(files)), RandomCrop.num_draws)
    for image, u in zip(map(ImageFile, files), draws, strict=True):
        drawn = random_crop_box(image.height, image.width, u[2:], SCALE, RATIO)
        (top, left, height, width), _ = image.scaled_box(drawn, (size, size))
        boxes.append(((left, top, left + width, top + height), bool(u[0] < 0.5)))
    return boxes


def pil_transform(size: int) -> Callable[[Image.Image], Any]:
    """Returns the crops of MAE's pretraining in torchvision's classes: PIL image to normalized floats."""
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(size, SCALE, RATIO, transforms.InterpolationMode.BICUBIC)
    to_floats = transforms.ToTensor(), transforms.Normalize(MEAN, STD)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_floats])


def torch_loader(dataset: Any, batch_size: int, workers: int, **args: Any) -> Any:
    """Returns torch's DataLoader with workers started as ours are."""
    import torch

    cuda = torch.cuda.is_available()
    context = ("forkserver" if cuda else "fork") if workers else None
    args |= {"persistent_workers": workers > 0, "multiprocessing_context": context, "pin_memory": cuda}
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=workers, **args)


def wds_samples(folder: Path) -> Any:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("shards/*.tar"))
    return webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)


def wds_loader(folder: Path, size: int, batch_size: int, workers: int) -> Any:
    dataset = wds_samples(folder).decode("pil").to_tuple(";".join(SUFFIXES), "cls")
    return torch_loader(dataset.map_tuple(pil_transform(size)), batch_size, workers)  # labels stay as they are


def folder_loader(folder: Path, size: int, batch_size: int, workers: int) -> Any:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder / "images"), pil_transform(size))
    return torch_loader(dataset, batch_size, workers, shuffle=True)


def open_shards(folder: Path) -> Any:
    from quarterlight.ssl.index import open_index

    return open_index(str(folder / "shards" / "*.tar"))


def read_images(source: Path, most: int) -> Images:
    """Returns the images in a tar or below a folder, at most so many, from all over it."""

    def chosen(files: list[Any], name: Callable[[Any], str]) -> list[Any]:
        images = [file for file in files if name(file).rpartition(".")[2].lower() in SUFFIXES]
        if not images:
            sys.exit(f"{source} holds no {', '.join(SUFFIXES)}")
        return [images[i] for i in np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)]

    if source.is_dir():
        paths = chosen(sorted(path for path in source.rglob("*") if path.is_file()), str)
        return [(path.suffix[1:].lower(), path.read_bytes()) for path in paths]
    with tarfile.open(source) as tar:
        members = chosen([member for member in tar if member.isfile()], lambda member: member.name)
        contents = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    return [(m.name.rpartition(".")[2].lower(), data) for m, data in zip(members, contents, strict=True)]


def shrink(file: tuple[str, bytes], short: int = 256) -> tuple[str, bytes]:
    """Returns the image with its shorter side at `short` pixels as JPEG, or as it is where that is no smaller."""
    with Image.open(io.BytesIO(file[1])) as image:
        if min(image.size) <= short:
            return file
        size = tuple(round(side * short / min(image.size)) for side in image.size)
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return "jpg", buffer.getvalue()


def write_set(folder: Path, images: Images, samples: int) -> None:
    """Writes shards/*.tar and images/CLASS/*, both with so many samples; images repeat under other keys."""
    (folder / "shards").mkdir(parents=True)
    for part in np.array_split(np.arange(samples), SHARDS):
        with tarfile.open(folder / "shards" / f"{part[0]:06d}.tar", "w") as tar:
            for i in part.tolist():
                suffix, data = images[i % len(images)]
                for name, content in ((f"{i:06d}.{suffix}", data), (f"{i:06d}.cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                file = folder / "images" / str(i % 10) / f"{i:06d}.{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)


def cpu_seconds() -> float:
    """Returns the CPU time so far of this process and its living children: clock_getcpuclockid(pid) of Linux."""
    clocks = [(~child.pid << 3) | 2 for child in multiprocessing.active_children()]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def one_pass(loader: Any, use: Callable[[Any], object]) -> dict[str, float]:
    """Returns what an image of one pass costs: microseconds of CPU time and of wall time."""
    cpu, wall, count = cpu_seconds(), time.perf_counter(), 0
    for batch in loader:  # at its end the workers wait, having read nothing beyond it
        use(batch[0])
        count += len(batch[0])
    return {"cpu": 1e6 * (cpu_seconds() - cpu) / count, "wall": 1e6 * (time.perf_counter() - wall) / count}


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Returns what each of `runs` returned in every round, after one round that counts for nothing."""
    shuffled, results = random.Random(SEED), {name: [] for name in runs}
    for r in range(1 + rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            result = runs[name]()
            if r:
                results[name].append(result)
    return results


def throughput(folder: Path, size: int, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns CPU and wall time of an image by each pipeline in each round."""
    from quarterlight.ssl.augment import Normalize

    index, normalize = open_shards(folder), Normalize(MEAN, STD)
    args = size, given.batch_size, given.workers
    loader = our_loader(index, *args, range(len(index) // given.batch_size))
    loaders = {OURS: loader, NORMALIZED: loader, WDS: wds_loader(folder, *args), FOLDER: folder_loader(folder, *args)}
    uses = {name: normalize if name == NORMALIZED else lambda images: None for name in loaders}
    runs = {name: lambda name=name: one_pass(loaders[name], uses[name]) for name in loaders}
    passes = interleaved(runs, given.rounds)
    return {name: {key: [x[key] for x in results] for key in ("cpu", "wall")} for name, results in passes.items()}


def reading(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Returns microseconds of CPU time to read a sample in shuffled order without decoding.

    Ours, webdataset's, and that of the system calls alone, most of which is copying the bytes.
    """
    index = open_shards(folder)

    def cost(samples: Callable[[], Any]) -> float:
        start, count = time.process_time(), sum(1 for _ in samples())
        return 1e6 * (time.process_time() - start) / count

    ours, wds = (lambda: our_reader(index, given.batch_size)), (lambda: wds_samples(folder))
    bare = bare_reader(index)
    costs = interleaved({OURS: lambda: cost(ours), BARE: lambda: cost(bare), WDS: lambda: cost(wds)}, given.rounds)
    return {name: median(values) for name, values in costs.items()}


def psnr_of_crops(folder: Path, images: Images, given: argparse.Namespace) -> list[float]:
    """Returns the PSNR in dB of our loader's first crops to PIL's: decoded, cut, resized and flipped by it."""
    steps = range(-(-PSNR_CROPS // given.batch_size))
    crops, files = [], []
    for batch in our_loader(open_shards(folder), given.size, given.batch_size, given.workers, steps):
        crops.extend(batch.images.numpy().copy())
        files += [images[int(key) % len(images)][1] for key in batch.keys]
    found = []
    for crop, file, (box, flip) in zip(crops, files, our_boxes(files, given.size), strict=True):
        picture = Image.open(io.BytesIO(file))
        right = picture.convert("RGB").crop(box).resize((given.size, given.size), Image.Resampling.BICUBIC)
        right = right.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else right
        error = np.square(np.asarray(right, np.float64) - crop).mean()
        found.append(min(PSNR_LIMIT, 10 * np.log10(255**2 / max(error, 1e-9))))
    return found


def resuming(folder: Path, size: int, given: argparse.Namespace) -> dict[int, float]:
    """Returns the seconds to the first batch at step 0 and deep in a run, with epochs as long as ImageNet's."""
    index = open_shards(folder)

    def first_batch(step: int) -> float:
        start = time.perf_counter()
        steps = range(step, step + 100)
        loader = our_loader(index, size, given.batch_size, given.workers, steps, epoch=LONG_EPOCH)
        next(iter(loader))
        return time.perf_counter() - start

    seconds = interleaved({str(step): lambda step=step: first_batch(step) for step in (0, DEEP_STEP)}, given.rounds)
    return {int(step): median(values) for step, values in seconds.items()}


def ratios(figures: dict[str, dict[str, Any]], name: str, to: str) -> list[float]:
    """Returns, for every round, the CPU time of `name` over that of `to`."""
    return [a / b for a, b in zip(figures[name]["cpu"], figures[to]["cpu"], strict=True)]


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = ["| | CPU us an image | images/s and core | ratio | wall images/s |", "|---|---|---|---|---|"]
    for name, x in figures.items():
        cpu, times = x["cpu"], ratios(figures, name, OURS)
        spread = f"{median(cpu):.0f} ({min(cpu):.0f}-{max(cpu):.0f})"
        ratio = f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        lines.append(f"| {name} | {spread} | {1e6 / median(cpu):.0f} | {ratio} | {1e6 / median(x['wall']):.0f} |")
    return "\n".join(lines)


def facts(given: argparse.Namespace) -> dict[str, str]:
    """Returns date, hardware, versions and command."""
    packages = "torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy"
    return {
        "date": str(date.today()),
        "hardware": f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs, {given.workers} workers of one thread",
        "versions": f"Python {sys.version.split()[0]}, {versions_of(*packages)}",
        "command": command_line(),
    }


def measure(name: str, folder: Path, images: Images, size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the headlines of one data set and prints its table."""
    found: dict[str, Any] = {}
    print(f"## {name}: {len(images)} images, {sum(len(x) for _, x in images) / len(images) / 1e3:.1f} kB each\n")
    if "throughput" in given.parts:
        figures = throughput(folder, size, given)
        print(f"{table(figures)}\n", flush=True)
        keys = {"": (WDS, OURS), "_imagefolder": (FOLDER, OURS), "_normalised": (WDS, NORMALIZED)}
        found |= {f"ratio_{name}{key}": median(ratios(figures, *pair)) for key, pair in keys.items()}
        found[f"cpu_us_{name}"] = {pipeline: median(x["cpu"]) for pipeline, x in figures.items()}
        found[f"wall_us_{name}"] = {pipeline: median(x["wall"]) for pipeline, x in figures.items()}
    if "read" in given.parts:
        read = reading(folder, given)
        print(
            f"Reading a sample in shuffled order: {read[OURS]:.1f} us of CPU, {read[BARE]:.1f} of them by the bare "
            f"pread, {read[OURS] - read[BARE]:.1f} by the rest; by webdataset {read[WDS]:.1f}.\n"
        )
        found |= {f"read_us_{name}": read[OURS], f"read_us_{name}_webdataset": read[WDS]}
        found |= {f"read_us_{name}_bare": read[BARE], f"read_overhead_us_{name}": read[OURS] - read[BARE]}
    if "psnr" in given.parts and name == "originals":
        psnr = psnr_of_crops(folder, images, given)
        low, middle, worst = np.percentile(psnr, 5), median(psnr), min(psnr)
        print(f"PSNR to PIL of {len(psnr)} crops: median {middle:.1f} dB, 5 % below {low:.1f}, worst {worst:.1f}.\n")
        found |= {"psnr_median_db": middle, "psnr_5th_percentile_db": low, "psnr_worst_db": worst}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a tar of JPEGs or a folder of images at any depth")
    parser.add_argument("--cifar", type=Path, help="the same with images of 32 x 32 pixels; a .tar.gz will do")
    parser.add_argument("--size", type=int, default=224, help="side of the crops of --images in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="after one that counts for nothing")
    parser.add_argument("--samples", type=int, default=2048, help=f"a pass; {CIFAR_TIMES} times as many of --cifar")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for the JSON object")
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if not (given.images or given.cifar):
        parser.error("give --images or --cifar")
    if given.workers > SHARDS:
        parser.error(f"--workers: at most {SHARDS}, the number of shards")
    return given


def main() -> None:
    given = parse()
    import torch

    torch.set_num_threads(1)
    found = facts(given)
    print(f"# From shards to batches\n\n{found['date']} · {found['hardware']} · {found['versions']}\n")
    print(f"`{found['command']}`\n\n{LEGEND}\n", flush=True)
    sets: dict[str, tuple[Images, int, int]] = {}  # images, samples, size of crops
    if given.images:
        images = read_images(given.images, given.samples)
        sets["originals"] = images, given.samples, given.size
        sets["short256"] = list(map(shrink, images)), given.samples, given.size
    if given.cifar:
        sets["cifar"] = read_images(given.cifar, CIFAR_TIMES * given.samples), CIFAR_TIMES * given.samples, 32
    with tempfile.TemporaryDirectory() as temporary:
        for name, (images, samples, size) in sets.items():
            folder = Path(temporary) / name
            write_set(folder, images, samples)
            found |= measure(name, folder, images, size, given)
        if "read" in given.parts:
            for what in ("read_us", "read_overhead_us"):
                found[what] = found[f"{what}_{next(iter(sets))}"]
        if "resume" in given.parts:
            name = next(iter(sets))
            seconds = resuming(Path(temporary) / name, sets[name][2], given)
            found |= {"resume_s": seconds[DEEP_STEP], "start_s": seconds[0]}
            print(f"First batch: {seconds[DEEP_STEP]:.2f} s at step {DEEP_STEP}, {seconds[0]:.2f} s at step 0.\n")
    text = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()})
    if given.json:
        given.json.write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
