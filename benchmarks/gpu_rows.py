"""What one process of bench_gpu.py measures: the device, steps of a contestant, or steps fed from shards."""

import json
import os
import re
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_feed import batches_of, samples_of, seconds_a_step, the_same
from bench_loader import SHARDS, read_images, write_set
from contestants import builder
from models import MODELS
from photos import sample_photos
from step import Arrival, OtherMasks, Step, task_of
from torch import Tensor

from quarterlight.ssl.batches import Batch

EAGER, COMPILED, GRAPHS = VARIANTS = ("eager", "compiled", "cuda_graphs")
MODES: dict[str, dict[str, Any]] = {COMPILED: {}, GRAPHS: {"mode": "reduce-overhead"}}
SIZES = tuple(32 << i for i in range(8))  # images a step that are tried: 32 to 4096
RISE = 1.02  # a larger batch must bring so much, or the search ends
UNSEARCHED = "fixed"  # in a search's place, where no eager row has found a size
SMALLER = 2  # times that a batch is halved which a variant does not fit
WARMUP, FEWEST, MOST = 2, 3, 100  # steps that count for nothing, and that are timed
DRAWN = 4  # batches of masks that take turns
PROFILED = 3  # steps
SHOWN = 12  # kernels
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in the profiler's trace
KINDS = {  # of kernels: the first expression that matches a name says what it is
    "fused by the compiler": r"^triton|^cpp_fused|_fused_",
    "attention": r"flash|fmha|attention|sdpa|sdp_",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|addmm|\bmm\b|bmm|matmul|linear|convolution",
    "optimizer, gradient norm": r"multi_tensor|adam|foreach|linalg_vector_norm",
    "copies and casts": r"copy|memcpy|memset|\bcat|catarray|fill|zero",
    "norms, softmax, sums": r"norm|gammabeta|softmax|reduce|sum|mean",
    "gather and scatter": r"index|gather|scatter",
    "elementwise": r"elementwise|gelu|\badd|\bmul|\bsub|\bdiv|\bpow",
}


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    kind: str  # "device", "steps" or "shards"
    model: str = ""
    contestant: str = ""
    variant: str = ""
    sizes: tuple[int, ...] = SIZES  # images a step to choose from, smallest first; the first, where it is not eager
    profiled: bool = False
    sized_by: str = UNSEARCHED  # where it is not eager

    @property
    def name(self) -> str:
        variant = "" if self.kind == "shards" else self.variant  # that of shards is found out on the way
        return " ".join(word for word in (self.kind, self.model, self.contestant, variant) if word)


def run_row(row: Row, given: Namespace, pipe: Any) -> None:
    """Sends what is measured, piece by piece, and None at the end; what fails is a piece too."""
    os.setsid()  # so that what it starts can be ended with it
    torch.set_num_threads(given.threads)
    measure = {"device": measure_device, "steps": measure_steps, "shards": measure_shards}[row.kind]
    try:
        for piece in measure(row, given):
            pipe.send({"name": row.name} | piece)
    except Exception as error:
        pipe.send({"name": row.name, "error": reason(error)})
    pipe.send(None)


def reason(error: BaseException) -> str:
    """Returns an error in a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether memory did not suffice; the driver, cuBLAS and the compiler have errors of their own for it."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def measure_device(row: Row, given: Namespace) -> Iterator[dict[str, Any]]:
    """Yields what the device is and the rate of a large product of matrices in the steps' precision."""
    device, is_cuda = torch.device(given.device), given.device == "cuda"
    n = 8192 if is_cuda else 512
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = step_times(lambda i: a @ b, 1.0, given, most=None)  # the clock takes a while to settle
    rates = [2 * n**3 / seconds / 1e12 for seconds in times]
    found: dict[str, Any] = {"matmul_tflops": median(rates), "matmul_size": n}
    if is_cuda:
        facts = torch.cuda.get_device_properties(device)
        found |= {"device": facts.name, "memory_gib": facts.total_memory / 2**30, "cuda": torch.version.cuda}
    yield found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_times(
    step: Callable[[int], object], seconds: float, given: Namespace, *, most: int | None = MOST
) -> list[float]:
    """Returns the seconds of each of several steps in a row, about `seconds` in all, behind those that warm up.

    They are `most` at most, unless that is None. On a GPU by events, so that nothing waits for the device between
    steps.
    """
    device = torch.device(given.device)
    for i in range(WARMUP):
        wait(device)
        start = time.perf_counter()
        step(i)
        wait(device)
        took = time.perf_counter() - start
    count = given.rounds or max(FEWEST, round(seconds / took))
    count = min(most, count) if most and not given.rounds else count
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for i in range(count):
            step(i)
            clock.append(time.perf_counter())
        return [b - a for a, b in pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for i in range(count):
        step(i)
        events[i + 1].record()
    wait(device)
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def batches_there(size: int, side: int, draw: Callable[[int, int], Any], device: torch.device) -> list[Batch]:
    """Returns batches that share their images, on the device, each with masks of its own."""
    images = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, device=device)
    labels, masks = torch.full((size,), -1), [draw(size, seed) for seed in range(DRAWN)]
    masks = [OtherMasks(x) if isinstance(x, Tensor) else x for x in masks]
    return [Batch(images, labels, x, [], []).to(device) for x in masks]  # type: ignore[arg-type]


