"""The loop of every stage. It knows a task only as a module whose `forward(batch)` is the training loss.

Exact continuation rests on three things: the loader is a function of the position, every step reseeds from (seed, step,
rank), and the learning rate is a function of the step. A state is then weights, optimizer moments and one number.
"""

import contextlib
import math
import random
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import nn

from .attention import choose_attention
from .batches import Batch, Samples
from .checkpoint import load_state, save_state, state_folders
from .config import StageConfig
from .errors import InputError
from .fetching import Fetching
from .loader import build_loader
from .log import RunLog, append_jsonl, drop_later_records
from .meter import Meter
from .optim import Schedule, set_lr
from .order import settings_of
from .randoms import step_seed
from .spans import Spans

Figures = dict[str, float]

BAD_SAMPLES_ALLOWED = 10  # however few were read: a share of a few samples says nothing


class Task(nn.Module):
    """What the loop trains: `task(batch)` returns its loss and a dictionary of other scalars, means over the batch.

    The loss is `forward` and not a method of its own because DDP works through `forward`.
    """

    @property
    def network(self) -> nn.Module:
        """The part that torch.compile gets; the rest handles keys and random choices."""
        return self


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop."""

    evaluate: Callable[[int, RunLog], Figures]  # all processes: figures after `step` steps
    evaluate_every_steps: int  # 0: at the end only
    export: Callable[[dict[str, Any]], None]  # main process, with the progress: writes the released weights
    fetching: Fetching | None = None  # of remote shards; None: there are none


def build_accelerator(precision: str) -> Accelerator:
    """Returns accelerate's view of this process: device, autocast, DDP. On a GPU by CUDA or ROCm, else on the CPU.

    Raises InputError for fp16 without a GPU.
    """
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu and precision == "fp16":
        raise InputError("precision fp16 needs a GPU: use bf16 or no")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # a one-channel patch embedding: no cost, no error
    # The first process may scan shards or fit probes alone for longer than the usual ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[ddp, patience])


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


def train(
    task: Task,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    schedule: Schedule,
    config: StageConfig,
    accelerator: Accelerator,
    hooks: Hooks,
    run_dir: Path,
) -> Figures:
    """Trains to the last step of `schedule`, from the newest state in `run_dir` if any. Returns the last figures.

    Raises InputError when the state belongs to other data, when the processes do not find the same state, when too many
    samples are unreadable, and when loss or gradients are no longer finite (before they reach a state).
    """
    rank, world_size, total_steps = accelerator.process_index, accelerator.num_processes, schedule.total_steps
    micro = micro_batch_size(config.batch_size, config.micro_batch_size, world_size)
    accum_steps = config.batch_size // world_size // micro
    if micro % samples.repeats:
        raise InputError(
            f"data.repeats {samples.repeats} does not divide the {micro} images that a process takes at once: use a "
            "divisor, or another micro_batch_size"
        )
    progress = _resume(run_dir, task, optimizer, samples, rank)
    first_step = progress["step"]
    choose_attention(task, accelerator.device, config.precision)
    if config.compile:
        task.network.compile()
    model, prepared = accelerator.prepare(task, optimizer)  # the model first, so that resumed moments follow it
    if accelerator.scaler is not None and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    _agree_on(first_step, accelerator, run_dir)
    log = RunLog(run_dir, first_step=first_step, total_steps=total_steps, enabled=accelerator.is_main_process)
    if first_step:
        log.say(f"continuing from step {first_step} of {total_steps} in {run_dir}")
    spans = Spans(
        range(first_step, total_steps),
        batch_size=config.batch_size,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
    )
    loader = iter(build_loader(samples, spans, num_workers=config.num_workers, fetching=hooks.fetching))
    meter = Meter(accelerator, config.batch_size)
    keys: list[str] = []

    for step in range(first_step, total_steps):
        done, last = step + 1, step + 1 == total_steps
        _reseed(step_seed(config.seed, "step", step, rank))
        set_lr(prepared, schedule.lr_at(step))
        for i in range(accum_steps):
            batch = meter.next_batch(loader)
            keys = batch.keys
            _record(batch, run_dir, step, rank, config.record_samples)
            with accelerator.no_sync(model) if i + 1 < accum_steps else contextlib.nullcontext():
                loss, metrics = model(batch.to(accelerator.device))
                accelerator.backward(loss / accum_steps)
            meter.add(loss, metrics)
        log_now = last or _due(done, config.log_every_steps)
        save_now = last or _due(done, config.save_every_steps)
        norm = _clip(accelerator, model, prepared, config, measure=log_now or save_now)
        prepared.step()
        prepared.zero_grad()
        meter.steps += 1
        log.advance()
        if log_now or save_now:
            means = meter.read()
            epoch = done * config.batch_size / len(samples.order)
            figures = {"epoch": epoch, "loss": means["loss"], "lr": schedule.lr_at(step)} | means | norm
            _check(figures, done, config, (done - first_step) * config.batch_size, keys, accelerator)
            progress["figures"] = figures
        if log_now:
            log.metrics(done, progress["figures"], eta_s=meter.seconds_for(total_steps - done))
            meter.start()
        paused_at = time.perf_counter()
        if save_now:
            progress |= {"step": done, "samples_seen": done * config.batch_size}
            if accelerator.scaler is not None:
                progress["scaler"] = accelerator.scaler.state_dict()
            if accelerator.is_main_process:
                save_state(run_dir, task, optimizer, progress, keep=config.keep_states)
                if not last:  # else it follows at once, with the evaluation's figures
                    hooks.export(progress)
            accelerator.wait_for_everyone()
        if not last and _due(done, hooks.evaluate_every_steps):
            hooks.evaluate(done, log)
        meter.pause(paused_at)

    progress["figures"] |= hooks.evaluate(total_steps, log)  # also when a killed run had only this left to do
    if accelerator.is_main_process:
        hooks.export(progress)
    log.close()
    return progress["figures"]


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _resume(
    run_dir: Path, task: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, rank: int
) -> dict[str, Any]:
    """Returns the progress of the newest state, loaded into task and optimizer, or that of a new run."""
    fingerprint = samples.index.fingerprint()
    states = state_folders(run_dir)
    progress = {"step": 0, "samples_seen": 0, "data_fingerprint": fingerprint, "figures": {}}
    if states:
        progress = load_state(states[-1], task, optimizer)
    if progress["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{run_dir} was trained on other shards (fingerprint {progress['data_fingerprint']}, data.train now has "
            f"{fingerprint}): give the same data.train, or another run_dir"
        )
    order = settings_of(samples.order)
    if progress.setdefault("order", order) != order:
        changed = "; ".join(f"{key} {progress['order'].get(key)}, now {order[key]}" for key in order)
        raise InputError(
            f"{run_dir}: the run began with another order of samples ({changed}): give data.lanes, data.block_samples, "
            "data.repeats and the sources as they were (remote shards have other defaults than local ones)"
        )
    for path in [run_dir / f"samples-rank{rank}.jsonl", *([run_dir / "bad_samples.jsonl"] if rank == 0 else [])]:
        drop_later_records(path, progress["step"] - 1)  # their steps count from 0, and are done again
    return progress


def _agree_on(first_step: int, accelerator: Accelerator, run_dir: Path) -> None:
    """Raises InputError when a process found another state to continue from; they would wait for ever."""
    found: Any = accelerator.gather(torch.tensor([first_step], device=accelerator.device))
    if len(set(found.tolist())) > 1:
        raise InputError(
            f"run_dir {run_dir}: the processes found states of steps {sorted(set(found.tolist()))}: all "
            "machines must see the same run_dir"
        )


def _reseed(seed: int) -> None:
    """Seeds every generator that a layer, mixup or random erasing may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _record(batch: Batch, run_dir: Path, step: int, rank: int, record_samples: bool) -> None:
    """Lists unreadable samples in bad_samples.jsonl and, when asked, every sample in samples-rankN.jsonl."""
    if batch.bad:
        append_jsonl(run_dir / "bad_samples.jsonl", [{"step": step, **bad._asdict()} for bad in batch.bad])
    if record_samples:
        masks = batch.masking.ids_keep.numpy() if batch.masking is not None else np.empty((len(batch.keys), 0))
        records = [
            {
                "step": step,
                "key": key,
                "pixels": zlib.crc32(image.numpy().tobytes()),
                "mask": zlib.crc32(mask.tobytes()),
            }
            for key, image, mask in zip(batch.keys, batch.images, masks, strict=True)
        ]
        append_jsonl(run_dir / f"samples-rank{rank}.jsonl", records)


