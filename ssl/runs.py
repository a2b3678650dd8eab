"""Opening a run folder: a new one, the same run again, or a refusal that says what differs."""

import dataclasses
import functools
import json
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import yaml

from .config import PretrainConfig, flat
from .errors import InputError
from .files import remove_leftovers, write_json, write_text

# Options that may change between two starts of one run: they do not change what it computes.
NEUTRAL = {
    "run_dir", "resume", "compile", "num_workers", "save_every_steps", "keep_states",
    "log_every_steps", "record_samples", "picture_every_steps", "evaluate_every_steps", "data.train", "data.val",
    "data.max_bad_share", "data.cache_dir", "data.cache_gb", "stall_timeout_s", "max_skipped_steps",
    "grad_checkpointing", "check_duplicates",
    "probe.every_steps", "probe.train", "probe.val", "probe.images", "probe.neighbors", "probe.temperature",
    "data.lanes", "data.block_samples",  # these are compared as null is meant, with the state
}  # fmt: skip


@runtime_checkable
class InFolder(Protocol):
    """The options of a command that leaves its results in a folder."""

    @property
    def run_dir(self) -> str: ...

    @property
    def resume(self) -> Literal["auto", "never"]: ...


def open_run(config: InFolder) -> Path:
    """Returns the run folder, made or found to hold this very run.

    Raises InputError when the folder holds something else, holds a run whose configuration would give other results
    (the message lists the differences), or holds any run and `resume` is "never".
    """
    run_dir = Path(config.run_dir)
    saved = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass  # a read-only disk says so here, and not when the first state is due
    except OSError as error:
        raise InputError(f"run_dir {run_dir} cannot be written ({error.strerror}): choose another one") from error
    if not saved.exists():
        if any((run_dir / "state").glob("step-*")):
            raise InputError(
                f"run_dir {run_dir} holds states, but its config.yaml is gone: write it anew with --print_config, or "
                f"start another run_dir with --init {run_dir}/encoder.safetensors"
            )
        if any(path for path in run_dir.iterdir() if not path.name.startswith(".")):
            raise InputError(f"run_dir {run_dir} is not empty and holds no run: choose another one")
        return run_dir
    if config.resume == "never":
        raise InputError(f"run_dir {run_dir} holds a run and resume is never: choose another run_dir or --resume auto")
    if not (run_dir / "result.json").exists() and not any(run_dir.glob("state/step-*")):
        return run_dir  # refused or stopped before its first state: there is nothing to lose
    if differences := _differences(_read_config(saved), config):
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise InputError(
            f"run_dir {run_dir} holds a run with another configuration ({shown}): "
            "give the same options to continue it, or another run_dir"
        )
    return run_dir


def is_unfinished(run_dir: Path) -> bool:
    """Returns whether result.json says that the run was stopped before its end."""
    try:
        return not json.loads((run_dir / "result.json").read_text())["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_run_files(run_dir: Path, config: InFolder, **facts: Any) -> None:
    """Writes config.yaml, from which the run can be started again, and environment.json."""
    remove_leftovers(run_dir)
    if is_unfinished(run_dir):
        (run_dir / "result.json").unlink()  # of when it was stopped
    write_text(run_dir / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    write_json(run_dir / "environment.json", environment() | facts)


def write_result(run_dir: Path, command: str, *, finished: bool, **figures: Any) -> None:
    """Writes result.json: how a command ended, and its figures."""
    write_json(run_dir / "result.json", {"command": command, "finished": finished, **figures})


def plain(config: Any) -> dict[str, Any]:
    """Returns a config as nested dictionaries and lists, as YAML gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def environment() -> dict[str, Any]:
    """Returns versions, git commit and device, for a reader who asks later how a figure came about."""
    packages = ("quarterlight", "torch", "torchvision", "timm", "accelerate", "numpy", "simplejpeg", "pillow")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "git_commit": git_commit(),
        "device": device,
        "torch_threads": torch.get_num_threads(),
    }


@functools.cache  # the code that runs is that of the start, whatever is checked out later
def git_commit() -> str | None:
    """Returns the commit of the source tree, with "-dirty" when it has changes; None for an installed package."""
    here = Path(__file__).parent
    if "site-packages" in here.parts:
        return None
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + ("-dirty" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}): choose another run_dir") from error
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds no configuration: choose another run_dir")
    return saved


def _differences(saved: dict[str, Any], config: InFolder) -> list[str]:
    """Returns what differs and matters. An option that the saved run did not know yet counts as left at its default."""
    before, now, defaults = flat(saved), flat(plain(config)), flat(_defaults(config))
    changed = []
    neutral = NEUTRAL | (
        {"micro_batch_size"} if isinstance(config, PretrainConfig) else set()
    )  # mixup pairs within one
    for key in sorted((before.keys() | now.keys()) - neutral):
        was, value = before.get(key, defaults.get(key, "not given")), now.get(key, "not given")
        if was != value:
            changed.append(f"{key} was {was}, is {value}")
    return changed


def _defaults(config: Any) -> dict[str, Any]:
    """Returns the values that the options have when they are not given, without those that must be."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            found[option.name] = _defaults(value)
        elif option.default is not dataclasses.MISSING:
            found[option.name] = json.loads(json.dumps(option.default))
        elif option.default_factory is not dataclasses.MISSING:
            found[option.name] = option.default_factory()
    return found
