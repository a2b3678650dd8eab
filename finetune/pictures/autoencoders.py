"""What is looked at: an encoder, its decoder where it was kept, and how their run masked and cropped images."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from quarterlight.ssl.checkpoint import MODEL_FILE, state_folders
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import DataConfig, DecoderConfig, EncoderConfig, MaskConfig, PretrainConfig
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.mae import MaskedAutoencoder, attach_decoder
from quarterlight.ssl.released import encoder_spec, load_encoder, read_weights
from quarterlight.ssl.targets import PCATarget

IN_STATE = "autoencoder."  # in front of the autoencoder's names in a state of pretraining


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
    """Returns the encoder that `init` names, with its decoder where `init` is the folder of a pretraining run.

    `untrained` takes the architecture only; an encoder that is none of a run then gets MAE's decoder. Raises
    InputError for weights that cannot be read or are of another model.
    """
    weights = read_weights(init) if init is not None else None
    args = (weights.spec.args if weights is not None and weights.spec is not None else {}) | given.args
    data = DataConfig(train="", in_chans=args.get("in_chans", 3))
    spec = encoder_spec(given, data, weights)
    torch.manual_seed(seed)
    encoder, report = load_encoder(spec, None if untrained else weights)
    run_dir = Path(init).expanduser() if init is not None and Path(init).expanduser().is_dir() else None
    run = pretraining_of(run_dir) if run_dir is not None else None
    autoencoder, no_decoder = None, ""
    if run is not None and run_dir is not None:
        autoencoder = _attach(encoder, run)
        if not untrained and not (no_decoder := _load_decoder(autoencoder, run_dir)):
            report += f"; decoder of {state_folders(run_dir)[-1].name}"
    elif untrained or weights is None:
        autoencoder = attach_decoder(encoder, in_chans=data.in_chans, decoder=DecoderConfig(), target="norm_pix")
    else:
        no_decoder = f"{init} holds no decoder: give the folder of a pretraining run"
    if untrained and autoencoder is not None and isinstance(autoencoder.target, PCATarget):
        no_decoder = "the target pca has principal components in a trained run only"
    crop_pct = run.data.crop_pct if run is not None else DataConfig.crop_pct
    mask = run.mask if run is not None else MaskConfig()
    autoencoder = None if no_decoder else autoencoder
    return Subject(
        encoder.eval(), autoencoder and autoencoder.eval(), no_decoder, spec, mask, crop_pct, report, run_dir
    )


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


def _attach(encoder: Encoder, run: PretrainConfig) -> MaskedAutoencoder:
    return attach_decoder(
        encoder,
        in_chans=run.data.in_chans,
        decoder=run.decoder,
        target=run.target,
        pca_components=run.pca_components,
        loss=run.loss,
        pred_share=run.pred_share,
        encode_masked=run.encode_masked,
    )


def _load_decoder(autoencoder: MaskedAutoencoder, run_dir: Path) -> str:
    """Loads all but the encoder from the newest state. Returns why it cannot be, "" when it was.

    Nothing in the folder is touched: the run may go on.
    """
    states = state_folders(run_dir)
    if not states:
        return f"{run_dir} has no state, so its decoder is lost"
    try:
        tensors = load_file(states[-1] / MODEL_FILE)
    except (SafetensorError, OSError) as error:
        return f"{states[-1]} cannot be read ({' '.join(str(error).split())}), so its decoder is lost"
    own = {name.removeprefix(IN_STATE): x for name, x in tensors.items() if name.startswith(IN_STATE)}
    decoder = {name: x for name, x in own.items() if not name.startswith("encoder.")}
    wanted = {name: x for name, x in autoencoder.state_dict().items() if not name.startswith("encoder.")}
    if wrong := [n for n, x in wanted.items() if n not in decoder or decoder[n].shape != x.shape]:
        return f"{states[-1]} is of another decoder ({wrong[0]})"
    autoencoder.load_state_dict(decoder, strict=False)
    return ""
