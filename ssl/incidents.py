"""What goes wrong with samples and steps of a run: noted, listed, and limited.

bad_samples.jsonl has the samples that could not be read and were replaced, bad_steps.jsonl the steps that were skipped,
and samples-rankN.jsonl, when asked for, everything that process N has seen.
"""

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from .batches import Batch
from .config import StageConfig
from .errors import InputError
from .log import RunLog, append_jsonl
from .processes import Verdict

BAD_SAMPLES_ALLOWED = 10  # however few were read: a share of a few samples says nothing
BAD_SAMPLES_FILE, BAD_STEPS_FILE = "bad_samples.jsonl", "bad_steps.jsonl"


def samples_file(run_dir: Path, rank: int) -> Path:
    """Returns where a process lists what it has seen, when asked to."""
    return run_dir / f"samples-rank{rank}.jsonl"


def record_files(run_dir: Path, rank: int, world_size: int) -> list[Path]:
    """Returns the records, besides metrics, that this process keeps in order; the first one also what is left of ranks
    that there are no more."""
    if rank > 0:
        return [samples_file(run_dir, rank)]
    current = {samples_file(run_dir, other) for other in range(1, world_size)}
    return [run_dir / BAD_SAMPLES_FILE, run_dir / BAD_STEPS_FILE, *set(run_dir.glob("samples-rank*.jsonl")) - current]


class Incidents:
    """Keeps them until all processes meet: the main one writes the lists, since others may be on other machines."""

    def __init__(self, run_dir: Path, log: RunLog, accelerator: Accelerator, config: StageConfig) -> None:
        self.run_dir, self.log, self.accelerator, self.config = run_dir, log, accelerator, config
        self._unreadable: list[dict[str, Any]] = []  # to be listed
        self._listed = 0  # of all processes, since the start of this one

    def note(self, batch: Batch, step: int) -> None:
        """Notes unreadable samples and, when asked, lists every sample of a batch, with hashes of pixels and mask."""
        self._unreadable += [{"step": step, **bad._asdict()} for bad in batch.bad]
        if not self.config.record_samples:
            return
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
        append_jsonl(samples_file(self.run_dir, self.accelerator.process_index), records)

    def judge(self, verdict: Verdict, in_a_row: int) -> None:
        """Lists a skipped step; all processes skip the same. Raises InputError after too many `in_a_row`."""
        if not verdict.skipped:
            return
        losses, keys = gather_object([verdict.loss]), gather_object(verdict.keys)
        loss, norm = sum(losses) / len(losses), verdict.grad_norm
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the grad_norm is {norm}"
        self.log.append(
            BAD_STEPS_FILE, [{"step": verdict.step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}]
        )
        self.log.say(f"step {verdict.step + 1}: {what}, so it is skipped ({BAD_STEPS_FILE} has its samples)")
        if in_a_row > self.config.max_skipped_steps:
            raise InputError(
                f"{what} at step {verdict.step + 1}, and {in_a_row} steps in a row were skipped for such "
                f"(max_skipped_steps {self.config.max_skipped_steps}; first samples: {', '.join(keys[:4])}): lower "
                "optim.base_lr, set optim.clip_grad 1, or use --precision no, in a new run_dir if this one holds states"
            )

    def list_unreadable(self, count: int, samples_read: int) -> None:
        """Lists what is new among the `count` unreadable samples of all processes; all of them must call it.

        Raises InputError when they are too many among the samples that were read.
        """
        if count > self._listed:
            self._listed = count
            self.log.append(BAD_SAMPLES_FILE, gather_object(self._unreadable))
            self._unreadable = []
        limit = self.config.data.max_bad_share
        if count > max(BAD_SAMPLES_ALLOWED, limit * samples_read):
            raise InputError(
                f"{count} reads of samples failed in {samples_read} (data.max_bad_share is {limit}): see "
                f"{BAD_SAMPLES_FILE}, leave them out with launch/shards.py repair, or raise data.max_bad_share"
            )
