"""A run folder as it is found: finished, on its way, half written or damaged. What cannot be read is only said."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quarterlight.ssl.config import flat
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.log import finite, metrics_of, read_jsonl

MARKS = ("config.yaml", "metrics.jsonl", "result.json")  # a folder with one of them is a run's
RECORDS_SHOWN = 100  # of unreadable samples and skipped steps
MOST_LOST_LINES_NAMED = 5


@dataclass(frozen=True)
class Listing:
    """The lines of a JSONL file: the first ones, and counts of all."""

    count: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[tuple[str, int]] = field(default_factory=list)  # most frequent first


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    folder: Path
    name: str  # short, and another one for every run of a report
    stage: str  # the command that made it, such as "pretrain"
    config: dict[str, Any]  # by dotted keys
    environment: dict[str, Any]  # likewise
    result: dict[str, Any]  # as it is
    records: list[dict[str, float | None]]  # of metrics.jsonl, by step; None: not finite
    bad_samples: Listing
    bad_steps: Listing
    recorded_at: float | None  # when the newest record was written, in seconds since 1970; None: there is none
    problems: list[str]  # sentences about what could not be read

    @property
    def last(self) -> dict[str, float | None]:
        """The newest value of every figure in metrics.jsonl."""
        newest: dict[str, float | None] = {}
        for record in self.records:
            newest |= record
        return newest

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps; None where nothing says it.

        Exact where result.json or `steps` says it, else from `epochs` and how many of them the newest record counts.
        """
        for value in (self.result.get("steps"), self.config.get("steps")):
            if steps := finite(value):
                return int(steps)
        epochs, steps_an_epoch = finite(self.config.get("epochs")), self.steps_an_epoch
        return round(epochs * steps_an_epoch) if epochs and steps_an_epoch else None

    @property
    def steps_an_epoch(self) -> float | None:
        """Optimizer steps in one pass over the data; None where nothing says it."""
        for record in reversed(self.records):
            step, epoch = record["step"], record.get("epoch")
            if step and epoch:
                return step / epoch
        return None


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Returns the runs in these folders, each once.

    Raises InputError for what is no folder of a run; names the runs below it, if there are any.
    """
    unique: dict[Path, Path] = {}
    for folder in (Path(name).expanduser() for name in folders):
        unique.setdefault(folder.resolve(), folder)
    found = list(unique.values())
    for folder in found:
        _refuse_what_is_no_run(folder)
    return [_read_run(folder, name) for folder, name in zip(found, _short_names(found), strict=True)]


def is_run(folder: Path) -> bool:
    """Returns whether a folder has a file that only runs have."""
    return any((folder / name).is_file() for name in MARKS) or any(folder.glob("state/step-*"))


def read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """Returns a JSON object, or {} when the file is not there or no object; what is wrong is added to `problems`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, indent=1)  # refuses mappings so deep in each other that the page could not show them
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:200]}).")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no JSON object.")
        return {}
    return content


def _refuse_what_is_no_run(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file: give the folder of a run")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not is_run(folder):
        below = sorted(str(path) for path in folder.iterdir() if path.is_dir() and is_run(path))
        named = " ".join(below[:8]) + " ..." * (len(below) > 8)
        way_out = f"give the runs in it ({named})" if below else "give the run_dir of a command"
        raise InputError(f"{folder} holds no run (no {', '.join(MARKS[:-1])} or {MARKS[-1]}): {way_out}")


def _short_names(folders: list[Path]) -> list[str]:
    """Returns as many last parts of each path as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]

    def name(path: tuple[str, ...]) -> str:
        for length in range(1, len(path)):
            if sum(other[-length:] == path[-length:] for other in parts) == 1:
                return "/".join(path[-length:])
        return "/".join(path)

    return [name(path) for path in parts]


def _read_run(folder: Path, name: str) -> Run:
    problems: list[str] = []
    config, result = _read_config(folder / "config.yaml", problems), read_json(folder / "result.json", problems)
    if not (folder / "config.yaml").exists() and not result:
        problems.append("config.yaml is missing.")
    metrics = folder / "metrics.jsonl"
    return Run(
        folder,
        name,
        _stage(config, result),
        config,
        _flat(read_json(folder / "environment.json", problems), "environment.json", problems),
        result,
        metrics_of(_records(metrics, problems)),
        _listing(_records(folder / "bad_samples.jsonl", problems), "reason"),
        _listing(_records(folder / "bad_steps.jsonl", problems), "loss"),
        metrics.stat().st_mtime if metrics.is_file() else None,
        problems,
    )


def _stage(config: dict[str, Any], result: dict[str, Any]) -> str:
    """Returns the command that made a run: what it says at its end, and before it what its options are those of."""
    if isinstance(result.get("command"), str):
        return result["command"]
    of_options = {"mask.ratio": "pretrain", "mixing.mixup": "finetune", "extract_batch_size": "linear_probe"}
    return next((stage for key, stage in of_options.items() if key in config), "run")


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({' '.join(str(error).split())[:200]}).")
        return {}
    return _flat(content, path.name, problems)


def _flat(content: Any, name: str, problems: list[str]) -> dict[str, Any]:
    """Returns a mapping with dotted keys, or {} for what is none; that is added to `problems`."""
    try:
        return flat(content)
    except (AttributeError, TypeError, RecursionError):  # no mapping, a key that is no text, a mapping inside itself
        problems.append(f"{name} holds no options.")
        return {}


def _records(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file; [] where there is none. What cannot be read is added to `problems`."""
    try:
        found, lost = read_jsonl(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror}).")
        return []
    if lost:
        named = ", ".join(map(str, lost[:MOST_LOST_LINES_NAMED])) + ", ..." * (len(lost) > MOST_LOST_LINES_NAMED)
        problems.append(f"{path.name}: {len(lost)} of {len(found) + len(lost)} lines cannot be read (line {named}).")
    return found


def _listing(records: list[dict[str, Any]], reason: str) -> Listing:
    reasons = Counter(str(record.get(reason, "not said")) for record in records)
    return Listing(len(records), records[:RECORDS_SHOWN], reasons.most_common(10))
