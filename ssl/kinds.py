"""What kind of file a set of tensors comes from, told by their names and shapes, and its parts under timm's names."""

import re
from dataclasses import dataclass, field
from typing import Literal

import torch

from .errors import InputError
from .pos_embed import sincos_pos_embed
from .renaming import (
    BUFFERS,
    Tensors,
    decoder_of_hf_mae,
    decoder_of_mae,
    decoder_of_simmim,
    from_dino,
    from_hf,
    from_original_swin,
    with_swapped_merging,
)

KINDS = {
    "quarterlight": "weights of this project",
    "mae": "MAE, encoder only",
    "mae-full": "MAE with its decoder",
    "mae-finetuned": "a classifier fine-tuned from MAE",
    "swin": "Swin Transformer",
    "swinv2": "Swin Transformer V2",
    "simmim": "SimMIM",
    "greenmim": "GreenMIM",
    "dino": "a ViT inside another model, or with DINOv2's layers",
    "timm": "timm",
    "hf-vit-mae": "Hugging Face ViTMAEForPreTraining",
    "hf-vit": "a Hugging Face ViT",
    "hf-dinov2": "a Hugging Face DINOv2",
    "hf-swin": "a Hugging Face Swin",
    "hf-swinv2": "a Hugging Face Swin V2",
    "hf-simmim": "a Hugging Face model for masked image modeling",
}
MergeOrder = Literal["swin", "greenmim2022"]
WRAPPERS = r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # anywhere in a name
PATCHES, HF_PATCHES = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
# Which of several encoders in one file is taken: the averaged one, or the one that was trained for release.
PREFERRED = ("teacher", "target_encoder", "base_encoder", "encoder_q", "online_encoder", "student")
MOCO = {"base_encoder", "momentum_encoder"}
OWN = ("autoencoder.encoder.timm.", "encoder.timm.", "classifier.")  # in states of this project, and in its models
HEAD_LAYERS = re.compile(r"(head\.(fc\.)?|fc_norm\.)(weight|bias)")
UNSUPPORTED = {
    "dist_token": "a distilled DeiT has a second class token; use one of timm's deit3_* or vit_*",
    "absolute_pos_embed": "this Swin has absolute positions, which timm's Swin lacks",
    "rel_pos_bias.relative_position_bias_table": "this is a BEiT-like ViT (SimMIM's ViT, BEiT), whose attention has "
    "relative positions: timm has it as beit_*, which cannot encode visible patches only",
    "blocks.0.attn.relative_position_bias_table": "this is a BEiT-like ViT, whose attention has relative positions: "
    "timm has it as beit_*, which cannot encode visible patches only",
    "blocks.0.mlp.w12.weight": "this DINOv2 has gated MLPs (SwiGLU): give its timm name instead",
    "blocks.0.mlp.weights_in.weight": "this DINOv2 has gated MLPs (SwiGLU): give its timm name instead",
}


@dataclass
class Found:
    """The parts of a file. Every tensor of it is in one of them."""

    kind: str
    encoder: Tensors  # timm's names
    head: Tensors = field(default_factory=dict)  # a classifier's own layers, timm's names
    decoder: Tensors = field(default_factory=dict)  # names of MaskedAutoencoder
    buffers: Tensors = field(default_factory=dict)  # a Swin's, which say what its windows are; timm's names
    unused: list[str] = field(default_factory=list)  # names in the file
    notes: list[str] = field(default_factory=list)
    num_heads: int | None = None  # where the kind of file tells


def recognise(tensors: Tensors, merge_order: MergeOrder | None = None) -> Found:
    """Returns the parts of a file with these tensors.

    `merge_order` is the order in which a GreenMIM file merges patches: its names do not tell. Raises InputError, with
    the reason, for files that hold no encoder or one that timm or this project does not have.
    """
    names = {re.sub(WRAPPERS, "", name): name for name in tensors}
    tensors = {name: tensors[given] for name, given in names.items()}
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    prefix, is_hf = _place_of_encoder(tensors)
    inner = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    outer = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
    if prefix in OWN:
        return _own_state(inner, outer)
    found = _hugging_face(inner, outer) if is_hf else _timm_like(inner, outer, prefix, merge_order)
    if MOCO & set(prefix.split(".")) and inner[PATCHES].shape[0] == 384:
        found.num_heads = 12  # of MoCo v3's ViT-S, which has heads of 32 (Chen et al. 2021, section 4.1)
    for name, why in UNSUPPORTED.items():
        if name in found.encoder:
            raise InputError(why)
    if merge_order is not None and found.kind != "greenmim":
        raise InputError(f"is of kind {found.kind}, and merge_order is for GreenMIM only: leave it null")
    return found


