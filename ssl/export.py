"""Weights that leave a run: timm's keys in safetensors, with what is needed to build the model again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from .files import as_os_error, replace_file, replace_folder, write_tensors
from .model_card import Story, model_card
from .patches import pair
from .runs import environment

ENCODER_FILE, CLASSIFIER_FILE = "encoder.safetensors", "classifier.safetensors"
ENCODER_EMA_FILE, CLASSIFIER_EMA_FILE = "encoder_ema.safetensors", "classifier_ema.safetensors"


@dataclass(frozen=True)
class ModelSpec:
    """What `timm.create_model` needs to build a model again, and how its images were normalized."""

    name: str  # timm's
    args: dict[str, Any]  # of timm.create_model, img_size and in_chans among them
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def timm_args(self) -> dict[str, Any]:
        """Returns `args` with a tuple for the image size, which JSON had made a list."""
        size = self.args.get("img_size")
        return self.args if size is None else {**self.args, "img_size": pair(size)}


def export_weights(path: Path, model: nn.Module, spec: ModelSpec, facts: dict[str, Any]) -> None:
    """Writes the state dict of a timm model with its `spec` and `facts` as metadata, replacing `path` whole."""
    metadata = {
        "format": "pt",
        "architecture": spec.name,
        "timm_args": json.dumps(spec.args),
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()},
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    replace_file(path, lambda partial: write_tensors(partial, tensors, metadata))


def export_hub(
    path: Path,
    model: Any,  # a timm model
    spec: ModelSpec,
    *,
    title: str,
    facts: dict[str, Any],
    labels: list[str] | None = None,
    story: Story | None = None,
    crop_pct: float | None = None,
    where: str = "local-dir:.",
) -> None:
    """Writes a folder that `timm.create_model("local-dir:PATH", pretrained=True)` and the Hugging Face Hub read.

    `where` is what its card tells to load. The card names no license, and the config "other", where timm would repeat
    that of the weights it knows.
    """
    pretrained_cfg = {
        "tag": "quarterlight",  # timm would otherwise copy tag and license of the weights it knows under this name
        "license": "other",
        "custom_load": False,
        "input_size": [spec.args.get("in_chans", 3), *pair(model.patch_embed.img_size)],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": "bicubic",
        "num_classes": model.num_classes,
    }
    if crop_pct is not None:
        pretrained_cfg["crop_pct"] = crop_pct

    config: dict[str, Any] = {"pretrained_cfg": pretrained_cfg}
    if labels is not None and len(labels) == model.num_classes:
        config["label_names"] = labels

    def fill(partial: Path) -> None:
        args = {key: value for key, value in spec.args.items() if key != "num_classes"}
        try:
            save_for_hf(model, str(partial), model_config=config, model_args=args, safe_serialization=True)
        except SafetensorError as error:
            raise as_os_error(error, path) from error
        # timm notes num_classes twice, and transformers, which reads this folder as well, takes it once only
        config_file = partial / "config.json"
        written = json.loads(config_file.read_text(encoding="utf-8"))
        written.get("model_args", {}).pop("num_classes", None)
        config_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        card = model_card(
            title,
            described(spec),
            usage=f'import timm\nmodel = timm.create_model("{where}", pretrained=True)',
            library="timm",
            tags=["image-classification" if model.num_classes else "image-feature-extraction", "timm"],
            facts=facts,
            story=story or Story(),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")

    replace_folder(path, fill)


def described(spec: ModelSpec) -> str:
    """Returns a sentence on the architecture and the normalization of its images."""
    return (
        f"`{spec.name}` with {json.dumps(spec.args)}; images normalized with mean {list(spec.mean)} and std "
        f"{list(spec.std)}."
    )


def run_facts(run: str, progress: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns what a released file says of its making."""
    here = environment()
    return {
        "made_by": f"quarterlight {here['packages']['quarterlight']}",
        "stage": run,
        "step": progress["step"],
        "samples_seen": progress["samples_seen"],
        "seed": seed,
        "git_commit": here["git_commit"] or "unknown",
        "timm": here["packages"]["timm"],
    }
