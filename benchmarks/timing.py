"""How the benchmarks take times, and what they say about where."""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

WARMUP = 2  # rounds that count for nothing


def interleaved(
    steps: dict[Any, Callable[[int], object]], rounds: int, device: str, *, warmup: int = WARMUP, first: int = 0
) -> dict[Any, list[float]]:
    """Returns the seconds that each step, a function of the round, took in every round after the warm-up.

    Each round takes every step once and begins with another, the first with number `first`, so that noise from outside
    meets all alike. On one thread of a CPU it is the time of the process, which neighbors do not lengthen.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for r in range(warmup + rounds):
        begin = (first + r) % len(names)
        for name in names[begin:] + names[:begin]:
            wait()
            start = clock()
            steps[name](r)
            wait()
            if r >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def versions_of(*packages: str) -> str:
    """Returns the versions of packages in a line."""

    def named(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    return ", ".join(map(named, packages))


def command_line() -> str:
    """Returns how this benchmark was called."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def cpu_name() -> str:
    """Returns the processor, and which bf16 instructions it has."""
    cpu = Path("/proc/cpuinfo").read_text()
    name = cpu.partition("model name")[2].partition("\n")[0].strip("\t: ") or "CPU"  # ARM's have no such line
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu]
    return f"{name} ({', '.join(flags) or 'no bf16 instructions'})"


def measured_on(given: argparse.Namespace, *packages: str) -> str:
    """Returns date, hardware, versions and command in markdown."""
    hardware = torch.cuda.get_device_name() if given.device == "cuda" else f"{cpu_name()}, {given.threads} thread(s)"
    hardware += ", CPU time" if given.device == "cpu" and given.threads == 1 else ""
    told = f"{date.today()} · {hardware} · {versions_of(*packages)} · precision {given.precision}"
    return f"{told}\n\n`{command_line()}`"
