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
        self._step: dict[str, Tensor] = {}  # sums over the forward passes of a step
        self._passes = 0
        self.start()

    def start(self) -> None:
        """Begins a new interval."""
        zero = torch.zeros((), device=self.accelerator.device)
        self.sums: dict[str, Tensor] = {}
        self.counted = zero  # steps in the means
        self.largest_norm = zero
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
        self._passes += 1
        for name, value in {"loss": loss, **metrics}.items():
            self._step[name] = self._step.get(name, 0.0) + value.detach().float()

    def step_loss(self) -> Tensor:
        """Returns the loss of the step so far: the mean over its forward passes."""
        return self._step["loss"] / self._passes

    def end_step(self, grad_norm: Tensor, skipped: Tensor) -> None:
        """Adds a step to the interval, all of its forward passes; a skipped one (1.0) only to the rates.

        Norms that are not finite count as zero: under fp16 they are no reason to skip.
        """
        counts = skipped < 0.5
        norm = grad_norm.detach().float()
        norm = torch.where(torch.isfinite(norm), norm, 0.0)
        means = {name: value / self._passes for name, value in self._step.items()} | {"grad_norm": norm}
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(counts, value, 0.0)
        self.largest_norm = torch.maximum(self.largest_norm, torch.where(counts, norm, 0.0))
        self.counted = self.counted + counts
        self.steps += 1
        self._step, self._passes = {}, 0

    def pause(self, since: float) -> None:
        """Leaves the time since `since` (perf_counter) out of the rates: saving and evaluating are not training."""
        self.paused_s += time.perf_counter() - since

    def read(self) -> dict[str, float]:
        """Returns means over the interval and all processes; every process must call it at the same step.

        `grad_norm_max` is the largest norm of a step, where a spike of the loss shows. NaN: every step was skipped.
        """
        names = sorted(self.sums)
        values = [self.sums[name] / self.counted for name in names]  # all processes skip the same steps
        values += [self.largest_norm, torch.tensor(float(self.bad_samples), device=self.accelerator.device)]
        reduced: Any = self.accelerator.reduce(torch.stack(values), reduction="sum")
        *sums, bad_samples = reduced.tolist()
        names.append("grad_norm_max")
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
