"""Other people's names for the tensors of a ViT or Swin, put into timm's: from dictionary to dictionary.

The tables are facts of facebookresearch/mae, microsoft/Swin-Transformer, SimMIM and Hugging Face transformers (as its
files have them, and as its models of version 5 have them in memory).
"""

import re

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# Computed from the window by whoever builds the model; timm does not keep them in files.
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")

IN_BLOCK = [
    (r"attention\.(?:attention|self)\.(query|key|value)\.", lambda m: f"attn.{m[1][0]}."),
    (r"attention\.([qkv])_proj\.", r"attn.\1."),
    (r"attention\.output\.dense\.|attention\.o_proj\.", "attn.proj."),
    (r"attention\.(?:self|relative_position_bias)\.", "attn."),
    (r"attn\.continuous_position_bias_mlp\.", "attn.cpb_mlp."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", "mlp.fc2."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
]
FROM_HF = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^(?:encoder\.)?layers\.(\d+)\.(blocks|downsample)\.", r"layers.\1.\2."),  # Swin
    (r"^(?:encoder\.layers?|layers?)\.(\d+)\.(?!blocks|downsample)", r"blocks.\1."),  # ViT
    (r"^layernorm\.", "norm."),
    *IN_BLOCK,
]
DECODER_OF_HF = [
    (r"^decoder_(?:layers|encoder\.layers?)\.(\d+)\.", r"blocks.\1."),
    (r"^decoder_", ""),
    *IN_BLOCK,
]


def renamed(tensors: Tensors, rules: list) -> Tensors:
    """Returns the tensors under new names: every rule (a pattern and what takes its place) once, in order."""
    found = {}
    for name, x in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = x
    return found


def with_joined_qkv(tensors: Tensors) -> Tensors:
    """Returns the tensors with `attn.q`, `attn.k` and `attn.v` as one `attn.qkv`, in this order, as timm has them.

    Without a bias of the keys (Swin v2) the other two stay apart, as `q_bias` and `v_bias`.
    """
    found = dict(tensors)
    for query in [name for name in tensors if re.search(r"\battn\.q\.(weight|bias)$", name)]:
        stem, kind = re.sub(r"q\.(weight|bias)$", "", query), query.rpartition(".")[2]
        names = [f"{stem}{part}.{kind}" for part in "qkv"]
        if all(name in tensors for name in names):
            found[f"{stem}qkv.{kind}"] = torch.cat([found.pop(name) for name in names])
        elif kind == "bias" and names[2] in tensors:
            found[f"{stem}q_bias"], found[f"{stem}v_bias"] = found.pop(names[0]), found.pop(names[2])
    return found


def from_hf(tensors: Tensors) -> Tensors:
    """Returns a Hugging Face ViT's, DINOv2's or Swin's tensors (below its `vit.`, `swin.` ...) under timm's names."""
    return with_shifted_merging(with_joined_qkv(renamed(tensors, FROM_HF)))


def with_shifted_merging(tensors: Tensors) -> Tensors:
    """Returns a Swin's tensors with the merging of patches at the beginning of a stage, as timm has it since 0.9.

    Everyone else has it at the end of the stage before.
    """
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name): x
        for name, x in tensors.items()
    }


def from_original_swin(tensors: Tensors) -> Tensors:
    """Returns the tensors of Swin-Transformer or SimMIM under timm's names."""
    rules = [(r"\.rpe_mlp\.", ".cpb_mlp."), (r"^head\.(weight|bias)$", r"head.fc.\1")]
    return with_shifted_merging(renamed(tensors, rules))


def with_swapped_merging(tensors: Tensors) -> Tensors:
    """Returns a Swin's tensors with the second and third patch of four changing places where patches are merged.

    GreenMIM merged 00, 01, 10, 11 (row, column) until January 2023, and Swin merges 00, 10, 01, 11.
    """
    found = dict(tensors)
    for name, x in tensors.items():
        if re.search(r"\.downsample\.(reduction\.weight|norm\.(weight|bias))$", name):
            found[name] = x.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)
    return found


def from_dino(tensors: Tensors) -> Tensors:
    """Returns the tensors of a DINO or DINOv2 ViT under timm's names (as its `_convert_dinov2`).

    Blocks in chunks (`blocks.1.13`) are counted through, layer scales get timm's names, and the class token takes its
    position where there are registers, which have none.
    """
    found = renamed(tensors, [(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.gamma_([12])$", r".ls\1.gamma")])
    if "register_tokens" in found:
        positions = found["pos_embed"]
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]
    return found


def decoder_of_mae(tensors: Tensors) -> Tensors:
    """Returns MAE's `decoder_...` and `mask_token` under the names of `MaskedAutoencoder`."""
    return {f"decoder.{name.removeprefix('decoder_')}": x for name, x in tensors.items()}


def decoder_of_hf_mae(tensors: Tensors) -> Tensors:
    """Returns the decoder of a ViTMAEForPreTraining (below `decoder.`) under the names of `MaskedAutoencoder`."""
    inside = with_joined_qkv(renamed(tensors, DECODER_OF_HF))
    return {f"decoder.{name}": x for name, x in inside.items()}


def decoder_of_simmim(tensors: Tensors, mask_token: Tensor | None, in_chans: int) -> Tensors:
    """Returns SimMIM's 1 x 1 convolution before PixelShuffle as the linear layer it is, and the mask token.

    Its values for a unit are ordered (channel, row, column); here they are (row, column, channel).
    """
    found = {}
    for kind in ("weight", "bias"):
        values = tensors[f"decoder.0.{kind}"]
        values = values.flatten(1) if kind == "weight" else values
        found[f"decoder.pred.{kind}"] = values.unflatten(0, (in_chans, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    if mask_token is not None:
        found["mask_token"] = mask_token.flatten()
    return found
