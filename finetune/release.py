"""What is to be released: a model with its weights, and all that is known of their making."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from quarterlight.ssl.checkpoint import MODEL_FILE, Damaged, check_state, load_model, load_progress, state_folders
from quarterlight.ssl.config import DataConfig, DecoderConfig, EncoderConfig
from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.export_config import ExportConfig
from quarterlight.ssl.mae import MaskedAutoencoder, attach_decoder
from quarterlight.ssl.model_card import Story, read_story
from quarterlight.ssl.released import Weights, encoder_spec, encoder_with_weights, read_weights

from .heads import load_classifier

OF_THE_MODEL = {"format", "architecture", "timm_args", "mean", "std", "class_names"}  # metadata that are no facts


@dataclass(frozen=True)
class Release:
    """A model in evaluation mode, and what goes with it."""

    model: Any  # a timm encoder or classifier, or a MaskedAutoencoder
    spec: ModelSpec
    labels: list[str] | None
    facts: dict[str, Any]
    story: Story
    crop_pct: float
    mask_ratio: float  # of the pretraining; 0.75 where that is not known
    report: str  # a sentence on what was loaded

    @property
    def kind(self) -> str:
        """encoder, classifier or autoencoder."""
        if isinstance(self.model, MaskedAutoencoder):
            return "autoencoder"
        return "classifier" if self.model.num_classes else "encoder"

    @property
    def title(self) -> str:
        """What it is, in a line."""
        what = {"encoder": "", "classifier": ", with a classification head", "autoencoder": ", decoder included"}
        pretrained = ", pretrained as a masked autoencoder" if self.facts.get("stage") == "pretraining" else ""
        return f"{self.spec.name}{pretrained}{what[self.kind]}"

    def with_half(self, model: Any, half: str, moved: float) -> "Release":
        """Returns the same with a model whose weights have two bytes, and what that does to its outputs as a fact."""
        told = {"weights": half, "half_error": moved}
        return replace(self, model=model, facts=self.facts | told)

    @property
    def timm(self) -> Any:
        """The timm model."""
        return self.model.encoder.timm if isinstance(self.model, MaskedAutoencoder) else self.model


def open_release(source: str, config: ExportConfig) -> Release:
    """Returns what `source`, a run folder or anything that --init takes, holds of `config.part`.

    Raises InputError when that cannot be read or is not there.
    """
    weights = read_weights(source)
    run_dir = _run_of(source)
    story = read_story(run_dir) if run_dir else Story()
    spec = _spec(config.encoder, weights)
    part = config.part or ("classifier" if _has_head(weights) else "encoder")
    facts = _facts(Path(weights.source))
    if part == "classifier":
        model, spec, report = load_classifier(spec, weights)
    elif part == "encoder":
        encoder, report = encoder_with_weights(spec, weights)
        model = encoder.timm
    else:
        if run_dir is None or Path(source).is_file():
            raise InputError(
                f"--part autoencoder: {source} is no run folder; the decoder is in the states of a pretraining run only"
            )
        if config.encoder != EncoderConfig():
            raise InputError("--part autoencoder takes encoder and decoder as the run has them: leave --encoder.* away")
        model, step, report = _load_autoencoder(run_dir, spec)
        facts |= step
    crop_pct = config.crop_pct or _number(story.config, "data", "crop_pct") or 0.875
    mask_ratio = _number(story.config, "mask", "ratio") or 0.75
    return Release(model.eval(), spec, weights.class_names, facts, story, crop_pct, mask_ratio, report)


def _run_of(source: str) -> Path | None:
    """Returns the run folder that `source` is, or is a file of."""
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    return folder if (folder / "config.yaml").is_file() else None


def _spec(encoder: EncoderConfig, weights: Weights) -> ModelSpec:
    known = weights.spec.args if weights.spec is not None else {}
    in_chans: Any = encoder.args.get("in_chans", known.get("in_chans", 3))
    return encoder_spec(encoder, DataConfig(train="", in_chans=in_chans), weights)


def _has_head(weights: Weights) -> bool:
    return any(name in weights.head for name in ("head.weight", "head.fc.weight"))


def _load_autoencoder(run_dir: Path, spec: ModelSpec) -> tuple[MaskedAutoencoder, dict[str, Any], str]:
    """Returns the masked autoencoder of a pretraining run's newest whole state, its step, and a sentence."""
    try:
        saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        decoder = DecoderConfig(**saved["decoder"])
        kept = ("target", "pca_components", "loss", "encode_masked")
        options = {key: saved[key] for key in kept if key in saved}
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"--part autoencoder: {run_dir} is no pretraining run: its config.yaml has no decoder; use --part encoder"
        ) from error
    encoder = build_encoder(spec.name, **spec.timm_args())
    model = attach_decoder(encoder, in_chans=spec.args.get("in_chans", 3), decoder=decoder, **options)
    folder = _whole_state(run_dir)
    load_model(folder, nn.ModuleDict({"autoencoder": model}))
    progress = load_progress(folder)
    told = {key: progress[key] for key in ("step", "samples_seen") if key in progress}
    return model, told, f"{folder / MODEL_FILE}: encoder and decoder loaded"


def _whole_state(run_dir: Path) -> Path:
    """Returns the newest state that is whole; unlike a run that continues it sets nothing aside."""
    reasons = []
    for folder in reversed(state_folders(run_dir)):
        try:
            check_state(folder)
        except Damaged as error:
            reasons.append(str(error))
            continue
        return folder
    raise InputError(
        f"--part autoencoder: {run_dir} has no whole state, where the decoder would be"
        f"{f' ({reasons[0]})' if reasons else ''}; use --part encoder"
    )


def _facts(path: Path) -> dict[str, Any]:
    """Returns what a file of ours says of its making; of a run folder, its file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError:  # it has been read a moment ago
        return {}
    return {key: _value(text) for key, text in sorted(metadata.items()) if key not in OF_THE_MODEL}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number(config: dict[str, Any], group: str, name: str) -> float | None:
    options = config.get(group)
    value = options.get(name) if isinstance(options, dict) else None
    return float(value) if isinstance(value, int | float) and 0 < value <= 1 else None
