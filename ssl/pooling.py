"""From an encoder's tokens to features of a whole image."""

from typing import Any

import torch
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from .encoder import Encoder

Features = dict[str, Tensor]  # float32 [images, D] by name: "avg" of the patch tokens, "token" the class token, ...
LAST = 4  # layers that `pooled_layers` looks at


def pooled(tokens: Float[Tensor, "B PN D"], encoder: Encoder) -> Features:
    """Returns the average of the patch tokens and, where there is one, the class token, in float32."""
    features = {"avg": tokens[:, encoder.num_prefix_tokens :].float().mean(dim=1)}
    if getattr(encoder.timm, "cls_token", None) is not None:
        features["token"] = tokens[:, 0].to(torch.float32, copy=True)  # a view would keep all tokens in memory
    return features


def pooled_layers(encoder: Encoder, images: Float[Tensor, "B C H W"]) -> Features:
    """Returns `pooled(encoder(images), encoder)`, and as "last2", "last3" and "last4" features of earlier layers.

    Of a ViT these are the class tokens (without one: the averages) that leave the blocks before the last, each behind
    the final norm, as DINOv2's `get_intermediate_layers` gives them. Of a Swin they are the averages that leave the
    earlier stages, 1/2, 1/4 and 1/8 as wide: its last stage has two blocks only, and its norm fits no other stage. A
    network of fewer layers gives fewer of them.
    """
    model: Any = encoder.timm
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        count = min(LAST, len(model.layers))
        maps: Any = model.forward_intermediates(images, count, norm=True, intermediates_only=True)
        layers = [pooled(x.flatten(2).transpose(1, 2), encoder) for x in maps]  # of [B, D, h, w]
    else:
        prefixed = encoder.num_prefix_tokens > 0
        found: Any = model.forward_intermediates(
            images, min(LAST, len(model.blocks)), return_prefix_tokens=prefixed, norm=True, output_fmt="NLC",
            intermediates_only=True,
        )  # fmt: skip
        layers = [pooled(torch.cat([x[1], x[0]], dim=1) if prefixed else x, encoder) for x in found]
    last = layers.pop()
    kind = "token" if "token" in last else "avg"
    return last | {f"last{i}": layer[kind] for i, layer in enumerate(reversed(layers), start=2)}
