"""When a state is saved and released weights are written, and what happens where the disk refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .checkpoint import (
    EMA_FILE,
    load_model,
    load_moments,
    load_progress,
    newest_state,
    save_state,
    state_folders,
    state_tensors,
)
from .errors import InputError
from .processes import any_process, from_main
from .sharding import Whole


class Saver:
    """Saves the states of a run; where one cannot be saved, the run goes on to the next.

    All processes call its methods: only the main one writes, but each may hold a part of the parameters.
    """

    def __init__(
        self,
        run_dir: Path,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        keep: int,
        whole: Whole[Any],
        export: Callable[[dict[str, Any]], None],
    ) -> None:
        self.run_dir, self.task, self.optimizer = run_dir, task, optimizer
        self.accelerator, self.keep, self.whole, self.export = accelerator, keep, whole, export
        self.folder: Path | None = None  # of the newest state
        self.saved_step: int | None = None  # that of the newest state
        self._refused = False  # the last one

    def resume(self) -> dict[str, Any] | None:
        """Returns the progress of the newest state that is whole, its parameters loaded; None: there is no state.

        Raises InputError when there are only damaged ones, or when the processes do not see the same run folder.
        """
        folder, said, mistake = None, [], None
        if self.accelerator.is_main_process:
            try:
                folder, said = newest_state(self.run_dir)
            except InputError as error:  # the others wait for an answer: it is everyone's mistake
                mistake = str(error)
        folder, mistake = from_main((folder, mistake))
        if mistake is not None:
            raise InputError(mistake)
        for line in said:
            print(line, flush=True)
        seen = state_folders(self.run_dir)
        if any_process(bool(seen) != (folder is not None) or (seen != [] and folder not in seen), self.accelerator):
            raise InputError(
                f"run_dir {self.run_dir}: the main process continues from {folder or 'the start'}, and others do not "
                "find the same states: all machines must see the same run_dir"
            )
        if folder is None:
            if self.accelerator.is_main_process and (self.run_dir / "metrics.jsonl").exists():
                print(f"{self.run_dir} has no states: it begins anew, and what it has released is replaced", flush=True)
            return None
        self.folder = folder
        load_model(folder, self.task)
        if self.whole.average is not None:
            load_model(folder, self.whole.average, EMA_FILE)
        progress = load_progress(folder)
        self.saved_step = progress["step"]
        return progress

    def resume_moments(self) -> None:
        """Loads the optimizer's part of the state that was resumed, behind `accelerator.prepare`."""
        if self.folder is not None:
            load_moments(self.folder, self.task, self.optimizer)

    def release(self, progress: dict[str, Any]) -> None:
        """Writes the released weights, at the end."""
        with self.whole.following(self.task):
            if self.accelerator.is_main_process:
                self.export(progress)

    def save(self, progress: dict[str, Any], *, last: bool, leaving: bool = False) -> str | None:
        """Saves a state and, except behind the last step, releases weights. Returns what went wrong, if anything.

        Raises InputError when it could not for the second time in a row, or where no next time follows: for the last
        state of a run, or of one that is left.
        """
        writes = self.accelerator.is_main_process
        tensors, refusal = state_tensors(self.task, self.optimizer, self.whole.average, keep=writes), None
        self.whole.take(tensors.model)
        if self.accelerator.is_main_process:
            try:
                self.folder = save_state(self.run_dir, tensors, progress, keep=self.keep)
                if not last:
                    self.export(progress)
            except OSError as error:
                refusal = f"{self.run_dir} cannot be written ({error.strerror or error})"
        refusal = from_main(refusal)
        again, self._refused = self._refused, refusal is not None
        if refusal is None:
            self.saved_step = progress["step"]
            return None
        kept = f"the state of {self.folder.name} is whole" if self.folder else "no state was saved before"
        what = f"step {progress['step']}: {refusal}; {kept}"
        if last or leaving or again:
            raise InputError(f"{what}. Make room or mend the disk; the same command then continues from there")
        return f"{what}. The run goes on, and ends if it cannot save the next time either"
