"""timm's hybrid vision transformers (a convolutional stem, then a plain transformer) as encoders of visible patches."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import HybridEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .errors import InputError
from .masking import Masking
from .vit import ViTEncoder


class HybridEncoder(ViTEncoder):
    """A timm VisionTransformer on the feature map of a stem (ViT paper, Dosovitskiy et al. 2021, section 3.1).

    Convolutions mix neighboring patches, so hidden pixels are set to zero (the mean color of normalized images) before
    the stem, and their tokens dropped after it: nothing of them reaches the output, but the stem runs on whole images,
    and next to hidden patches it sees edges that the image does not have.
    """

    def _unit_sides(self, vit: VisionTransformer | Eva) -> tuple[int, int]:
        if not isinstance(vit.patch_embed, HybridEmbed):
            raise InputError(f"its stem ({type(vit.patch_embed).__name__}) is not supported")
        stem: Any = vit.patch_embed
        # timm's own figure is off where the stride does not divide the image; 64 pixels every stem divides.
        probe = copy.deepcopy(stem.backbone).eval()
        with torch.no_grad():
            maps = probe(torch.zeros(1, stem.in_chans, 64, 64, dtype=next(probe.parameters()).dtype))
        maps = maps[-1] if isinstance(maps, list | tuple) else maps
        return 64 // maps.shape[2] * stem.patch_size[0], 64 // maps.shape[3] * stem.patch_size[1]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        masking: Masking | None = None,
        mask_token: Float[Tensor, " T"] | None = None,
    ) -> Float[Tensor, "B PK D"]:
        """Returns prefix tokens, then patch tokens: the kept ones in the order of `ids_keep`, or all in grid order."""
        self._check_size(images, masking)
        if masking is not None:
            hidden = masking.is_masked.view(-1, 1, *self.grid)
            hidden = hidden.repeat_interleave(self.unit_size, 2).repeat_interleave(self.unit_size, 3)
            images = images.masked_fill(hidden, 0.0)
        return super().forward(images, masking, mask_token)


def has_batch_norm(model: nn.Module) -> bool:
    """Returns whether the model normalizes over batches, so that its running statistics are those of its inputs."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def with_statistics_of(model: nn.Module, batches: Iterable[Float[Tensor, "B C H W"]]) -> nn.Module:
    """Returns a copy of a hybrid model whose batch-norm statistics are the averages over `batches` of whole images.

    During pretraining they are those of images that are mostly hidden, which later stages never see.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        update_bn(batches, model.get_submodule("patch_embed.backbone"))
    return model
