"""A network as `--init` names it, and how its images are made ready."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import timm
import yaml
from torch import Tensor

from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.encoders import wrap
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.patches import pair
from quarterlight.ssl.released import Weights, encoder_spec, read_weights

from .use_config import CropConfig

CROP_PCT = DataConfig.crop_pct


def open_weights(init: str, encoder: EncoderConfig, data: CropConfig) -> tuple[Weights, ModelSpec]:
    """Returns the weights that `init` names, and the encoder that they are of. Raises InputError."""
    weights = read_weights(init)
    known = weights.spec.args if weights.spec is not None else {}
    chans: Any = encoder.args.get("in_chans", known.get("in_chans", 3))
    given = DataConfig(train="", img_size=data.img_size, in_chans=chans, mean=data.mean, std=data.std)
    return weights, encoder_spec(encoder, given, weights)


def in_chans(spec: ModelSpec) -> Literal[1, 3]:
    """Returns the channels of the images."""
    return 1 if spec.args.get("in_chans") == 1 else 3


def crop_of(model: Any, init: str, data: CropConfig) -> CenterCrop:
    """Returns the evaluation crop of a timm model. Raises InputError for a size that its patches do not tile."""
    wrap(model, init)
    share = data.crop_pct if data.crop_pct is not None else own_crop_pct(init)
    return CenterCrop(pair(model.patch_embed.img_size), share)


def own_crop_pct(init: str) -> float:
    """Returns the crop_pct that a network is evaluated with: of its run's config.yaml, its config.json, or timm's."""
    path = Path(init.removeprefix("local-dir:")).expanduser()
    folder = path if path.is_dir() else path.parent
    found: Any = None
    try:
        if path.exists() and (folder / "config.yaml").is_file():
            found = yaml.safe_load((folder / "config.yaml").read_text())["data"]["crop_pct"]
        elif path.exists() and (folder / "config.json").is_file():
            found = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["crop_pct"]
        elif not path.exists() and (known := timm.get_pretrained_cfg(init, allow_unregistered=True)) is not None:
            found = known.crop_pct
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, yaml.YAMLError):
        found = None  # a file of another kind that happens to have this name
    return float(found) if isinstance(found, int | float) and 0 < found <= 1 else CROP_PCT


def hash_of(tensors: dict[str, Tensor]) -> str:
    """Returns a hash of names and values."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
