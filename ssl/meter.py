"""Means and rates between two log lines."""

import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .batches import Batch


class Meter:
    """Sums losses on the device, without waiting for it, and the time that this process waits for data."""

    def __init__(self, accelerator: Accelerator, batch_size: int) -> None:
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.bad_samples = 0  # since the start of this process
        self.start()

    def start(self) -> None:
        """Begins a new interval."""
        self.sums: dict[str, Tensor] = {}
        self.forward_passes = 0
        self.steps = 0
        self.waited_s = 0.0
        self.paused_s = 0.0
        self.started_at = time.perf_counter()

    def next_batch(self, loader: Iterator[Batch]) -> Batch:
        """Returns the next batch, timing the wait."""
        asked_at = time.perf_counter()
        batch = next(loader)
        self.waited_s += time.perf_counter() - asked_at
        self.bad_samples += len(batch.bad)
        return batch

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Adds the figures of one forward pass."""
        self.forward_passes += 1
        for name, value in {"loss": loss, **metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def pause(self, since: float) -> None:
        """Leaves the time since `since` (perf_counter) out of the rates: saving and evaluating are not training."""
        self.paused_s += time.perf_counter() - since

    def read(self) -> dict[str, float]:
        """Returns means over the interval and all processes; every process must call it at the same step."""
        names = sorted(self.sums)
        values = [self.sums[name] / self.forward_passes for name in names]
        values.append(torch.tensor(float(self.bad_samples), device=self.accelerator.device))
        reduced: Any = self.accelerator.reduce(torch.stack(values), reduction="sum")
        *sums, bad_samples = reduced.tolist()
        figures = {name: value / self.accelerator.num_processes for name, value in zip(names, sums, strict=True)}
        elapsed_s = time.perf_counter() - self.started_at - self.paused_s
        return figures | {
            "images_per_s": self.steps * self.batch_size / elapsed_s,
            "data_wait_pct": 100 * self.waited_s / elapsed_s,
            "memory_gb": _peak_memory_gb(self.accelerator.device),
            "bad_samples": int(bad_samples),
        }

    def seconds_for(self, steps: int) -> float:
        """Returns how long `steps` more steps take at the rate of this interval."""
        return steps * (time.perf_counter() - self.started_at - self.paused_s) / max(1, self.steps)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes elsewhere
