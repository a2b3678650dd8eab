"""The processes that share a run: what accelerate knows of them, how a batch is divided, and what they agree on."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from jaxtyping import Float
from torch import Tensor

from .batches import Batch
from .errors import InputError, Stopped
from .loader import Loader
from .sharding import apply_sharding, sharding_asked_for
from .signals import StopSignals
from .watch import alive

Found = TypeVar("Found")


def build_accelerator(precision: str) -> Accelerator:
    """Returns accelerate's view of this process: device, autocast, DDP or FSDP2; on a GPU if there is one.

    Raises InputError for fp16 without a GPU.
    """
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu and precision == "fp16":
        raise InputError("precision fp16 needs a GPU: use bf16 or no")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # a one-channel patch embedding: no cost, no error
    # The first process may scan shards or fit probes alone for longer than the usual ten minutes; `watch` is quicker.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    plugin = sharding_asked_for()
    on_gpus = None if cpu else plugin  # accelerate shards on GPUs only
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, fsdp_plugin=on_gpus, kwargs_handlers=[ddp, patience])
    apply_sharding(accelerator, plugin)
    return accelerator


def micro_batch_size(batch_size: int, micro: int | None, world_size: int) -> int:
    """Returns the images in one forward pass of one process.

    Raises InputError, with sizes that work, when the global batch does not divide by processes and micro-batches.
    """
    if batch_size < world_size or batch_size % world_size:
        lower, upper = batch_size // world_size * world_size, -(-batch_size // world_size) * world_size
        sizes = f"{lower} or {upper}" if lower else str(upper)
        raise InputError(f"batch_size {batch_size} is not a multiple of the {world_size} processes: use {sizes}")
    per_rank = batch_size // world_size
    if micro is None:
        return per_rank
    if micro < 1 or per_rank % micro:
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:3])
        raise InputError(
            f"micro_batch_size {micro} does not divide the {per_rank} images of a process "
            f"(batch_size {batch_size} / {world_size} processes): use {', '.join(map(str, near))}"
        )
    return micro


def from_main(value: Any) -> Any:
    """Returns the main process's `value` on every process; all of them must call it."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def on_all(action: Callable[[], Found], turns: AbstractContextManager[Any] | None = None) -> Found:
    """Returns what `action` does on each process; all of them must call it. `turns` says which of them goes first.

    Raises InputError on all of them alike when one of them does, or else the others would wait for it for ever.
    """
    found: list[Found] = []
    mistakes: list[str] = []
    with turns or nullcontext():
        try:
            found.append(action())
        except InputError as error:
            mistakes.append(str(error))
    if mistakes := gather_object(mistakes):
        raise InputError(mistakes[0])
    return found[0]


def any_process(yes: bool, accelerator: Accelerator) -> bool:
    """Returns whether it is so on any process; all of them must call it."""
    if accelerator.num_processes == 1:
        return yes
    flag = torch.tensor(float(yes), device=accelerator.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def until_stopped(
    loader: Loader, signals: StopSignals, accelerator: Accelerator, *, failed: Callable[[], bool] = lambda: False
) -> Iterator[Batch]:
    """Yields the batches of an evaluation; on all processes alike none any more when `failed()` on one of them.

    Raises Stopped on all processes alike when one of them got a signal.
    """
    batches = iter(loader)
    spans = [loader.spans.of_rank(rank) for rank in range(accelerator.num_processes)]
    for _ in range(max(map(len, spans))):  # a rank with a batch less answers all the same
        alive()
        if any_process(signals.received is not None or failed(), accelerator):
            if any_process(signals.received is not None, accelerator):
                raise Stopped("stopped in the middle of an evaluation")
            return
        if (batch := next(batches, None)) is not None:
            yield batch


class Verdict(NamedTuple):
    """What was found about a step."""

    step: int
    skipped: bool  # loss or gradients were not finite
    stop: bool  # some process got a signal
    loss: float  # of this process
    grad_norm: float
    keys: list[str]  # of the samples that this process saw


class Verdicts:
    """What all processes find about each step: whether it is skipped, and whether to stop.

    One small reduction a step. Its result stays on the device, where the optimizer reads it, and is looked at here one
    step later on a GPU, so that nothing waits for the device; at once on a CPU.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._pending: list[tuple[int, Tensor, Any, list[str]]] = []

    def reach(self, step: int, loss: Tensor, grad_norm: Tensor, *, stop: bool, keys: list[str]) -> Float[Tensor, ""]:
        """Returns 1.0, on the device, where the loss of any process or the gradients are not finite, else 0.0.

        Under fp16 gradients overflow now and then, and the loss scaler skips such steps itself: only the loss counts.
        """
        loss, norm = loss.detach().float(), grad_norm.detach().float()
        bad = ~torch.isfinite(loss)
        if self.accelerator.scaler is None:
            bad = bad | ~torch.isfinite(norm)
        found = torch.stack([bad.float(), torch.full_like(loss, float(stop))])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        values, copied = torch.cat([found, torch.stack([loss, norm])]), None
        if values.is_cuda:
            on_device, values = values, torch.empty(len(values), pin_memory=True)
            values.copy_(on_device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append((step, values, copied, keys))
        return found[0]

    def known(self, *, wait: bool = False) -> list[Verdict]:
        """Returns the verdicts not returned before, oldest first; without `wait`, only those that are there."""
        ready = len(self._pending) - (0 if wait or self.accelerator.device.type != "cuda" else 1)
        found, self._pending = self._pending[:ready], self._pending[ready:]
        verdicts = []
        for step, values, copied, keys in found:
            if copied is not None:
                copied.synchronize()
            skipped, stop, loss, norm = values.tolist()
            verdicts.append(Verdict(step, skipped > 0, stop > 0, loss, norm, keys))
        return verdicts
