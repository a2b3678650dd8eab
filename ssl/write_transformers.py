"""timm models as folders that Hugging Face's transformers reads by `from_pretrained`.

Written without transformers: names of tensors are `layouts`, the rest is config.json. Where transformers is installed,
`largest_difference` loads the folder and compares.
"""

import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import GELU, GELUTanh, QuickGELU
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from .errors import InputError
from .export import ModelSpec
from .files import write_tensors
from .layouts import (
    HF_BEIT_CLASSIFIER,
    HF_SWIN,
    HF_SWIN_CLASSIFIER,
    HF_SWIN_V2,
    HF_SWIN_V2_CLASSIFIER,
    HF_VIT,
    HF_VIT_CLASSIFIER,
    HF_VIT_MAE,
    Layout,
)
from .mae import MaskedAutoencoder
from .masking import random_masking
from .patches import pair
from .plain_vit import WAY_OUT, eps_of, refuse_unusual_autoencoder, refuse_unusual_vit, with_positions
from .targets import NormPixTarget

ACTIVATIONS = {nn.GELU: "gelu", GELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_pytorch_tanh"}


class HFModel(NamedTuple):
    """What a folder of transformers holds: model.safetensors and config.json."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def hf_model(model: Any, labels: list[str] | None = None) -> HFModel:
    """Returns a timm encoder or classifier as transformers has it: ViT, BEiT, Swin or Swinv2.

    A ViT classifier that averages patches and normalizes behind that, as MAE's do, becomes a BEiT: transformers' ViT
    classifies by the class token. Raises InputError, with the reason, for a model that none of them is.
    """
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        layout, config = _swin(model)
    else:
        refuse_unusual_vit(model, "transformers")
        layout, config = _vit(model)
    if model.num_classes:
        names = labels if labels and len(labels) == model.num_classes else None
        names = names or [f"LABEL_{i}" for i in range(model.num_classes)]
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return HFModel(_renamed(layout, model.state_dict()), config)


def hf_autoencoder(autoencoder: MaskedAutoencoder, mask_ratio: float) -> HFModel:
    """Returns a masked autoencoder as transformers' ViTMAEForPreTraining, decoder included.

    Raises InputError, with the reason, where that is another one.
    """
    refuse_unusual_autoencoder(autoencoder, "transformers")
    vit: Any = autoencoder.encoder.timm
    config = _vit_sizes(vit)
    decoder: Any = autoencoder.decoder
    if eps_of(vit) != eps_of(decoder) or not config["qkv_bias"]:
        raise InputError(
            "transformers' ViTMAE has layer norms of one eps, and queries, keys and values with biases, in encoder and "
            "decoder: use --part encoder"
        )
    block = decoder.blocks[0]
    config |= {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": decoder.norm.normalized_shape[0],
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": isinstance(autoencoder.target, NormPixTarget),
    }
    return HFModel(_renamed(HF_VIT_MAE, with_positions(autoencoder)), config)


def write_folder(folder: Path, model: HFModel, spec: ModelSpec, crop_pct: float) -> None:
    """Writes model.safetensors, config.json and preprocessor_config.json into an existing folder."""
    dtype = next(iter(model.tensors.values())).dtype
    config: dict[str, Any] = model.config | {"dtype": str(dtype).removeprefix("torch.")}
    write_tensors(folder / "model.safetensors", model.tensors, {"format": "pt"})
    size = pair(config["image_size"])
    for name, content in (("config", config), ("preprocessor_config", image_processor(spec, size, crop_pct))):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _renamed(layout: Layout, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        renamed = layout.to_theirs(tensors)
    except InputError as error:
        raise InputError(f"{error}: {WAY_OUT}") from error
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def _side(size: Iterable[int] | int) -> int | list[int]:
    height, width = pair(size)  # type: ignore[arg-type]
    return height if height == width else [height, width]


def _shared(model: Any, block: Any) -> dict[str, Any]:
    """Returns what the configs of all these models have."""
    activation = ACTIVATIONS.get(type(block.mlp.act))
    if activation is None or getattr(block.mlp.act, "approximate", "none") == "tanh":
        raise InputError(f"transformers has no such model: its activation is {block.mlp.act}; {WAY_OUT}")
    return {
        "image_size": _side(model.patch_embed.img_size),
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_act": activation,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": eps_of(model),
    }


def _vit_sizes(vit: Any) -> dict[str, Any]:
    block = vit.blocks[0]
    return _shared(vit, block) | {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def _vit(vit: Any) -> tuple[Layout, dict[str, Any]]:
    config = _vit_sizes(vit) | {"model_type": "vit", "encoder_stride": vit.patch_embed.patch_size[0]}
    if not vit.num_classes:
        if isinstance(vit.norm, nn.Identity):
            raise InputError(f"transformers' ViTModel has a final norm and this encoder has none; {WAY_OUT}")
        return HF_VIT, config | {"architectures": ["ViTModel"]}
    if vit.global_pool == "token" and isinstance(vit.fc_norm, nn.Identity):
        return HF_VIT_CLASSIFIER, config | {"architectures": ["ViTForImageClassification"]}
    if vit.global_pool != "avg" or isinstance(vit.fc_norm, nn.Identity) or not config.pop("qkv_bias"):
        raise InputError(
            "transformers has no such classifier: it takes the class token behind the final norm, or averages patches "
            f"and normalizes their mean; {WAY_OUT}"
        )
    if isinstance(config["image_size"], list):
        raise InputError(f"transformers' BEiT, which averages patches, has square images only; {WAY_OUT}")
    return HF_BEIT_CLASSIFIER, config | {
        "architectures": ["BeitForImageClassification"],
        "model_type": "beit",
        "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
    }


def _swin(swin: Any) -> tuple[Layout, dict[str, Any]]:
    second = isinstance(swin, SwinTransformerV2)
    blocks = [block for stage in swin.layers for block in stage.blocks]
    window = max(max(block.window_size) for block in blocks)
    if any(block.window_size[0] != block.window_size[1] for block in blocks) or any(
        block.shift_size[0] != block.shift_size[1] for block in blocks
    ):
        raise InputError(f"transformers' Swin has square windows, shifted alike both ways; {WAY_OUT}")
    # The second version computes its tables for windows of any size, so that small maps may have smaller ones.
    full = [block for block in blocks if not second or min(block.input_resolution) > window]
    if smaller := [block.window_size[0] for block in full if block.window_size[0] != window]:
        raise InputError(
            f"transformers' Swin has windows of one size, and this one has {window} and {smaller[0]} (a stage's map may"
            f" be smaller than its windows); {WAY_OUT}"
        )
    block = blocks[0]
    config = _shared(swin, block) | {
        "model_type": "swinv2" if second else "swin",
        "embed_dim": swin.embed_dim[0] if isinstance(swin.embed_dim, list | tuple) else swin.embed_dim,
        "depths": [len(stage.blocks) for stage in swin.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in swin.layers],
        "window_size": window,
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        "qkv_bias": block.attn.qkv.bias is not None or second,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
        "encoder_stride": 32,
    }
    if second:
        stages: Any = swin.layers
        sizes = [stage.blocks[0].attn.pretrained_window_size for stage in stages]
        config["pretrained_window_sizes"] = [pair(size)[0] for size in sizes]
    kind = ("Swinv2" if second else "Swin") + ("ForImageClassification" if swin.num_classes else "Model")
    layouts = (HF_SWIN_V2, HF_SWIN_V2_CLASSIFIER) if second else (HF_SWIN, HF_SWIN_CLASSIFIER)
    return layouts[bool(swin.num_classes)], config | {"architectures": [kind]}


def image_processor(spec: ModelSpec, size: tuple[int, int], crop_pct: float) -> dict[str, Any]:
    """Returns preprocessor_config.json: our evaluation's crop.

    Images that are not square are resized without keeping their proportions: transformers' crop has one length.
    """
    height, width = size
    square = height == width
    shorter = {"shortest_edge": math.floor(height / crop_pct)}
    return {
        "image_processor_type": "BitImageProcessor" if square else "ViTImageProcessor",
        "do_resize": True,
        "size": shorter if square else {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "do_convert_rgb": len(spec.mean) == 3,
    }


@torch.no_grad()
def largest_difference(folder: Path, model: Any, images: Float[Tensor, "B C H W"]) -> float | None:
    """Returns how far transformers' outputs of the folder's model are from ours, in units of our largest one.

    None where transformers is not installed. Raises InputError when it misses tensors or has others, or cannot load it.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config: Any = transformers.AutoConfig.from_pretrained(str(folder))
    name = config.architectures[0]
    more = {"add_pooling_layer": False} if name.endswith("Model") else {}
    try:
        theirs, info = getattr(transformers, name).from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, **more
        )
    except Exception as error:  # of many kinds; versions before 4.56 do not know `dtype`
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"transformers {transformers.__version__} does not load this {name} ({reason}): install a newer one to "
            "check it, or none to write it unchecked"
        ) from error
    if wrong := [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]:
        raise InputError(
            f"transformers {transformers.__version__} does not load this {name} whole ({wrong[0]}); {WAY_OUT}"
        )
    theirs.eval()
    if isinstance(model, MaskedAutoencoder):
        noise = torch.rand(len(images), model.encoder.num_units, generator=torch.Generator().manual_seed(0))
        masking = random_masking(len(images), model.encoder.num_units, config.mask_ratio, noise=noise)
        ours, found = model(images, masking).prediction, theirs(images, noise=noise).logits
    elif model.num_classes:
        ours, found = model(images), theirs(images).logits
    else:
        ours, found = model.forward_features(images), theirs(images).last_hidden_state
    ours = ours.flatten(1, 2) if ours.ndim == 4 else ours
    return float((ours - found).abs().max() / ours.abs().max().clamp_min(1e-6))
