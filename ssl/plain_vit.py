"""What facebookresearch/mae and transformers have of ViTs and masked autoencoders, and MAE's own files."""

from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .decoder import TransformerDecoder
from .encoders import wrap
from .errors import InputError
from .hybrid import HybridEncoder
from .layouts import MAE
from .mae import MaskedAutoencoder
from .targets import NormPixTarget, PixelTarget

WAY_OUT = "use --to timm (transformers loads that too, where timm is installed: AutoModel and TimmWrapperModel)"


def refuse_unusual_vit(vit: Any, target: str) -> None:
    """Raises InputError unless a model is the plain ViT that others have: one class token, learned or fixed positions.

    `target` is who cannot express it.
    """
    if isinstance(vit, SwinTransformer | SwinTransformerV2):
        reason: str | None = "is a Swin"
    elif type(vit) is not VisionTransformer:
        reason = "has rotary positions" if getattr(vit, "rope", None) is not None else f"is a {type(vit).__name__}"
    elif isinstance(wrap(vit, target), HybridEncoder):
        reason = "has a convolutional stem"
    else:
        block: Any = vit.blocks[0]
        odd = {
            "has register tokens": vit.reg_token is not None,
            "has no class token": vit.cls_token is None,
            "has no absolute positions": vit.pos_embed is None,
            "gives its class token no position": vit.no_embed_class,
            "has a norm before its blocks": not isinstance(vit.norm_pre, nn.Identity),
            "scales its layers (LayerScale)": not isinstance(getattr(block, "ls1", None), nn.Identity),
            "normalizes queries and keys": not isinstance(getattr(block.attn, "q_norm", None), nn.Identity),
            "has another MLP": type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity),
            "pools by attention": vit.attn_pool is not None,
            "has layer norms of several eps": eps_of(vit) is None,
        }
        reason = next((text for text, found in odd.items() if found), None)
    if reason is not None:
        way_out = WAY_OUT if target == "transformers" else "use --to timm"
        raise InputError(f"{target} has no such model: this one {reason}; {way_out}")


def refuse_unusual_autoencoder(autoencoder: MaskedAutoencoder, target: str) -> None:
    """Raises InputError unless an autoencoder is MAE's: a plain ViT and decoder, pixels to predict, square images."""
    encoder = autoencoder.encoder
    refuse_unusual_vit(encoder.timm, target)
    odd = {
        "a decoder of another kind than transformer": not isinstance(autoencoder.decoder, TransformerDecoder),
        "mask tokens in the encoder": autoencoder.mask_token is not None,
        "a target other than pixels or norm_pix": type(autoencoder.target) not in (PixelTarget, NormPixTarget),
        "images that are not square": encoder.grid[0] != encoder.grid[1],
    }
    if reason := next((text for text, found in odd.items() if found), None):
        raise InputError(f"{target} has no autoencoder with {reason}: use --part encoder")


def eps_of(model: nn.Module) -> float | None:
    """Returns the eps of a model's layer norms, None if they differ."""
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    return found.pop() if len(found) == 1 else None


def with_positions(autoencoder: MaskedAutoencoder) -> dict[str, Tensor]:
    """Returns the state dict of an autoencoder with the decoder's fixed positions, which others save."""
    positions: Any = autoencoder.decoder.pos_embed
    return {**autoencoder.state_dict(), "decoder.pos_embed": positions}


def mae_tensors(model: Any) -> dict[str, Tensor]:
    """Returns the state dict of a ViT or a masked autoencoder as facebookresearch/mae's files have it under "model".

    MAE's encoders and classifiers have timm's names. Raises InputError, with the reason, for what MAE's code cannot
    build.
    """
    vit = model.encoder.timm if isinstance(model, MaskedAutoencoder) else model
    refuse_unusual_vit(vit, "facebookresearch/mae")
    odd = {
        "images that are not square": len(set(vit.patch_embed.img_size)) > 1,
        f"layer norms of eps {eps_of(vit)} (it has 1e-6)": eps_of(model) != 1e-6,
        "queries, keys and values without bias": vit.blocks[0].attn.qkv.bias is None,
        f"the activation {vit.blocks[0].mlp.act}": type(vit.blocks[0].mlp.act) is not nn.GELU,
        "a mean of patches without a norm": bool(vit.num_classes)
        and vit.global_pool == "avg"
        and isinstance(vit.fc_norm, nn.Identity),
    }
    if reason := next((text for text, found in odd.items() if found), None):
        raise InputError(f"facebookresearch/mae has no ViT with {reason}; use --to timm")
    if not isinstance(model, MaskedAutoencoder):
        return model.state_dict()
    refuse_unusual_autoencoder(model, "facebookresearch/mae")
    if vit.patch_embed.proj.in_channels != 3:
        raise InputError("facebookresearch/mae has decoders of color images only: use --part encoder")
    return MAE.to_theirs(with_positions(model))
