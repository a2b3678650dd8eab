"""timm's vision transformers with rotary positions (its Eva class) as encoders of visible patches."""

from typing import Any

from jaxtyping import Float
from timm.layers import apply_keep_indices_nlc
from torch import Tensor

from .masking import Masking
from .vit import ViTEncoder


class RotaryEncoder(ViTEncoder):
    """A timm Eva model, such as vit_*_rope_* and eva02_*, that can run on the kept patches only.

    Each kept patch keeps the rotation of its own place, as timm's patch dropout does it.
    """

    @property
    def no_weight_decay(self) -> set[str]:
        """The positions, and rotations where they are learned."""
        return super().no_weight_decay | {name for name in self.timm.no_weight_decay() if name.startswith("rope.")}

    def _encode(self, x: Float[Tensor, "B *hw D"], masking: Masking | None) -> Float[Tensor, "B PK D"]:
        eva: Any = self.timm
        x, rope = eva._pos_embed(x)
        per_block = rope is not None and bool(eva.rope_mixed)
        if masking is not None:
            x = self._kept(x, masking)
            if rope is not None:
                rope = apply_keep_indices_nlc(x, rope, masking.ids_keep)
                rope = rope.transpose(0, 1) if per_block else rope.unsqueeze(1)  # an axis for heads, as blocks expect
        x = eva.norm_pre(x)
        ropes: Any = rope if per_block else [rope] * len(eva.blocks)
        for block, its_rope in zip(eva.blocks, ropes, strict=True):
            x = block(x, rope=its_rope)
        return eva.norm(x)
