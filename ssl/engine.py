"""The loop of every stage. It knows a task only as a module whose `forward(batch)` is its training loss.

Exact continuation rests on three things: the loader is a function of the position, every step reseeds from (seed, step,
rank), and the learning rate is a function of the step. A state is then weights, optimizer moments and one number.
"""

import contextlib
import math
import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from .checkpoint import load_state, save_state, state_folders
from .config import StageConfig
from .encoders import choose_attention
from .errors import InputError
from .loader import Batch, Samples, Spans, build_loader
from .log import RunLog, append_jsonl
from .meter import Meter
from .optim import Schedule, set_lr
from .randoms import step_seed

Figures = dict[str, float]

BAD_SAMPLES_ALLOWED = 10  # however few were read: a share of a few samples says nothing


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop."""

    evaluate: Callable[[int, RunLog], Figures]  # all processes: figures after `step` steps
    evaluate_every_steps: int  # 0: at the end only
    export: Callable[[dict[str, Any]], None]  # main process, with the progress: writes the released weights


def build_accelerator(precision: str) -> Accelerator:
    """Returns accelerate's view of this process: device, autocast, DDP. One process a CPU or GPU, however launched.

    Raises InputError for fp16 without a GPU.
    """
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "1",
        "true",
        "yes",
    )
    if cpu and precision == "fp16":
        raise InputError("precision fp16 needs a GPU: use bf16 or no")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[ddp])


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
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    schedule: Schedule,
    config: StageConfig,
    accelerator: Accelerator,
    hooks: Hooks,
    run_dir: Path,
) -> Figures:
    """Trains to the last step of `schedule`, from the newest state in `run_dir` if any. Returns the last figures.

    `task(batch)` returns (loss, metrics), a scalar and a dictionary of scalars, means over the batch.

    Raises InputError when the state belongs to other data, when too many samples are unreadable, and when the loss is
    no longer finite (the newest state then still holds finite weights).
    """
    world_size, total_steps = accelerator.num_processes, schedule.total_steps
    micro = micro_batch_size(config.batch_size, config.micro_batch_size, world_size)
    accum_steps = config.batch_size // world_size // micro
    progress = _resume(run_dir, task, optimizer, samples)
    first_step = progress["step"]
    choose_attention(task, accelerator.device, config.precision)
    if config.compile:
        for child in task.children():  # not the task itself: the keys in a batch would compile it anew for each
            child.compile()
    model, prepared = accelerator.prepare(task, optimizer)
    if accelerator.scaler is not None and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    log = RunLog(run_dir, first_step=first_step, total_steps=total_steps, enabled=accelerator.is_main_process)
    if first_step:
        log.say(f"continuing from step {first_step} of {total_steps} in {run_dir}")
    spans = Spans(
        range(first_step, total_steps),
        batch_size=config.batch_size,
        micro_batch_size=micro,
        rank=accelerator.process_index,
        world_size=world_size,
    )
    loader = iter(build_loader(samples, spans, num_workers=config.num_workers))
    meter = Meter(accelerator, config.batch_size)
    figures: Figures = progress.get("figures", {})
    keys: list[str] = []

    for step in range(first_step, total_steps):
        done, last = step + 1, step + 1 == total_steps
        _reseed(step_seed(config.seed, "step", step, accelerator.process_index))
        set_lr(prepared, schedule.lr_at(step))
        for i in range(accum_steps):
            batch = meter.next_batch(loader)
            keys = batch.keys
            _record(batch, run_dir, step, accelerator.process_index, config.record_samples)
            with accelerator.no_sync(model) if i + 1 < accum_steps else contextlib.nullcontext():
                loss, metrics = model(batch.to(accelerator.device))
                accelerator.backward(loss / accum_steps)
            meter.add(loss, metrics)
        log_now = last or _due(done, config.log_every_steps)
        save_now = last or _due(done, config.save_every_steps)
        norm = _clip(accelerator, model, config, measure=log_now)
        prepared.step()
        prepared.zero_grad()
        meter.steps += 1
        log.advance()
        if log_now or save_now:
            means = meter.read()
            epoch = done * config.batch_size / len(samples.order)
            figures = {"epoch": epoch, "loss": means["loss"], "lr": schedule.lr_at(step)} | means
            _check(figures, done, config, (done - first_step) * config.batch_size, keys)
        if log_now:
            log.metrics(done, figures | norm, eta_s=meter.seconds_for(total_steps - done))
            meter.start()
        paused_at = time.perf_counter()
        if last or _due(done, hooks.evaluate_every_steps):
            figures |= hooks.evaluate(done, log)
        if save_now:
            progress |= {"step": done, "samples_seen": done * config.batch_size, "figures": figures}
            if accelerator.scaler is not None:
                progress["scaler"] = accelerator.scaler.state_dict()
            if accelerator.is_main_process:
                save_state(run_dir, task, optimizer, progress, keep=config.keep_states)
                hooks.export(progress)
            accelerator.wait_for_everyone()
        meter.pause(paused_at)
    log.close()
    return figures


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _resume(run_dir: Path, task: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples) -> dict[str, Any]:
    """Returns the progress of the newest state, loaded into task and optimizer, or that of a new run."""
    fingerprint = samples.index.fingerprint()
    states = state_folders(run_dir)
    if not states:
        return {"step": 0, "samples_seen": 0, "data_fingerprint": fingerprint}
    progress = load_state(states[-1], task, optimizer)
    if progress["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{run_dir} was trained on other shards (fingerprint {progress['data_fingerprint']}, data.train now has "
            f"{fingerprint}): give the same data.train, or another run_dir"
        )
    return progress


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


def _clip(accelerator: Accelerator, model: nn.Module, config: StageConfig, *, measure: bool) -> Figures:
    """Clips gradients where configured. Returns their norm before it at the steps where it is logged."""
    limit = config.optim.clip_grad
    if limit is None and not measure:
        return {}
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit)
    return {"grad_norm": float(norm)} if measure and norm is not None else {}


def _check(figures: Figures, done: int, config: StageConfig, samples_read: int, keys: list[str]) -> None:
    """Raises InputError when the loss is not finite or too many samples could not be read."""
    if not math.isfinite(figures["loss"]):
        raise InputError(
            f"the loss is {figures['loss']} at step {done} (last samples: {', '.join(keys[:4])}): lower "
            "optim.base_lr, set optim.clip_grad 1, or use --precision bf16 or no; the newest state is still good"
        )
    bad, limit = int(figures["bad_samples"]), config.data.max_bad_share
    if bad > max(BAD_SAMPLES_ALLOWED, limit * samples_read):
        raise InputError(
            f"{bad} samples could not be read (data.max_bad_share is {limit}): see bad_samples.jsonl in the run "
            "folder, write the shards anew, or raise data.max_bad_share"
        )