def _place_of_encoder(tensors: Tensors) -> tuple[str, bool]:
    """Returns what stands before the encoder's names, and whether they are Hugging Face's. Raises InputError."""
    places = {}
    for end in (PATCHES, HF_PATCHES):
        for name in tensors:
            if name == end or name.endswith("." + end):
                places[name.removesuffix(end)] = end == HF_PATCHES
    if not places:
        raise InputError(_why_no_encoder(tensors))
    if len(places) > 1:
        preferred = [place for part in PREFERRED for place in places if part in place.split(".")]
        if not preferred:
            raise InputError(f"holds several encoders ({', '.join(sorted(places))}): save the one that is wanted")
        places = {preferred[0]: places[preferred[0]]}
    return next(iter(places.items()))


def _why_no_encoder(tensors: Tensors) -> str:
    shown = ", ".join(list(tensors)[:3])
    if all(name.startswith(("decoder", "mask_token")) for name in tensors):
        return f"holds a decoder only ({shown}, ...) and no encoder: give the full file, or the encoder's"
    if any(name.endswith((":exp_avg", ".exp_avg")) for name in tensors):
        return "holds an optimizer's state and no model: give model.safetensors beside it"
    if any(re.search(r"(^|\.)(stages|downsample_layers|stem|conv1|layer1)\.", name) for name in tensors):
        return f"holds a convolutional or hybrid network ({shown}, ...), no plain ViT or Swin"
    return (
        f"holds {len(tensors)} tensors, and none is the patch embedding of a ViT or Swin as timm, MAE, SimMIM or "
        f"Hugging Face name it ({shown}, ...): they are of another architecture, or renamed"
    )


def _timm_like(inner: Tensors, outer: Tensors, prefix: str, merge_order: MergeOrder | None) -> Found:
    everything = inner | outer
    if any(name.startswith("layers.") for name in inner):
        return _swin(inner, outer, merge_order)
    decoder = {name: x for name, x in everything.items() if re.match(r"decoder_|mask_token$|decoder\.0\.", name)}
    rest = {name: x for name, x in inner.items() if not name.startswith(("decoder", "mask_token"))}
    unused = [name for name in everything if name not in decoder and not (name in inner and name in rest)]
    is_dino = "register_tokens" in rest or "blocks.0.0.norm1.weight" in rest
    found = Found("timm", *_split(from_dino(rest), unused), unused=unused)
    if "decoder_pred.weight" in decoder:
        found.kind, found.decoder = "mae-full", decoder_of_mae(decoder)
    elif "decoder.0.weight" in decoder:  # SimMIM's ViT, as Hugging Face has it
        token = decoder.get("mask_token", inner.get("mask_token"))
        found.kind, found.decoder = "simmim", decoder_of_simmim(decoder, token, inner[PATCHES].shape[1])
    elif prefix or is_dino or "mask_token" in decoder:
        found.kind = "dino"
        found.unused += [name for name in decoder]
    elif "fc_norm.weight" in found.head and "norm.weight" not in found.encoder:
        found.kind = "mae-finetuned"
    elif _has_fixed_waves(found.encoder):
        found.kind = "mae"
    return found


def _swin(inner: Tensors, outer: Tensors, merge_order: MergeOrder | None) -> Found:
    everything = inner | outer
    is_v2 = any(name.endswith(".attn.logit_scale") for name in inner)
    is_original = "layers.0.downsample.reduction.weight" in inner
    names = from_original_swin(inner) if is_original else dict(inner)
    buffers = {name: x for name, x in names.items() if name.endswith(BUFFERS)}
    decoder = {name: x for name, x in everything.items() if re.match(r"decoder_|mask_token$|decoder\.0\.", name)}
    unused = [name for name in outer if name not in decoder]
    rest = {name: x for name, x in names.items() if name not in buffers and name not in decoder}
    found = Found("timm", *_split(rest, unused), buffers=buffers, unused=unused)
    if "decoder_pred.weight" in decoder:
        found.kind = "greenmim"
        found.unused += list(decoder)
        found.notes.append("its decoder is left out: it was trained with visible tokens in wrong places")
        if merge_order is None:
            raise InputError(
                "is GreenMIM's, whose code merged patches in another order until January 2023, and nothing in a file "
                "tells which it has: convert it with launch/convert.py and --merge_order greenmim2022 (as what was "
                "released in May 2022) or swin (trained with later code)"
            )
        if merge_order == "greenmim2022":
            found.encoder = with_swapped_merging(found.encoder)
    elif "decoder.0.weight" in decoder:
        found.kind = "simmim"
        found.decoder = decoder_of_simmim(decoder, decoder.get("mask_token"), inner[PATCHES].shape[1])
    elif "mask_token" in decoder:
        found.kind, found.unused = "simmim", [*found.unused, "mask_token"]
    elif is_original:
        found.kind = "swinv2" if is_v2 else "swin"
    return found


