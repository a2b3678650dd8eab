"""Images with patches dropped or tiles shuffled, and which patches a network attends to.

After "Intriguing Properties of Vision Transformers" (Naseer et al. 2021, arXiv:2105.10497), section 3.1 and 3.3.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from timm.models.swin_transformer import window_reverse
from torch import Tensor
from torch.nn import functional as F

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.masking import Masking
from quarterlight.ssl.patches import pair
from quarterlight.ssl.randoms import hashes


def drop_ranks(scores: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Returns when each patch is dropped, 0 first: those of the highest score first, of equal ones the first."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def drop_patches(
    images: Float[Tensor, "B C H W"], is_dropped: Bool[Tensor, "B N"], patch: int, fill: Float[Tensor, " C"]
) -> Float[Tensor, "B C H W"]:
    """Returns the images with dropped patches of `patch` pixels a side in the color `fill`."""
    height, width = (side // patch for side in images.shape[2:])
    hidden = is_dropped.view(-1, 1, height, width).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(hidden, fill[:, None, None], images)


def leave_out(
    encoder: Encoder,
    classifier: Any,
    images: Float[Tensor, "B C H W"],
    is_dropped: Bool[Tensor, "B N"],
    patch: int,
    dropped: int,
) -> Float[Tensor, "B classes"]:
    """Returns the logits when the encoder sees the visible units only, as in pretraining.

    `encoder` wraps `classifier`, and patches of `patch` pixels a side consist of whole units of it; every image has
    `dropped` of them dropped (given, since to count them would wait for the device).
    """
    height, width = (side // patch for side in images.shape[2:])
    units = patch // encoder.unit_size
    is_masked = is_dropped.view(-1, height, width).repeat_interleave(units, 1).repeat_interleave(units, 2).flatten(1)
    kept = encoder.num_units - dropped * units**2
    ids = is_masked.int().argsort(dim=1, stable=True)  # visible units first, in grid order
    tokens = encoder(images, Masking(ids[:, :kept].contiguous(), ids.argsort(dim=1), is_masked))
    if hasattr(classifier, "layers"):  # a Swin pools over height and width
        tokens = tokens[:, None]
    return classifier.forward_head(tokens)


def shuffle_tiles(
    images: Float[Tensor, "B C H W"], tiles: int, *, seed: int, positions: Int[np.ndarray, " B"]
) -> Float[Tensor, "B C H W"]:
    """Returns each image with its `tiles` x `tiles` parts in a random order that its position decides.

    Differs from Naseer et al.: their code shuffles all images of a batch alike.
    """
    b, c, h, w = images.shape
    order = np.argsort(hashes(seed, f"shuffle {tiles}", positions, tiles**2), axis=1, kind="stable")
    ids = torch.from_numpy(order).to(images.device)
    high, wide = h // tiles, w // tiles
    x = (
        images.view(b, c, tiles, high, tiles, wide).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    )  # [B, tiles^2, C, high, wide]
    x = x[torch.arange(b, device=x.device)[:, None], ids].view(b, tiles, tiles, c, high, wide)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Saliency:
    """How much a network attends to each patch of an image, in its last block.

    With class-token pooling it is the attention of the class token, averaged over heads, as DINO's maps (Caron et al.
    2021); else the attention that a patch receives, averaged over heads and over all patches that attend (in a Swin:
    those of its window). Differs from Naseer et al.: they take one head of a DINO ViT-S for all models (`saliency` of
    launch/evaluate.py names one), and drop patches by their share of the attention, here by their number.
    """

    def __init__(self, encoder: Encoder, *, by_class_token: bool) -> None:
        self.encoder, self.by_class_token = encoder, by_class_token
        model = encoder.timm
        self.block: Any = model.blocks[-1] if hasattr(model, "blocks") else model.layers[-1].blocks[-1]
        self.block.attn.fused_attn = False  # the fused kernel keeps no attention

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """Returns the attention to each token of the last block's grid, in float32."""
        with self._kept() as kept:
            self.encoder.timm.forward_features(images)
        attention = kept[0].float().mean(dim=1)  # [B, L, L], or [B * windows, L, L]
        if hasattr(self.encoder.timm, "layers"):
            return self._of_windows(attention.mean(dim=1), len(images))
        prefix = self.encoder.num_prefix_tokens
        rows = attention[:, 0] if self.by_class_token else attention[:, prefix:].mean(dim=1)  # [B, L]
        return rows[:, prefix:].view(-1, *self.encoder.grid)

    def _of_windows(self, received: Float[Tensor, "BW L"], count: int) -> Float[Tensor, "B h w"]:
        size, shift = pair(self.block.window_size), pair(self.block.shift_size)
        height, width = self.encoder.grid
        grid = window_reverse(received.view(-1, *size, 1), size, height, width)  # [B, h, w, 1]
        return torch.roll(grid, shift, dims=(1, 2)).view(count, height, width)

    @contextmanager
    def _kept(self) -> Iterator[list[Tensor]]:
        """Gives a list that the attention of the last block is put into: what its dropout is given."""
        kept: list[Tensor] = []
        hook = self.block.attn.attn_drop.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            yield kept
        finally:
            hook.remove()


def on_patches(scores: Float[Tensor, "B h w"], grid: tuple[int, int]) -> Float[Tensor, "B N"]:
    """Returns scores of tokens as scores of patches: means where a patch holds several, else that of its token."""
    return F.adaptive_avg_pool2d(scores[:, None], grid).flatten(1)


def shuffle_sizes(img_size: tuple[int, int], patch: int) -> tuple[int, ...]:
    """Returns 2, 4, 8, ...: the tiles a side that tile the image, down to the size of a patch."""
    most = math.log2(max(1, min(img_size) // patch))
    return tuple(2**i for i in range(1, int(most) + 1) if not any(side % 2**i for side in img_size))
