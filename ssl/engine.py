"""The loop of every stage. It knows a task only as a module whose `forward(batch)` is the training loss.

Exact continuation rests on three things: the loader is a function of the position, every step reseeds from (seed, step,
rank), and the learning rate is a function of the step. A state is then weights, optimizer moments and one number.
"""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .attention import choose_attention
from .batches import Batch, Samples
from .config import StageConfig
from .errors import InputError, ProcessError, Stopped
from .incidents import Incidents, record_files
from .loader import build_loader
from .log import RunLog, drop_later_records
from .meter import Meter
from .optim import Schedule, set_lr
from .order import settings_of
from .processes import Verdict, Verdicts, micro_batch_size
from .randoms import step_seed
from .runs import write_result
from .saving import Saver
from .signals import StopSignals
from .spans import Spans
from .task import Figures, Hooks, Task
from .watch import AGAIN, Watch


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

    Raises Stopped, its state saved, when any process gets a signal. Raises InputError when the state belongs to other
    data, when the processes do not find the same state, when too many samples are unreadable or too many steps in a row
    have no finite loss and gradients, and when two states in a row cannot be saved.
    """
    micro = micro_batch_size(config.batch_size, config.micro_batch_size, accelerator.num_processes)
    if micro % samples.repeats:
        raise InputError(
            f"data.repeats {samples.repeats} does not divide the {micro} images that a process takes at once: use a "
            "divisor, or another micro_batch_size"
        )
    loop = _Loop(task, optimizer, samples, schedule, config, accelerator, hooks, run_dir, micro)
    with StopSignals() as loop.signals, loop.watch:
        try:
            return loop.run()
        except Stopped:
            loop.leave()
            raise
        except RuntimeError as error:
            if accelerator.num_processes == 1 or not _is_lost_connection(error):
                raise
            gone = loop.watch.who_is_gone() or str(error).splitlines()[0]
            raise ProcessError(f"lost another process: {gone}; {AGAIN}") from error


class _Loop:
    """A run on its way: what its steps share."""

    signals: StopSignals

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        samples: Samples,
        schedule: Schedule,
        config: StageConfig,
        accelerator: Accelerator,
        hooks: Hooks,
        run_dir: Path,
        micro: int,
    ) -> None:
        self.task, self.samples, self.schedule, self.config = task, samples, schedule, config
        self.accelerator, self.hooks, self.run_dir = accelerator, hooks, run_dir
        self.rank, self.total_steps = accelerator.process_index, schedule.total_steps
        self.accum_steps = config.batch_size // accelerator.num_processes // micro
        self.saver = Saver(
            run_dir, task, optimizer, accelerator, keep=config.keep_states, whole=hooks.whole, export=hooks.export
        )
        self.progress = self._resumed()
        self.first_step = self.done = self.progress["step"]
        choose_attention(task, accelerator.device, config.precision)
        if config.compile:
            task.network.compile()
        self.model, self.optimizer = accelerator.prepare(task, optimizer)
        self.saver.resume_moments()
        if hooks.whole.ema is not None:
            hooks.whole.ema.to(accelerator.device)
        if accelerator.scaler is not None and "scaler" in self.progress:
            accelerator.scaler.load_state_dict(self.progress["scaler"])
        self.log = RunLog(
            run_dir, first_step=self.first_step, total_steps=self.total_steps, enabled=accelerator.is_main_process
        )
        spans = Spans(
            range(self.first_step, self.total_steps),
            batch_size=config.batch_size,
            micro_batch_size=micro,
            rank=self.rank,
            world_size=accelerator.num_processes,
        )
        self.loader = build_loader(samples, spans, num_workers=config.num_workers, fetching=hooks.fetching)
        self.batches = iter(self.loader)
        self.meter = Meter(accelerator, config.batch_size)
        self.verdicts = Verdicts(accelerator)
        self.incidents = Incidents(run_dir, self.log, accelerator, config)
        self.watch = Watch(self.rank, accelerator.num_processes, config.stall_timeout_s, self.loader.reading)

    def run(self) -> Figures:
        """Does what is left of the run."""
        if self.first_step:
            self.log.say(f"continuing from step {self.first_step} of {self.total_steps} in {self.run_dir}")
            if self.first_step < self.total_steps and is_due(self.first_step, self.hooks.evaluate_every_steps):
                self._evaluate()  # a kill in the middle of an evaluation has left none
        for step in range(self.first_step, self.total_steps):
            self._step(step)
            self.done = step + 1
            self._end_step()
        self.progress["figures"] |= self._evaluate()  # also when a killed run had only this left to do
        with self.watch.during("saving"):
            self.saver.release(self.progress)
        self.log.close()
        return self.progress["figures"]

    def leave(self) -> None:
        """Saves the state of a run that was asked to stop, and says so in result.json."""
        self._judge(self.verdicts.known(wait=True))
        if self.saver.saved_step != self.done:
            if self.meter.steps:  # else they were read, and logged, behind this step
                self._read_figures()
            self._save(leaving=True)
        if self.accelerator.is_main_process:
            facts = {"preempted": True, "signal": self.signals.received, "step": self.done, "steps": self.total_steps}
            write_result(self.run_dir, self.hooks.command, finished=False, **facts)
            self.log.say(f"stopped behind step {self.done} of {self.total_steps}, its state saved: {AGAIN}")
        self.log.close()

    def _resumed(self) -> dict[str, Any]:
        """Returns the progress of the newest state, its parameters loaded, or that of a new run."""
        fingerprint, order = self.samples.index.fingerprint(), settings_of(self.samples.order)
        new = {"step": 0, "samples_seen": 0, "data_fingerprint": fingerprint, "skipped_steps": 0, "skipped_in_a_row": 0}
        new["figures"] = {}
        progress = new | (self.saver.resume() or {})
        if progress["data_fingerprint"] != fingerprint:
            raise InputError(
                f"{self.run_dir} was trained on other shards (fingerprint {progress['data_fingerprint']}, data.train "
                f"now has {fingerprint}): give the same data.train, or another run_dir"
            )
        if progress.setdefault("order", order) != order:
            changed = "; ".join(f"{key} {progress['order'].get(key)}, now {order[key]}" for key in order)
            raise InputError(
                f"{self.run_dir}: the run began with another order of samples ({changed}): give data.lanes, "
                "data.block_samples, data.repeats and the sources as they were (remote shards have other defaults than "
                "local ones)"
            )
        for path in record_files(self.run_dir, self.rank, self.accelerator.num_processes):
            drop_later_records(path, progress["step"] - 1)  # their steps count from 0, and come again
        return progress

    def _step(self, step: int) -> None:
        """Does one optimizer step, or skips it on the device where loss or gradients are not finite."""
        _reseed(step_seed(self.config.seed, "step", step, self.rank))
        set_lr(self.optimizer, self.schedule.lr_at(step))
        keys: list[str] = []
        for i in range(self.accum_steps):
            self.watch.move(step, "waiting for data")
            batch = self.meter.next_batch(self.batches)
            self.watch.move(step, "computing")
            keys += batch.keys
            self.incidents.note(batch, step)
            if step == self.first_step and i == 0:
                self._rehearse(batch)
            last = i + 1 == self.accum_steps
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, metrics = self.model(batch.to(self.accelerator.device))
                self.accelerator.backward(loss / self.accum_steps)
            self.meter.add(loss, metrics)
        norm = self._clip()
        stop = self.signals.received is not None
        skipped = self.verdicts.reach(step, self.meter.step_loss(), norm, stop=stop, keys=keys)
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = skipped  # the fused kernel then leaves everything as it is
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.hooks.whole.ema is not None:
            self.hooks.whole.ema.update(self.task, step + 1)
        self.meter.end_step(norm, skipped)

    def _rehearse(self, batch: Batch) -> None:
        """Does a pass in front of the first step of this process, of which nothing is kept.

        DDP arranges its buckets anew by the order in which gradients first arrive, and in which order the numbers of
        three or more processes are added depends on that: a continued run would end with other last bits.
        """
        if self.accelerator.num_processes < 3 or not isinstance(self.model, DistributedDataParallel):
            return
        before = [buffer.clone() for buffer in self.task.buffers()]
        self.accelerator.backward(self.model(batch.to(self.accelerator.device))[0])
        self.optimizer.zero_grad()
        for buffer, value in zip(self.task.buffers(), before, strict=True):  # running means of batch norms
            buffer.copy_(value)
        _reseed(step_seed(self.config.seed, "step", self.first_step, self.rank))

    def _end_step(self) -> None:
        """Logs, saves and evaluates where it is time to. Raises Stopped."""
        done, last, config = self.done, self.done == self.total_steps, self.config
        log_now = last or is_due(done, config.log_every_steps)
        save_now = last or is_due(done, config.save_every_steps)
        self.log.advance()
        verdicts = self.verdicts.known(wait=log_now or save_now)
        self._judge(verdicts)
        if log_now or save_now:
            self._read_figures()
        if log_now:
            eta_s = self.meter.seconds_for(self.total_steps - done)
            self.log.metrics(done, self.progress["figures"], eta_s=eta_s)
            self.meter.start()
        paused_at = time.perf_counter()
        if save_now:
            self._save()
        if any(verdict.stop for verdict in verdicts):
            raise Stopped(f"stopped by a signal behind step {done} of {self.total_steps}")
        if not last and is_due(done, self.hooks.evaluate_every_steps):
            self._evaluate()
        self.meter.pause(paused_at)

    def _judge(self, verdicts: list[Verdict]) -> None:
        for verdict in verdicts:
            self.progress["skipped_steps"] += verdict.skipped
            self.progress["skipped_in_a_row"] = (self.progress["skipped_in_a_row"] + 1) * verdict.skipped
            self.incidents.judge(verdict, self.progress["skipped_in_a_row"])

    def _evaluate(self) -> Figures:
        with self.watch.during("evaluating"), self.hooks.whole.following(self.task):
            return self.hooks.evaluate(self.done, self.log, self.signals)

    def _save(self, *, leaving: bool = False) -> None:
        self.progress |= {"step": self.done, "samples_seen": self.done * self.config.batch_size}
        if self.accelerator.scaler is not None:
            self.progress["scaler"] = self.accelerator.scaler.state_dict()
        with self.watch.during("saving"):
            if refusal := self.saver.save(self.progress, last=self.done == self.total_steps, leaving=leaving):
                self.log.say(refusal)

    def _clip(self) -> Tensor:
        """Clips gradients where configured. Returns their norm before it, the same on all processes."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.config.optim.clip_grad is not None:
            norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        else:
            self.accelerator.unscale_gradients(self.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _read_figures(self) -> None:
        """Reads the means of the interval into `progress`. Raises InputError when too many samples were unreadable."""
        means = self.meter.read()
        epoch = self.done * self.config.batch_size / len(self.samples.order)
        figures = {"epoch": epoch, "loss": means["loss"], "lr": self.schedule.lr_at(self.done - 1)} | means
        self.progress["figures"] = figures | {"skipped_steps": self.progress["skipped_steps"]}
        samples_read = (self.done - self.first_step) * self.config.batch_size
        self.incidents.list_unreadable(int(means["bad_samples"]), samples_read)


def is_due(done: int, every: int) -> bool:
    """Returns whether what comes every so many steps comes behind this one; 0: never."""
    return every > 0 and done % every == 0


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def _reseed(seed: int) -> None:
    """Seeds every generator that a layer, mixup or random erasing may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
