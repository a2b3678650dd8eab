"""What is looked at: an encoder, its decoder where it was kept, and how their run masked and cropped images."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import DataConfig, DecoderConfig, EncoderConfig, MaskConfig, PretrainConfig
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.mae import MaskedAutoencoder, attach_decoder
from quarterlight.ssl.released import encoder_with_weights, load_decoder
from quarterlight.ssl.spec import encoder_spec
from quarterlight.ssl.targets import PCATarget
from quarterlight.ssl.weights import Weights, read_weights


@dataclass(frozen=True)
class Subject:
    """What the pictures are of."""

    encoder: Encoder
    autoencoder: MaskedAutoencoder | None
    no_decoder: str  # why there is no autoencoder; "" where there is one
    spec: ModelSpec
    mask: MaskConfig
    crop_pct: float
    report: str  # what was loaded
    of_run: Path | None  # the run folder it comes from


def load_subject(init: str | None, given: EncoderConfig, *, untrained: bool, seed: int) -> Subject:
    """Returns the encoder that `init` names, with its decoder where there is one: of a run's state, or in a full file.

    `untrained` takes the architecture only; an encoder that is none of a run then gets MAE's decoder. Raises
    InputError for weights that cannot be read or are of another model.
    """
    weights, no_decoder = _read(init)
    args = (weights.spec.args if weights is not None and weights.spec is not None else {}) | given.args
    data = DataConfig(train="", in_chans=args.get("in_chans", 3))
    spec = encoder_spec(given, data, weights)
    torch.manual_seed(seed)
    encoder, report = encoder_with_weights(spec, None if untrained else weights)
    run_dir = Path(init).expanduser() if init is not None and Path(init).expanduser().is_dir() else None
    run = pretraining_of(run_dir) if run_dir is not None else None
    autoencoder = None
    if weights is not None and weights.decoder is not None:
        autoencoder = attach_decoder(encoder, in_chans=data.in_chans, **weights.decoder.options())
        report += "" if untrained else f"; {load_decoder(autoencoder, weights)}"
    elif untrained or weights is None:
        autoencoder = attach_decoder(encoder, in_chans=data.in_chans, decoder=DecoderConfig(), target="norm_pix")
        no_decoder = ""
    if untrained and autoencoder is not None and isinstance(autoencoder.target, PCATarget):
        no_decoder = "the target pca has principal components in a trained run only"
    autoencoder = None if no_decoder else autoencoder
    crop_pct = run.data.crop_pct if run is not None else DataConfig.crop_pct
    mask = run.mask if run is not None else MaskConfig()
    return Subject(
        encoder.eval(), autoencoder and autoencoder.eval(), no_decoder, spec, mask, crop_pct, report, run_dir
    )


def _read(init: str | None) -> tuple[Weights | None, str]:
    """Returns the weights that `init` names, with their decoder where it can be read, and why there is none."""
    if init is None:
        return None, ""
    try:
        weights = read_weights(init, with_decoder=True)
    except InputError as error:  # a fine-tuning run, or a state that is damaged: the encoder lies beside it
        return read_weights(init), str(error)
    missing = f"{init} holds no decoder: give the folder of a pretraining run, or a full file"
    return weights, "" if weights.decoder is not None else missing


def load_run(run_dir: Path) -> MaskedAutoencoder:
    """Returns the autoencoder of a pretraining run with the weights of its newest state, in evaluation mode.

    Raises InputError when the folder is of no pretraining run, or its state cannot be read.
    """
    subject = load_subject(str(run_dir), EncoderConfig(), untrained=False, seed=0)
    if subject.autoencoder is None:
        raise InputError(subject.no_decoder)
    return subject.autoencoder


def pretraining_of(run_dir: Path) -> PretrainConfig | None:
    """Returns the configuration of a pretraining run; None for a folder of another kind.

    Raises InputError when its config.yaml cannot be read.
    """
    path = run_dir / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or "decoder" not in content:
        return None
    return parse_config(PretrainConfig, "", ["--config", str(path)])