def measure_steps(row: Row, given: Namespace) -> Iterator[dict[str, Any]]:
    """Yields the figures of a contestant at the batch size with the most images a second, and a profile if wanted."""
    device, side = torch.device(given.device), MODELS[row.model].side
    contestant = builder(row.model, row.contestant)()
    step = Step(task_of(contestant), device, given.precision, compile_args(row.variant, given.backend))
    first_step_s = 0.0

    def timed(size: int, seconds: float) -> tuple[list[float], list] | None:
        """Returns step times and batches, or None where memory does not suffice."""
        nonlocal first_step_s
        try:
            batches = batches_there(size, side, contestant.draw, device)
            start = time.perf_counter()
            step(batches[0])
            wait(device)
            first_step_s = first_step_s or time.perf_counter() - start
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            return step_times(lambda i: step(batches[i % DRAWN]), seconds, given), batches
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        step.optimizer.zero_grad()
        torch.cuda.empty_cache()
        return None

    size, tried = None, {}
    if row.variant == EAGER:
        tried, end = search(row.sizes, lambda n: timed(n, given.seconds / 3))
        size = max(tried, key=tried.__getitem__) if tried else None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    else:
        size, end = row.sizes[0], row.sized_by
    result = None
    for _ in range(1 + SMALLER):
        if size and (result := timed(size, given.seconds)) is not None:
            break
        size = size and size // 2
        torch.compiler.reset()  # another size is another graph, not one for any size
    if result is None or size is None:
        yield {"error": f"out of memory at {row.sizes[0]} images"}
        return
    times, batches = result
    found: dict[str, Any] = {"batch_size": size, "step_s": median(times), "images_per_s": size / median(times)}
    found |= {"steps": len(times), "first_step_s": first_step_s, "search": end, "tried": tried}
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    yield found
    if row.profiled:
        try:
            yield {"name": f"profile of {row.name}"} | profile(step, batches, median(times), device)
        except Exception as error:  # some machines do not let one look
            yield {"name": f"profile of {row.name}", "error": reason(error)}


def compile_args(variant: str, backend: str) -> dict[str, Any] | None:
    return None if variant == EAGER else MODES[variant] | {"backend": backend}


def search(sizes: Iterable[int], timed: Callable[[int], tuple[list[float], list] | None]) -> tuple[dict, str]:
    """Returns images a second by batch size, and why no further one was tried."""
    rates: dict[int, float] = {}
    for size in sizes:
        result = timed(size)
        if result is None:
            return rates, f"out of memory at {size}"
        before = max(rates.values(), default=0.0)
        rates[size] = size / median(result[0])
        del result  # its batches lie in the device's memory
        if rates[size] < RISE * before:
            return rates, f"no faster at {size}"
    return rates, "largest tried"


def profile(step: Step, batches: list, step_s: float, device: torch.device) -> dict[str, Any]:
    """Returns shares of the time of all kernels by kind and by kernel, and the share of a step that none ran.

    That share is of a step that was not profiled, since a profiler makes launches slower.
    """
    from torch.profiler import ProfilerActivity

    is_cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        for i in range(PROFILED):
            step(batches[i % DRAWN])
        wait(device)
    seconds: dict[str, float] = defaultdict(float)
    if is_cuda:
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        kernels = [x for x in events if x.get("ph") == "X" and x.get("cat") in KERNELS]
        for kernel in kernels:
            seconds[kernel["name"]] += kernel["dur"] / 1e6
        busy_s = covered([(x["ts"], x["ts"] + x["dur"]) for x in kernels]) / 1e6
        launches = len(kernels)
    else:
        for event in profiler.key_averages():
            seconds[event.key] += event.self_cpu_time_total / 1e6
        busy_s, launches = sum(seconds.values()), sum(event.count for event in profiler.key_averages())
    total = sum(seconds.values())
    if not total:
        raise RuntimeError("the profiler saw no kernel")
    kinds: dict[str, float] = defaultdict(float)
    for name, value in seconds.items():
        kinds[kind_of(name)] += value / total
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "kernel_s": busy_s / PROFILED,
        "step_s": step_s,
        "gap_share": max(0.0, 1 - busy_s / PROFILED / step_s),
        "launches": launches // PROFILED,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": {name: value / total for name, value in largest},
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel, re.IGNORECASE)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def measure_shards(row: Row, given: Namespace) -> Iterator[dict[str, Any]]:
    """Yields the rate on a batch that is there, and for numbers of workers the fed rate and the loader's without steps.

    Most workers first.
    """
    device, batch_size = torch.device(given.device), row.sizes[0]
    contestant = builder(row.model, row.contestant)()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"
        images = read_images(given.images, given.photos) if given.images else sample_photos(given.photos)
        write_set(folder, images, max(len(images), 2 * batch_size, SHARDS))
        samples = samples_of(folder, contestant.model)  # type: ignore[arg-type]  # ours
        step = Step(task_of(contestant), device, given.precision, compile_args(row.variant, given.backend))
        there, steps = the_same(samples.batch(0, batch_size).to(device)), given.rounds or 30
        synthetic = batch_size / seconds_a_step(step, there, steps)
        kilobytes = sum(len(data) for _, data in images) / len(images) / 1000
        yield {"batch_size": batch_size, "images_per_s": synthetic, "file_kb": kilobytes, "variant": row.variant}
        for workers in sorted(given.workers, reverse=True):
            count = given.rounds or 10 + 2 * workers
            rates = [
                batch_size / seconds_a_step(what, batches_of(samples, batch_size, count, workers), count, workers)
                for what in (step, Arrival(device))
            ]
            yield {"name": f"{row.name} {workers}", "workers": workers, "images_per_s": rates[0], "alone": rates[1]}