def _hugging_face(inner: Tensors, outer: Tensors) -> Found:
    mask_token = inner.get("embeddings.mask_token")
    plain = {name: x for name, x in inner.items() if name != "embeddings.mask_token"}
    names = from_hf(
        {name: x for name, x in plain.items() if not name.startswith(("pooler.", "decoder.", "classifier."))}
    )
    buffers = {name: x for name, x in names.items() if name.endswith(BUFFERS)}
    is_swin = any(name.startswith("layers.") for name in names)
    head = {name: x for name, x in (outer | plain).items() if name in ("classifier.weight", "classifier.bias")}
    decoder = {name: x for name, x in (outer | plain).items() if name.startswith("decoder.")}
    unused = [name for name in outer if name not in head and name not in decoder]
    unused += [name for name in plain if name.startswith("pooler.")]
    encoder = from_dino({name: x for name, x in names.items() if name not in buffers})
    is_v2 = any(name.endswith(".attn.logit_scale") for name in encoder)
    found = Found("hf-swinv2" if is_v2 else "hf-swin" if is_swin else "hf-vit", encoder, buffers=buffers, unused=unused)
    where = "head.fc" if is_swin else "head"
    found.head = {f"{where}.{name.removeprefix('classifier.')}": x for name, x in head.items()}
    if "decoder.decoder_pred.weight" in decoder:
        found.kind = "hf-vit-mae"
        found.decoder = decoder_of_hf_mae({name.removeprefix("decoder."): x for name, x in decoder.items()})
    elif "decoder.0.weight" in decoder:
        found.kind = "hf-simmim"
        found.decoder = decoder_of_simmim(decoder, mask_token, encoder[PATCHES].shape[1])
        return found
    elif "blocks.0.ls1.gamma" in encoder:
        found.kind = "hf-dinov2"
        if head:
            found.unused += list(head)
            found.head, found.notes = {}, ["its head reads class token and mean together, which timm's does not"]
    if mask_token is not None:
        found.unused.append("embeddings.mask_token")
    return found


def _own_state(inner: Tensors, outer: Tensors) -> Found:
    """Returns the parts of a state's model.safetensors, of a run of this project."""
    rest = {name.removeprefix("autoencoder."): x for name, x in outer.items()}
    decoder = {name: x for name, x in rest.items() if name.startswith(("decoder.", "target.")) or name == "mask_token"}
    unused = [name for name in rest if name not in decoder]
    return Found("quarterlight", *_split(inner, unused), decoder=decoder, unused=unused)


def _split(tensors: Tensors, unused: list[str]) -> tuple[Tensors, Tensors]:
    """Returns the encoder's tensors and a classifier's own layers; other heads (DINO's, MoCo's) join `unused`."""
    head = {name: x for name, x in tensors.items() if HEAD_LAYERS.fullmatch(name)}
    encoder = {}
    for name, x in tensors.items():
        if name.startswith(("head.", "pre_logits.", "fc_norm.")) and name not in head:
            unused.append(name)
        elif name not in head:
            encoder[name] = x
    return encoder, head


def _has_fixed_waves(encoder: Tensors) -> bool:
    """Returns whether the positions are the sine and cosine waves that MAE never trains, on a square grid."""
    positions = encoder.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[2] % 4:
        return False
    side = round((positions.shape[1] - 1) ** 0.5)
    if side**2 != positions.shape[1] - 1:
        return False
    waves = sincos_pos_embed(positions.shape[2], (side, side), num_prefix_tokens=1)
    return torch.allclose(positions.float(), waves, atol=1e-3)
