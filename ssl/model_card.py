"""The page that goes with released weights: what they are, how they were made, and what they reached."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .addresses import shown

PASSING = {"images_per_s", "data_wait_pct", "memory_gb", "lr", "bad_samples", "grad_norm", "grad_norm_max"}
# ... of the last interval
PLACES = ("run_dir", "data.cache_dir")  # options that say where things lay on the machine


@dataclass(frozen=True)
class Story:
    """What a run folder tells of its weights."""

    data: list[str] = field(default_factory=list)  # the shards' names
    config: dict[str, Any] = field(default_factory=dict)  # without names of folders
    figures: dict[str, Any] = field(default_factory=dict)  # of result.json


def read_story(run_dir: Path) -> Story:
    """Returns what config.yaml and result.json of a run folder say; nothing where they are missing or unreadable.

    Local paths are cut to the names of files, and addresses lose what is secret in them.
    """
    config, result = _mapping(run_dir / "config.yaml"), _mapping(run_dir / "result.json")
    data = config.get("data") if isinstance(config.get("data"), dict) else {}
    assert isinstance(data, dict)
    named: list[str] = []
    for key in ("train", "val"):
        given = data.get(key) or []
        patterns = given if isinstance(given, list) else str(given).split("::")
        names = [shown(str(x)) if "://" in str(x) else Path(str(x)).name for x in patterns]
        named += [f"{key}: {name}" for name in names]
        if given:
            data[key] = names[0] if len(names) == 1 else names
    if "/" in (init := str(config.get("init"))) and ":" not in init:
        config["init"] = Path(init).name
    for key in PLACES:
        group = data if key.startswith("data.") else config
        group.pop(key.removeprefix("data."), None)
    images = _mapping(run_dir / "environment.json").get("train_samples")
    named += [f"{images} training images"] if images else []
    figures = {key: value for key, value in result.items() if key not in PASSING | {"command", "finished"}}
    return Story(named, config, figures)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def model_card(
    title: str, made_of: str, *, usage: str, library: str, tags: list[str], facts: dict[str, Any], story: Story
) -> str:
    """Returns the README.md of released weights, with the Hub's header. It names no license: that is the owner's word.

    `made_of` is a sentence on architecture and preprocessing, `usage` a snippet of Python.
    """
    facts = {key: value for key, value in facts.items() if key not in PASSING | story.figures.keys()}
    ours = ["masked-autoencoder"] if "stage" in facts else []
    parts = [
        f"---\nlibrary_name: {library}\ntags: [{', '.join([*tags, *ours])}]\n---",
        f"# {title}\n\n{made_of}",
        f"```python\n{usage.strip()}\n```",
        _table("fact", facts),
    ]
    if story.figures:
        parts.append("## Figures\n\n" + _table("figure", story.figures))
    if story.data:
        parts.append("## Data\n\n" + "\n".join(f"- {name}" for name in story.data))
    if story.config:
        dumped = yaml.safe_dump(story.config, sort_keys=False)
        text = dumped.strip()
        parts.append(
            f"## Recipe\n\n<details><summary>options of the run</summary>\n\n```yaml\n{text}\n```\n\n</details>"
        )
    parts.append(
        "## License\n\nNot stated yet. Weights may be bound by the terms of the images, and of the weights they started"
        " from; say under which license they are with a line `license: ...` in the header above."
    )
    return "\n\n".join(parts) + "\n"


def _table(what: str, values: dict[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in values.items())
    return f"| {what} | value |\n|---|---|\n{rows}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", r"\|").replace("\n", " ")
