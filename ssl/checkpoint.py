"""States of a run, from which it continues exactly.

runs/NAME/state/step-00001200/
    model.safetensors        every parameter and buffer of the task
    optimizer.safetensors    PARAMETER:moment for every parameter
    ema.safetensors          the moving average of the first, where the run keeps one
    progress.json            step, samples seen, fingerprint of the data, ..., and a checksum of every file, itself too

A state is written beside and renamed, so a folder of this name is complete unless the disk has damaged it since. Its
files are the same however many processes shared the run, and whether each held all parameters or a part of them (FSDP).
Nothing random is kept: steps reseed.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import InputError
from .files import replace_folder, sha256_of, write_tensors
from .sharding import gathered

MODEL_FILE, OPTIMIZER_FILE, EMA_FILE = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
PROGRESS_FILE = "progress.json"
SEALS = ("sha256", "checksum")  # in progress.json: of the other files, and of its own text
SET_ASIDE = "damaged-"  # in front of the name of a state that cannot be continued from


class Damaged(InputError):
    """A state is not what was saved."""


class Tensors(NamedTuple):
    """What a state holds, wherever the parameters are; of sharded ones in host memory."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


def state_folders(run_dir: Path) -> list[Path]:
    """Returns the states of a run, oldest first."""
    return sorted(path for path in (run_dir / "state").glob("step-*") if path.is_dir())


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None, *, keep: bool = True
) -> Tensors:
    """Returns whole tensors under the model's own names.

    Where processes hold parts, all of them must call it; they gather one tensor after another, and only those that
    `keep` have them all in the end, in host memory.
    """
    moments = (
        (f"{name}:{moment}", value)
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    )
    average = None if ema is None else gathered(ema.state_dict().items(), keep=keep)
    return Tensors(gathered(model.state_dict().items(), keep=keep), gathered(moments, keep=keep), average)


def save_state(run_dir: Path, tensors: Tensors, progress: dict[str, Any], *, keep: int) -> Path:
    """Writes the state of `progress["step"]` and then deletes all but the newest `keep` states. Returns its folder."""
    folder = run_dir / "state" / f"step-{progress['step']:08d}"

    def fill(partial: Path) -> None:
        write_tensors(partial / MODEL_FILE, tensors.model)
        write_tensors(partial / OPTIMIZER_FILE, tensors.optimizer)
        if tensors.ema is not None:
            write_tensors(partial / EMA_FILE, tensors.ema)
        (partial / PROGRESS_FILE).write_text(_sealed(progress | {"sha256": _checksums(partial)}))

    replace_folder(folder, fill)
    for old in state_folders(run_dir)[: -max(1, keep)]:
        _delete(old)
    return folder


def newest_state(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest state that is whole, and a sentence for each newer one, which is set aside.

    Deletes what killed processes have left half written. Raises InputError when there are states and none is whole.
    """
    for leftover in [*(run_dir / "state").glob(".step-*.partial"), *(run_dir / "state").glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
    passed_over: list[str] = []
    folders = state_folders(run_dir)
    damaged = []
    for folder in reversed(folders):
        try:
            check_state(folder)
        except Damaged as error:
            passed_over.append(str(error))
            damaged.append(folder)
            continue
        for other in damaged:  # or a later rotation would count it among the states to keep
            aside = other.with_name(SET_ASIDE + other.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(other, aside)
        return folder, [f"{reason}; it is passed over" for reason in passed_over]
    if folders:
        raise InputError(
            f"no state of {run_dir} is whole ({'; '.join(passed_over)}): give another run_dir, with --init "
            f"{run_dir}/encoder.safetensors to keep what it has learned, or delete {run_dir / 'state'} to start again"
        )
    return None, []


def check_state(folder: Path) -> None:
    """Raises Damaged unless every byte of a state is as it was saved."""
    try:
        wanted = _unsealed((folder / PROGRESS_FILE).read_bytes())["sha256"]
        found = _checksums(folder)
    except OSError as error:
        raise Damaged(f"{folder}: {Path(error.filename or folder).name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(f"{folder}: {PROGRESS_FILE} is damaged ({error})") from error
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{folder}: {name} is missing")
        if found[name] != wanted.get(name):
            raise Damaged(f"{folder}: {name} is damaged (its checksum is not that of progress.json)")


def load_progress(folder: Path) -> dict[str, Any]:
    """Returns the progress that a state was saved with."""
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    return {key: value for key, value in progress.items() if key not in SEALS}


def load_model(folder: Path, model: nn.Module, name: str = MODEL_FILE) -> None:
    """Loads the parameters and buffers of a state. Raises InputError when they are of another model."""
    try:
        model.load_state_dict(load_file(folder / name))
    except (SafetensorError, RuntimeError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: this state cannot be loaded ({first_line}): give another run_dir") from error


def load_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's moments, each to where its parameter is, and in parts where that is in parts."""
    try:
        moments = load_file(folder / OPTIMIZER_FILE)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: this state cannot be loaded ({error}): give another run_dir") from error
    parameters = dict(model.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition(":")
        parameter = parameters[name]
        if isinstance(parameter, DTensor) and value.ndim:
            placed: Tensor = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        else:
            placed = value.to(parameter.device)
        optimizer.state[parameter][moment] = placed


def _delete(folder: Path) -> None:
    """Deletes a state; a kill in the middle leaves nothing of the name of one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    names = (MODEL_FILE, OPTIMIZER_FILE, EMA_FILE)
    return {name: sha256_of(folder / name) for name in names if (folder / name).exists()}


def _sealed(progress: dict[str, Any]) -> str:
    """Returns JSON whose last value is the checksum of the text without it."""
    text = json.dumps(progress, indent=2)
    return json.dumps(progress | {"checksum": hashlib.sha256(text.encode()).hexdigest()}, indent=2) + "\n"


def _unsealed(text: bytes) -> dict[str, Any]:
    """Returns what was sealed. Raises ValueError when one byte is another."""
    progress = json.loads(text)
    if not isinstance(progress, dict) or not set(SEALS) <= progress.keys():
        raise ValueError("it has no checksums")
    del progress["checksum"]
    if _sealed(progress).encode() != text:
        raise ValueError("its checksum is another")
    return progress
