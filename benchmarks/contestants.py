"""What the benchmarks compare: our autoencoders in their modes, transformers' and dense timm models."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from models import MASK_RATIO, MODELS, SIMMIM_MASK_RATIO, Model, Swin, Vit, decoder_config, num_units
from torch import Tensor, nn

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import build_autoencoder
from quarterlight.ssl.masking import random_masking


class Contestant(NamedTuple):
    """Masks are drawn outside of what is timed, since in a real run the loader's workers draw them."""

    model: nn.Module
    draw: Callable[[int, int], Any]  # (batch, seed) to masks
    loss: Callable[[Tensor, Any], Tensor]  # of (normalized images, masks)


def autoencoder(model: Model, mask_ratio: float = MASK_RATIO, **args: Any) -> Contestant:
    """Returns our autoencoder, with `args` of `build_autoencoder`."""
    given = {"img_size": model.side, "decoder": decoder_config(model)} | model.timm_args | args
    network = build_autoencoder(model.timm_name, **given)
    # Where mask tokens are encoded, the trainer does not lay out windows either.
    sampler = network.encoder.mask_sampler(mask_ratio, encode_masked=network.mask_token is not None)
    return Contestant(
        network,
        lambda batch, seed: sampler.sample(seed, np.arange(batch)),
        lambda images, masking: network(images, masking, only_scored=True).loss,
    )


def ours_cross(model: Model) -> Contestant:
    """Returns ours with the cross decoder on a third of the hidden units."""
    return autoencoder(model, decoder=decoder_config(model, "cross"), pred_share=1 / 3)


def ours_simmim(model: Model) -> Contestant:
    """Returns ours in SimMIM's way: all tokens, mask tokens among them, and a linear decoder."""
    return autoencoder(
        model, SIMMIM_MASK_RATIO, encode_masked=True, decoder=DecoderConfig(name="linear"), target="pixels", loss="l1"
    )


def transformers_model(model: Model, attention: str = "sdpa") -> Contestant:
    """Returns ViTMAEForPreTraining or SwinForMaskedImageModeling of this size."""
    return hf_vit_mae(model, attention) if isinstance(model, Vit) else hf_swin(model, attention)


def hf_vit_mae(vit: Vit, attention: str) -> Contestant:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, depth, heads = vit.decoder
    config = ViTMAEConfig(
        image_size=vit.side,
        patch_size=vit.patch,
        hidden_size=vit.width,
        intermediate_size=4 * vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.heads,
        decoder_hidden_size=width,
        decoder_intermediate_size=4 * width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        attn_implementation=attention,
    )
    network = ViTMAEForPreTraining(config)

    def draw(batch: int, seed: int) -> Tensor:
        return torch.rand(batch, num_units(vit), generator=torch.Generator().manual_seed(seed))

    return Contestant(network, draw, lambda images, noise: network(images, noise=noise).loss)


def hf_swin(swin: Swin, attention: str) -> Contestant:
    from transformers import SwinConfig, SwinForMaskedImageModeling

    config = SwinConfig(
        image_size=swin.side,
        window_size=swin.window,
        embed_dim=swin.width,
        depths=list(swin.depths),
        num_heads=list(swin.heads),
        encoder_stride=swin.unit,
        drop_path_rate=0.0,
        attn_implementation=attention,
    )
    network = SwinForMaskedImageModeling(config)
    side, patches = swin.side // swin.unit, swin.unit // 4  # units of an image, patches of a unit, along a side

    def draw(batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        units = random_masking(batch, side**2, SIMMIM_MASK_RATIO, generator=generator).is_masked.view(-1, side, side)
        return units.repeat_interleave(patches, 1).repeat_interleave(patches, 2).flatten(1)

    return Contestant(network, draw, lambda images, masked: network(images, bool_masked_pos=masked).loss)


def timm_dense(model: Model) -> Contestant:
    """Returns timm's model on all tokens, which predicts nothing."""
    args = model.timm_args | {"img_size": model.side}
    network = timm.create_model(model.timm_name, num_classes=0, drop_path_rate=0.0, **args)

    def loss(images: Tensor, _: Tensor) -> Tensor:
        return network.forward_features(images).float().abs().mean()

    return Contestant(network, lambda batch, seed: torch.empty(0), loss)


BUILDERS: dict[str, Callable[..., Contestant]] = {  # by the names that flops.forward_flops knows
    "ours": autoencoder,
    "cross": ours_cross,
    "simmim": ours_simmim,
    "hf": transformers_model,
    "dense": timm_dense,
}


def builder(name: str, contestant: str, **args: Any) -> Callable[[], Contestant]:
    """Returns how to build a contestant of the model `name`."""
    return partial(BUILDERS[contestant], MODELS[name], **args)
