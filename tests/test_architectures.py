"""Which timm model tensors belong to: the shapes of timm's own models, told from their shapes."""

import pytest
import timm
import torch
from torch import Tensor

from quarterlight.ssl.architectures import architecture_of
from quarterlight.ssl.kinds import recognise

VITS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch16_224": {"img_size": 384},
    "vit_huge_patch14_224": {},
    "vit_so400m_patch14_siglip_224": {},  # attention instead of a pooling
    "deit3_small_patch16_224": {},  # no_embed_class, layer scale
    "vit_small_patch14_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_medium_patch16_gap_240": {},  # no class token
}
SWINS = {
    "swin_tiny_patch4_window7_224": {},
    "swin_small_patch4_window7_224": {},
    "swin_base_patch4_window7_224": {"img_size": 192, "window_size": 6},
    "swin_large_patch4_window12_384": {"img_size": 192, "window_size": 12},  # the last stage has no room for 12
}


def without_memory(name: str, **args: object) -> dict[str, Tensor]:
    """Returns tensors of a headless model's shapes."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **args)
    return {key: torch.zeros(()).expand(x.shape) for key, x in model.state_dict().items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(x.shape) for key, x in tensors.items()}


@pytest.mark.parametrize("name", VITS | SWINS)
def test_the_model_told_from_shapes_has_these_shapes(name):
    args = (VITS | SWINS)[name]
    given = without_memory(name, weight_init="skip", **args)
    found = architecture_of(given, {}, pooled=False)
    with torch.device("meta"):
        built = timm.create_model(found.name, weight_init="skip", **{"num_classes": 0} | found.args)
        wanted = timm.create_model(name, num_classes=0, weight_init="skip", **args)
    assert shapes(built.state_dict()) == shapes(given)
    assert tuple(built.patch_embed.img_size) == tuple(wanted.patch_embed.img_size)
    if name in SWINS or found.name.startswith(name[:8]):
        heads = lambda model: [x.num_heads for x in model.modules() if hasattr(x, "num_heads")]  # noqa: E731
        assert heads(built) == heads(wanted)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_224",
        "vit_small_patch16_rope_224",
        "eva02_tiny_patch14_224",
        "vit_tiny_r_s16_p8_224",
        "swinv2_tiny_window8_256",
    ],
)
def test_models_that_shapes_do_not_tell_are_left_open(name):
    found = architecture_of(without_memory(name), {}, pooled=False)
    assert found.name is None and found.hint


@pytest.mark.parametrize("size", [(32, 48), (48, 64), (96, 112)])
def test_a_class_token_beside_a_grid_that_is_not_square_is_no_square(size):
    """4 x 6, 6 x 8 and 12 x 14 patches are a square less one; only registers and layer scale tell of no position."""
    found = architecture_of(without_memory("vit_tiny_patch16_224", img_size=size, patch_size=8), {}, pooled=False)
    assert "no_embed_class" not in found.args and "img_size" not in found.args
    bare = without_memory("deit3_small_patch16_224", img_size=80, patch_size=16)
    assert architecture_of(bare, {}, pooled=False).args["no_embed_class"]


def test_heads_of_a_standard_model_are_said_to_be_that_models():
    found = architecture_of(without_memory("vit_base_patch16_224"), {}, pooled=False)
    assert found.notes == ("12 attention heads, as vit_base_patch16_224 has them",)


def test_heads_of_a_width_that_is_no_multiple_of_64_are_left_open():
    found = architecture_of(without_memory("vit_tiny_patch16_224", embed_dim=48, depth=2), {}, pooled=False)
    assert found.args["num_heads"] is None
    found = architecture_of(
        without_memory("vit_tiny_patch16_224", embed_dim=128, depth=2, num_heads=4), {}, pooled=False
    )
    assert found.args["num_heads"] == 2


@pytest.mark.parametrize(
    ("name", "windows", "args"),
    [
        ("swinv2_base_window16_256", [0] * 4, {"img_size": [256, 256], "window_size": 16}),
        ("swinv2_tiny_window8_256", [0] * 4, {"img_size": [256, 256], "window_size": 8}),
        ("swinv2_base_window12to16_192to256", [12, 12, 12, 6], {"img_size": [256, 256], "window_size": 16}),
    ],
)
def test_windows_of_a_swin_v2_are_told_by_its_buffers(name, windows, args):
    """As Microsoft's files have them; of the second block of a stage the mask of shifted windows, too."""
    model = timm.create_model(name, num_classes=0, embed_dim=32, depths=(2, 2, 1, 1))
    buffers = {}
    for key, module in model.named_modules():
        if hasattr(module, "relative_coords_table"):
            buffers[f"{key}.relative_coords_table"] = module.relative_coords_table
            buffers[f"{key}.relative_position_index"] = module.relative_position_index
        if getattr(module, "attn_mask", None) is not None:
            buffers[f"{key}.attn_mask"] = module.attn_mask
    found = architecture_of(dict(model.state_dict()), buffers, pooled=False)
    assert {key: found.args[key] for key in args} == args
    assert found.args.get("pretrained_window_sizes", [0] * 4) == windows


KEYS_OF_MAE = {  # research: models_mae.py, by instantiating it
    "base": ("vit_base_patch16_224", 254, 150, (12, 768, 3072, 16, 197)),
    "large": ("vit_large_patch16_224", 398, 294, (24, 1024, 4096, 16, 197)),
    "huge": ("vit_huge_patch14_224", 494, 390, (32, 1280, 5120, 14, 257)),
}


def block(stem: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.norm1.weight": (dim,), f"{stem}.norm1.bias": (dim,), f"{stem}.norm2.weight": (dim,),
        f"{stem}.norm2.bias": (dim,), f"{stem}.attn.qkv.weight": (3 * dim, dim), f"{stem}.attn.qkv.bias": (3 * dim,),
        f"{stem}.attn.proj.weight": (dim, dim), f"{stem}.attn.proj.bias": (dim,),
        f"{stem}.mlp.fc1.weight": (hidden, dim), f"{stem}.mlp.fc1.bias": (hidden,),
        f"{stem}.mlp.fc2.weight": (dim, hidden), f"{stem}.mlp.fc2.bias": (dim,),
    }  # fmt: skip


@pytest.mark.parametrize("size", KEYS_OF_MAE)
def test_every_tensor_of_maes_files_is_accounted_for(size):
    name, total, in_encoder, (depth, dim, hidden, patch, tokens) = KEYS_OF_MAE[size]
    table = {
        "cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,), "mask_token": (1, 1, 512),
        "decoder_embed.weight": (512, dim), "decoder_embed.bias": (512,), "decoder_pos_embed": (1, tokens, 512),
        "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
        "decoder_pred.weight": (patch * patch * 3, 512), "decoder_pred.bias": (patch * patch * 3,),
    }  # fmt: skip
    for i in range(depth):
        table |= block(f"blocks.{i}", dim, hidden)
    for i in range(8):
        table |= block(f"decoder_blocks.{i}", 512, 2048)
    assert len(table) == total
    found = recognise({key: torch.zeros(()).expand(shape) for key, shape in table.items()})
    assert (found.kind, len(found.encoder), found.head, found.unused) == ("mae-full", in_encoder, {}, [])
    assert len(found.decoder) == total - in_encoder
    assert shapes(found.encoder) == shapes(without_memory(name))
    assert architecture_of(found.encoder, {}, pooled=False).name == name
