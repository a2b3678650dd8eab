"""Which timm model a set of tensors belongs to, told from their shapes (and a Swin's buffers)."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# timm's standard ViTs by (width, blocks, hidden width of the MLP): name, patch, attention heads.
VITS = {
    (192, 12, 768): ("vit_tiny_patch16_224", 16, 3),
    (384, 12, 1536): ("vit_small_patch16_224", 16, 6),
    (768, 12, 3072): ("vit_base_patch16_224", 16, 12),
    (1024, 24, 4096): ("vit_large_patch16_224", 16, 16),
    (1280, 32, 5120): ("vit_huge_patch14_224", 14, 16),
    (1152, 27, 4304): ("vit_so400m_patch14_siglip_224", 14, 16),
    (1408, 40, 6144): ("vit_giant_patch14_224", 14, 16),
    (1664, 48, 8192): ("vit_gigantic_patch14_224", 14, 16),
}
# ... and Swins by (width, blocks of the stages): size in the name, attention heads of the stages.
SWINS: dict[tuple[int, tuple[int, ...]], tuple[str, list[int]]] = {
    (96, (2, 2, 6, 2)): ("tiny", [3, 6, 12, 24]),
    (96, (2, 2, 18, 2)): ("small", [3, 6, 12, 24]),
    (128, (2, 2, 18, 2)): ("base", [4, 8, 16, 32]),
    (192, (2, 2, 18, 2)): ("large", [6, 12, 24, 48]),
}
V2_NAMES = {"large": "swinv2_large_window12_192"}  # of which timm has no window 8
HEAD_DIM = 64  # of every standard ViT up to large
PATCHES = "patch_embed.proj.weight"
TABLE = ".attn.relative_position_bias_table"


@dataclass
class Architecture:
    """A timm model by name and arguments; `name` None where shapes do not tell, and then `hint` says what they do."""

    name: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    hint: str = ""
    notes: tuple[str, ...] = ()  # of what a convention has told


def architecture_of(encoder: dict[str, Tensor], buffers: dict[str, Tensor], *, pooled: bool) -> Architecture:
    """Returns the model of an encoder's tensors under timm's names.

    A grid that is not square is left open: n * n - 1 patches beside a class token have as many positions as n * n.
    `pooled` says that a classifier's norm stands behind its pooling. The heads of a ViT leave no trace in its tensors:
    they are those of the standard model of its size, or (`num_heads` None) left to be given.
    """
    if encoder[PATCHES].ndim != 4:
        return Architecture(hint="a patch embedding that is no convolution")
    if any(name.startswith("layers.") for name in encoder):
        return _swin(encoder, buffers)
    if any(re.match(r"blocks\.0\.attn\.qkv\.weight", name) for name in encoder):
        return _vit(encoder, pooled)
    return Architecture(hint="what its blocks are is told by nothing in it")


def _vit(encoder: dict[str, Tensor], pooled: bool) -> Architecture:
    patches, positions = encoder[PATCHES], encoder.get("pos_embed")
    width, depth = len(patches), 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, encoder) if m)
    fc1, fc2 = encoder.get("blocks.0.mlp.fc1.weight"), encoder.get("blocks.0.mlp.fc2.weight")
    told = f"width {width}, {depth} blocks, patches of {patches.shape[2]} pixels"
    of_another = ("blocks.0.attn.q_bias", "rope.freqs")  # timm's Eva
    if positions is None or fc1 is None or fc2 is None or fc2.shape[1] != len(fc1):
        return Architecture(hint=f"{told}, and the rest is of rotary positions, gated MLPs or a stem, or renamed")
    if any(name in encoder for name in of_another) or any(name.startswith("patch_embed.backbone") for name in encoder):
        return Architecture(hint=f"{told}, and rotary positions or a convolutional stem")
    if "norm_pre.weight" in encoder:  # not all of them have the same eps and activation
        return Architecture(hint=f"{told}, and a norm before its blocks, as CLIP's: vit_*_clip_*")
    if patches.shape[2] != patches.shape[3]:
        return Architecture(hint=f"{told}, which are not square")
    args: dict[str, Any] = {"in_chans": patches.shape[1]}
    patch = int(patches.shape[2])
    name, usual_patch, heads = VITS.get((width, depth, len(fc1)), ("vit_base_patch16_224", 16, 0))
    note = f"{heads} attention heads, as {name} has them"
    if (width, depth, len(fc1)) not in VITS:
        heads = width // HEAD_DIM if width % HEAD_DIM == 0 else None
        args |= {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": len(fc1) / width}
        note = f"{heads} attention heads by convention ({HEAD_DIM} wide)"
    if patch != usual_patch:
        args["patch_size"] = patch
    registers = encoder["reg_token"].shape[1] if "reg_token" in encoder else 0
    prefix, rows = registers + ("cls_token" in encoder), positions.shape[1]
    side, alone = _side(rows - prefix), _side(rows)  # with a position for class token and registers, and without
    # timm's models with registers (DINOv2's) or layer scale (DeiT III's) are those that give the class token none
    may_be_bare = registers > 0 or "blocks.0.ls1.gamma" in encoder
    bare = side is None and alone is not None and prefix > 0 and may_be_bare
    if (found := alone if bare else side) is not None:
        args["img_size"] = [found * patch, found * patch]
    options = {
        "no_embed_class": bare,
        "reg_tokens": registers,
        "qk_norm": "blocks.0.attn.q_norm.weight" in encoder,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in encoder else None,
    }
    args |= {key: value for key, value in options.items() if value}
    if "blocks.0.attn.qkv.bias" not in encoder:
        args["qkv_bias"] = False
    if "cls_token" not in encoder:
        pool = "map" if "attn_pool.latent" in encoder else "avg"
        args |= {"class_token": False, "global_pool": pool, "fc_norm": pooled}
    elif pooled:
        args["global_pool"] = "avg"
    return Architecture(name, args, told, (note,) if heads else ())


def _side(count: int) -> int | None:
    """Returns the side of a square grid of `count` patches, None if there is no such grid."""
    side = math.isqrt(max(0, count))
    return side if side > 0 and side**2 == count else None


def _swin(encoder: dict[str, Tensor], buffers: dict[str, Tensor]) -> Architecture:
    patches = encoder[PATCHES]
    width, patch = len(patches), int(patches.shape[2])
    blocks = [(int(m[1]), int(m[2])) for m in map(re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.").match, encoder) if m]
    stages = 1 + max((stage for stage, _ in blocks), default=-1)
    depths = tuple(1 + max((b for stage, b in blocks if stage == s), default=-1) for s in range(stages))
    is_v2 = any(name.endswith(".logit_scale") for name in encoder)
    told = f"a Swin{' V2' if is_v2 else ''} of width {width} with {list(depths)} blocks"
    per_head = [encoder.get(f"layers.{s}.blocks.0{'.attn.logit_scale' if is_v2 else TABLE}") for s in range(stages)]
    windows = [_window(encoder, buffers, s) for s in range(stages)]
    fc1 = encoder.get("layers.0.blocks.0.mlp.fc1.weight")
    if fc1 is None or any(x is None for x in per_head) or not stages:
        return Architecture(hint=told)
    if any(window is None for window in windows):
        return Architecture(hint=f"{told}, whose windows are told by nothing in it")
    heads = [len(x) if is_v2 else x.shape[1] for x in per_head if x is not None]
    first, last = windows[0], windows[-1]
    assert first is not None and last is not None
    mask = buffers.get("layers.0.blocks.1.attn_mask")
    # one mask for each window; or else the last stage is one window, narrower where the image is small
    side = last * patch * 2 ** (stages - 1) if mask is None else math.isqrt(len(mask)) * first * patch
    size, usual = SWINS.get((width, depths), ("tiny", []))
    name = V2_NAMES.get(size, f"swinv2_{size}_window8_256") if is_v2 else f"swin_{size}_patch4_window7_224"
    args: dict[str, Any] = {"in_chans": patches.shape[1], "img_size": [side, side], "window_size": first}
    if (width, depths) not in SWINS:
        args |= {"embed_dim": width, "depths": list(depths)}
    if heads != usual:
        args["num_heads"] = heads
    if patch != 4:
        args["patch_size"] = patch
    if len(fc1) != 4 * width:
        args["mlp_ratio"] = len(fc1) / width
    if "layers.0.blocks.0.attn." + ("q_bias" if is_v2 else "qkv.bias") not in encoder:
        args["qkv_bias"] = False
    before = [_window_before(buffers, s, window) for s, window in enumerate(windows)]
    if any(before):
        args["pretrained_window_sizes"] = before
    return Architecture(name, args, told)


def _window(encoder: dict[str, Tensor], buffers: dict[str, Tensor], stage: int) -> int | None:
    """Returns the side of a stage's (square) windows, from its table or index of relative positions."""
    table = encoder.get(f"layers.{stage}.blocks.0{TABLE}")
    index = buffers.get(f"layers.{stage}.blocks.0.attn.relative_position_index")
    if table is not None:
        return (math.isqrt(len(table)) + 1) // 2
    return None if index is None else math.isqrt(len(index))


def _window_before(buffers: dict[str, Tensor], stage: int, window: int | None) -> int:
    """Returns the window that a Swin V2 was pretrained with, 0 for its own: its coordinates are in units of it.

    The largest is log2(8 * (window - 1) / (window before - 1) + 1) / log2(8) (Liu et al. 2022, arXiv:2111.09883).
    """
    table = buffers.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
    if table is None or window is None or window < 2:
        return 0
    largest = 2 ** (3 * float(table.max())) - 1
    before = 1 + round(8 * (window - 1) / largest) if largest > 0 else window
    return 0 if before == window else before
