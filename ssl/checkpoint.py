"""States of a run, from which it continues exactly.

runs/NAME/state/step-00001200/
    model.safetensors        every parameter and buffer of the task
    optimizer.safetensors    PARAMETER:moment for every parameter
    progress.json            step, samples seen, fingerprint of the data, ...

A state is written beside and renamed, so a folder of this name is complete. Nothing random is kept: steps reseed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .errors import InputError
from .files import replace_folder, write_tensors


def state_folders(run_dir: Path) -> list[Path]:
    """Returns the complete states of a run, oldest first."""
    return sorted(path for path in (run_dir / "state").glob("step-*") if (path / "progress.json").is_file())


def save_state(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], *, keep: int
) -> Path:
    """Writes the state of `progress["step"]` and then deletes all but the newest `keep` states. Returns its folder."""
    folder = run_dir / "state" / f"step-{progress['step']:08d}"

    def fill(partial: Path) -> None:
        tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
        write_tensors(partial / "model.safetensors", tensors)
        write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
        (partial / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")

    replace_folder(folder, fill)
    for old in state_folders(run_dir)[: -max(1, keep)]:
        shutil.rmtree(old)
    return folder


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads a state into `model` and `optimizer` and returns its progress.

    Raises InputError when the state is damaged or belongs to another model.
    """
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        progress = json.loads((folder / "progress.json").read_text())
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder}: this state cannot be loaded ({first_line}); delete it to use the one before"
        ) from error
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition(":")
        by_parameter.setdefault(name, {})[moment] = value
    for name, parameter in model.named_parameters():
        if name in by_parameter:
            optimizer.state[parameter] = {
                moment: value if moment == "step" else value.to(parameter.device)
                for moment, value in by_parameter[name].items()
            }
    return progress


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{moment}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
