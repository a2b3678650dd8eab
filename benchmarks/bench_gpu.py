"""How fast does a GPU pretrain? ViTs and Swins, eager and compiled, beside transformers, from shards, and what is left.

python benchmarks/bench_gpu.py                                   # the most wanted rows, in ten minutes: make bench_gpu
python benchmarks/bench_gpu.py --resume                          # the rest, and what failed: make bench_gpu_more
python benchmarks/bench_gpu.py --models vit_base,swin_base       # less

Measures row by row, the most wanted first, each in a process of its own, and writes the results file again after every
row. A row that fails says why in a line. Nothing is fetched: without --images, photos are parts of scikit-learn's two.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_loader import read_images
from flops import nominal_tflops
from gpu_report import Figures, best, read, text, verdicts
from gpu_rows import COMPILED, EAGER, GRAPHS, SIZES, VARIANTS, Row, run_row
from models import MODELS, TOYS, Vit
from timing import command_line, cpu_name, versions_of

RESULTS = Path(__file__).parent / "results"
CLOSER = ("vit_base", "swin_base", *TOYS)  # looked at in every mode, and profiled
NEXT = ("vit_large", "swin_tiny", "vit_small", "vit_huge")
LAUNCH_BOUND = ("swin_base", "vit_small", "swin_tiny", *TOYS)  # where launching kernels may take the longest
SHARDS_BATCH = 256  # at most, from shards
WORKERS = 4, 8, 16
UNSEARCHED = 256  # images a step of a variant that is not eager, at most, where no eager row has found a size
PATIENCE = 2  # times as long a row that is compiled may take
CONTESTANTS = "ours", "cross", "simmim", "hf", "shards"
EVERYTHING = {"models": MODELS, "variants": VARIANTS, "contestants": CONTESTANTS}
PACKAGES = "torch", "timm", "transformers", "accelerate", "triton"
START_METHODS = "forkserver", "spawn"  # the first imports torch once for all rows


def planned(given: argparse.Namespace) -> list[Row]:
    """Returns all rows, the most wanted first."""
    closer, others = ([name for name in order if name in given.models] for order in (CLOSER, NEXT))

    def steps(names: list[str], contestant: str, *wanted: str) -> list[Row]:
        profiled = [name for name in CLOSER if contestant == "ours" and GRAPHS not in wanted]
        return [
            Row("steps", name, contestant, variant, given.batch_sizes, name in profiled)
            for name in names
            for variant in wanted
            if variant in given.variants and contestant in given.contestants
        ]

    vits = [name for name in closer if isinstance(MODELS[name], Vit)]
    swins = [name for name in closer if name not in vits]
    with_peers = [name for name in others if name != "vit_huge"]
    return [
        *steps(closer, "ours", EAGER, COMPILED),
        *steps(swins, "simmim", EAGER),
        *(Row("shards", name, "ours") for name in vits if "shards" in given.contestants),
        *steps(closer, "hf", EAGER),
        *steps(others[:1], "ours", EAGER, COMPILED),
        *steps(vits, "cross", EAGER),
        *steps(others[1:], "ours", EAGER, COMPILED),
        *steps(with_peers, "hf", EAGER),
        *steps([name for name in LAUNCH_BOUND if name in given.models], "ours", GRAPHS),
        *steps(swins, "simmim", COMPILED),
        *steps(vits, "cross", COMPILED),
        *steps(closer + with_peers, "hf", COMPILED),
    ]


def completed(row: Row, found: Figures) -> Row:
    """Returns the row with what it takes from earlier ones: batch size, and the faster variant."""
    if row.kind == "shards":
        top = best({name: x for name, x in found.items() if GRAPHS not in name}, row.model, row.contestant)
        variant = top[1] if top else EAGER
        size = found[Row("steps", row.model, row.contestant, variant).name]["batch_size"] if top else SHARDS_BATCH
        return replace(row, variant=variant, sizes=(min(size, SHARDS_BATCH),))
    if row.variant in (COMPILED, GRAPHS):
        # A search of its own would compile for every size.
        if size := found.get(replace(row, variant=EAGER).name, {}).get("batch_size"):
            return replace(row, sizes=(size,), sized_by="eager")
        return replace(row, sizes=(max((n for n in row.sizes if n <= UNSEARCHED), default=row.sizes[0]),))
    return row


def time_limit(row: Row, given: argparse.Namespace) -> float:
    """Returns the seconds after which a row is given up."""
    return given.row_timeout_s * (PATIENCE if row.variant in (COMPILED, GRAPHS) else 1)


def measured(row: Row, given: argparse.Namespace, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields what a process measures of a row, or why it could not; ends it behind so many seconds."""
    context = multiprocessing.get_context(given.start_method)
    if given.start_method == "forkserver":
        context.set_forkserver_preload(["torch", "timm", "quarterlight.ssl.pretrain"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_row, args=(row, given, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while True:
            if not receiver.poll(max(0.0, end - time.monotonic())):
                yield {"name": row.name, "error": f"not done within {seconds:.0f} s"}
                return
            try:
                piece = receiver.recv()
            except EOFError:
                process.join(10)
                yield {"name": row.name, "error": f"its process ended with exit code {process.exitcode}"}
                return
            if piece is None:
                return
            yield piece
    finally:
        receiver.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # workers and compilers with it
        except ProcessLookupError:
            process.kill()
        process.join(10)


def hardware(given: argparse.Namespace, found: Figures) -> str:
    cpus = f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs"
    device = found.get("device", {})
    if "memory_gib" not in device:
        return cpus
    return f"{device['device']} ({device['memory_gib']:.0f} GiB), CUDA {device['cuda']} · {cpus}"


def said(name: str, piece: dict[str, Any]) -> str:
    """Returns a line for the terminal."""
    if "error" in piece:
        return f"{name}: not measured: {piece['error']}"
    if "images_per_s" in piece:
        alone = f", {piece['alone']:.0f} without steps" if "alone" in piece else ""
        return f"{name}: {piece['images_per_s']:.0f} images/s{alone}"
    if "matmul_tflops" in piece:
        return f"{name}: {piece.get('device', 'CPU')}, matrix products at {piece['matmul_tflops']:.1f} TFLOP/s"
    return f"{name}: for {100 * piece['gap_share']:.1f} % of a step no kernel runs"


def chosen(option: str, words: str, known: list[str]) -> list[str]:
    """Returns the words of a list with commas. Ends with a message where one is not known."""
    found = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [word for word in found if word not in known] or ([words] if not found else []):
        sys.exit(f"error: {option} {unknown[0]} is unknown: use some of {','.join(known)}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try the command")
    add("--models", default=",".join(name for name in MODELS if name not in TOYS), help="(default: %(default)s)")
    add(
        "--variants",
        default=",".join(VARIANTS),
        help="without eager, which searches for the batch size, the others take the largest of --batch_sizes up to "
        f"{UNSEARCHED} (default: %(default)s)",
    )
    add("--contestants", default=",".join(CONTESTANTS), help="(default: %(default)s)")
    add("--batch_sizes", help="images a step to try, instead of doubling while it pays: 64,128")
    add(
        "--seconds", type=float, default=3.0, help="that a row's steps are timed, and a third of it for each batch size"
    )
    add("--rounds", type=int, help="steps that are timed, instead of --seconds")
    add("--minutes", type=float, default=9.5, help="after which no row is measured any more")
    add(
        "--row_timeout_s",
        type=float,
        default=180,
        help=f"after which a row is given up; {PATIENCE} times as long where it is compiled",
    )
    add("--images", type=Path, help="a tar of JPEGs or a folder of images, for shards")
    add("--photos", type=int, default=512, help="images in the shards")
    add("--workers", help="of the loader (default: 4,8,16, as far as there are CPUs)")
    add("--precision", choices=["bf16", "no"], default="bf16")
    add("--backend", default="inductor", help="of torch.compile")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the CPU")
    add("--peak_tflops", type=float, help="what the device can do, instead of the maker's nominal rate")
    add("--out", type=Path, help="the results file (default: benchmarks/results/gpu_YYYYMM.md)")
    add("--resume", action="store_true", help="keep the figures of the results file, measure what it lacks or failed")
    given = parser.parse_args()
    given.models = chosen("--models", given.models, list(MODELS))
    given.variants = chosen("--variants", given.variants, list(VARIANTS))
    given.contestants = chosen("--contestants", given.contestants, list(CONTESTANTS))
    for option in ("batch_sizes", "workers"):
        words = getattr(given, option)
        numbers = [word for word in (words or "").split(",") if word]
        if not all(word.isdecimal() and int(word) for word in numbers):
            sys.exit(f"error: --{option} {words} is no list of numbers: give it as 4,8,16")
        setattr(given, option, tuple(map(int, numbers)))
    for option in ("seconds", "rounds", "minutes", "row_timeout_s", "photos", "threads", "peak_tflops"):
        if (number := getattr(given, option)) is not None and number <= 0:
            sys.exit(f"error: --{option} {number} must be above 0")
    given.batch_sizes = given.batch_sizes or SIZES
    cpus = len(os.sched_getaffinity(0))
    given.workers = given.workers or tuple(n for n in WORKERS if n <= cpus) or (cpus,)
    given.out = given.out or RESULTS / f"gpu_{date.today():%Y%m}.md"
    given.start_method = START_METHODS[0]
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda finds no GPU: run it where nvidia-smi lists one, or try it with --device cpu")
    if given.images:
        if not given.images.exists():
            sys.exit(f"error: --images {given.images} does not exist: give a tar of JPEGs or a folder of images")
        read_images(given.images, 1)
    if given.resume and not given.out.exists():
        sys.exit(f"error: --resume finds no {given.out}: leave it away, or name the file by --out")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return given


def kept(path: Path, rows: list[Row], workers: Iterable[int]) -> Figures:
    """Returns the figures of an earlier call, without all that belongs to those of the rows that it did not finish."""
    found = read(path)
    del found["device"]
    for row in rows:
        wanted = [row.name, *([f"profile of {row.name}"] if row.profiled else [])]
        wanted += [f"{row.name} {n}" for n in workers] if row.kind == "shards" else []
        own = [name for name in found if name in (*wanted, f"rest of {row.name}") or name.startswith(f"{row.name} ")]
        if not found.keys() >= set(wanted) or any("error" in found[name] for name in own):
            found = {name: x for name, x in found.items() if name not in own}
    return found


def filed(name: str, piece: dict[str, Any], found: Figures) -> str:
    """Returns the name under which a piece is kept: what was measured of a row before it failed stays."""
    return f"rest of {name}" if "error" in piece and name in found else name


def start_on(row: Row, given: argparse.Namespace) -> dict[str, Any]:
    """Returns what the device is. Ends with a message where it does not work."""
    for given.start_method in START_METHODS:
        piece, *_ = measured(row, given, given.row_timeout_s)  # its process may die behind it
        if "error" not in piece:
            return piece
    sys.exit(f"error: --device {given.device} does not work: {piece['error']}")


def main() -> None:
    given = parse()
    end = time.monotonic() + 60 * given.minutes
    device, rows = Row("device"), planned(given)
    everything = planned(argparse.Namespace(**vars(given) | EVERYTHING))
    found: Figures = {device.name: start_on(device, given)}
    if given.resume:
        ran_on = read(given.out)["device"].get("device")
        if ran_on != found["device"].get("device"):
            sys.exit(f"error: --resume: {given.out} is of another device ({ran_on}): name another file by --out")
        found |= kept(given.out, rows, given.workers)
    print(said(device.name, found[device.name]), flush=True)

    def write() -> None:
        started = f"{date.today()} · {hardware(given, found)} · {versions_of(*PACKAGES)} · precision {given.precision}"
        heading = f"{started}\n\n`{command_line()}`"
        told = [row for row in everything if row in rows or row.name in found]
        peak = given.peak_tflops or nominal_tflops(found[device.name].get("device", ""), given.precision)
        given.out.write_text(text(told, found, heading, peak, given.batch_sizes[0]))

    write()
    for row in rows:
        if row.name in found:
            continue
        if (left := end - time.monotonic()) <= 0:
            print("the time is over: --resume measures the rest", flush=True)
            break
        row = completed(row, found)
        for piece in measured(row, given, min(left, time_limit(row, given))):
            name = filed(piece.pop("name"), piece, found)
            found[name] = piece
            print(said(name, piece), flush=True)
            write()
    print(f"{given.out}\n{json.dumps({asked: judged for asked, _, judged in verdicts(found)})}")


if __name__ == "__main__":
    main()