def _clip(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, config: StageConfig, *, measure: bool
) -> Figures:
    """Clips gradients where configured. Returns their norm before it at the steps where it is asked for."""
    limit = config.optim.clip_grad
    if limit is None and not measure:
        return {}
    if limit is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    else:
        accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {"grad_norm": float(norm)} if measure and norm is not None else {}


def _check(
    figures: Figures, done: int, config: StageConfig, samples_read: int, keys: list[str], accelerator: Accelerator
) -> None:
    """Raises InputError when loss or gradients are not finite or too many samples could not be read."""
    watched = ["loss"] if accelerator.scaler is not None else ["loss", "grad_norm"]  # the fp16 scaler skips such steps
    for name in watched:
        if not math.isfinite(figures.get(name, 0.0)):
            raise InputError(
                f"the {name} is {figures[name]} at step {done} (last samples: {', '.join(keys[:4])}): lower "
                "optim.base_lr, set optim.clip_grad 1, or use --precision no, in a new run_dir if this one holds states"
            )
    bad, limit = int(figures["bad_samples"]), config.data.max_bad_share
    if bad > max(BAD_SAMPLES_ALLOWED, limit * samples_read):
        raise InputError(
            f"{bad} reads of samples failed in {samples_read} (data.max_bad_share is {limit}): see bad_samples.jsonl, "
            "leave them out with launch/shards.py repair, or raise data.max_bad_share"
        )
