"""The records of a run: a line on the terminal, a line in metrics.jsonl, and TensorBoard."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from .files import write_text

COUNTS = ("bad_samples", "skipped_steps")  # shown where they are not zero


class RunLog:
    """Writes the records of one run; silent on every process but the main one.

    On resuming, what an earlier process recorded after `first_step` is dropped, in metrics.jsonl and in TensorBoard,
    since those steps are done again.
    """

    def __init__(self, run_dir: Path, *, first_step: int, total_steps: int, enabled: bool) -> None:
        self.run_dir = run_dir
        self.enabled = enabled
        self.total_steps = total_steps
        self.refused = False  # a record, by the disk
        self.metrics_path = run_dir / "metrics.jsonl"
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds of imports, paid by one process

        drop_later_records(self.metrics_path, first_step, evaluations=False)
        self.writer = SummaryWriter(run_dir, purge_step=first_step + 1)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not terminal, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self.enabled:
            with suppress(OSError):  # the terminal may be a file on a full disk
                self.bar.write(text)
                sys.stdout.flush()

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.enabled:
            self.bar.update()

    def metrics(self, step: int, values: dict[str, float], *, eta_s: float | None = None) -> None:
        """Records the values of `step` steps done: one line each in the terminal and in metrics.jsonl, and curves."""
        if not self.enabled:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.append(self.metrics_path.name, [{"step": step, **numbers}])
        with self.spared():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        shown = {name: value for name, value in values.items() if name not in COUNTS or value}
        words = [f"step {step}/{self.total_steps}", *(f"{name} {_short(name, v)}" for name, v in shown.items())]
        if eta_s is not None:
            words.append(f"eta {timedelta(seconds=round(eta_s))}")
        self.say("  ".join(words))

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Records a picture in TensorBoard."""
        if self.enabled:
            with self.spared():
                self.writer.add_image(name, pixels, step, dataformats="HWC")

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Appends records to a JSONL file of the run."""
        if self.enabled:
            with self.spared():
                append_jsonl(self.run_dir / name, records)

    def close(self) -> None:
        """Ends the progress bar and writes out what TensorBoard still holds."""
        if self.enabled:
            self.bar.close()
            with self.spared():
                self.writer.close()

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Goes on where a record cannot be written, and says so once: only states are worth ending a run for."""
        try:
            yield
        except OSError as error:
            if not self.refused:
                self.refused = True
                self.say(f"{self.run_dir}: records cannot be written ({error.strerror or error}), some will be missing")


def append_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Appends one JSON object a line, in one write, so that processes may share the file."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the objects of a JSONL file, and which lines hold none (from 1): a kill may have cut one short.

    Raises OSError when it cannot be read.
    """
    found, lost = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif line.strip():
            lost.append(number)
    return found, lost


def metrics_of(records: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Returns the numbers of the records that say their step, in its order; None where one is not finite."""
    kept = []
    for record in records:
        if finite(record.get("step")) is not None:
            kept.append({k: finite(x) for k, x in record.items() if x is None or type(x) in (int, float)})
    return sorted(kept, key=lambda record: record["step"] or 0)


def finite(value: Any) -> float | None:
    """Returns the number that `value` is; None for anything else, and for what no float can hold."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond the range of floats
        return None


def drop_later_records(path: Path, step: int, *, evaluations: bool = True) -> None:
    """Keeps the lines of a JSONL file up to `step`; what a killed process wrote after it will be written again.

    Without `evaluations`, those after `step` itself go too: they are what has no learning rate.
    """
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _is_kept(line, step, evaluations)]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _is_kept(line: str, step: int, evaluations: bool) -> bool:
    try:
        record = json.loads(line)
        of_step = int(record["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return False
    return of_step < step or (of_step == step and (evaluations or "lr" in record))


def _short(name: str, value: float | int) -> str:
    if name == "lr":
        return f"{value:.2e}"
    if name.endswith(("_s", "wait_pct")) or name == "images_per_s":
        return f"{value:.0f}"
    return f"{value:.4g}"
