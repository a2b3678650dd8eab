"""Weights of two bytes, and what they cost."""

import copy
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import InputError
from .mae import MaskedAutoencoder

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def in_half(model: nn.Module, half: Literal["fp16", "bf16"]) -> nn.Module:
    """Returns a copy of a model with weights of two bytes.

    Raises InputError for weights beyond fp16's largest number.
    """
    dtype = HALVES[half]
    largest = torch.finfo(dtype).max
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.abs().max() > largest:
            raise InputError(
                f"half fp16: {name} holds {float(tensor.abs().max()):.3g}, and fp16 ends at 65504: use bf16"
            )
    return copy.deepcopy(model).to(dtype)


@torch.no_grad()
def half_error(
    model: nn.Module, halved: nn.Module, images: Float[Tensor, "B C H W"], *, computed_in_half: bool
) -> float:
    """Returns how far the outputs move: the norm of the difference / the norm of the outputs in float32.

    Of a model that is loaded into float32, as timm and MAE do it, or of one that also computes in half.
    """
    if computed_in_half:
        found = _outputs(halved, images.to(next(halved.parameters()).dtype)).float()
    else:
        found = _outputs(copy.deepcopy(halved).float(), images)
    wanted = _outputs(model, images)
    return float((found - wanted).norm() / wanted.norm())


def _outputs(model: Any, images: Float[Tensor, "B C H W"]) -> Tensor:
    if isinstance(model, MaskedAutoencoder):
        return model(images, model.encoder.sample_masking(len(images), 0.75)).prediction
    return model(images) if model.num_classes else model.forward_features(images)
