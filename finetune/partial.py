"""Partial fine-tuning: only the last blocks learn."""

from typing import Any

from torch import nn

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.recompute import transformer_blocks

BEHIND = ("norm", "attn_pool", "fc_norm", "head_drop", "head")  # what timm's classifiers have behind their blocks
OF_THE_MLP = ("norm2", "mlp", "ls2", "drop_path2")  # of a block


def freeze(classifier: Any, trainable_blocks: float | int | None) -> str:
    """Freezes a timm classifier but for its last blocks, the final norm and the head. Returns a sentence on it.

    As in MAE's partial fine-tuning (He et al. 2022, figure 9): 0 is the head alone, 0.5 adds the MLP of the last block
    (with the norm before it), 1 its attention, 1.5 the MLP of the block below, and all blocks are everything, the
    embeddings too. A Swin's blocks count through all stages, and a merging of patches learns with the block before it:
    all that lies above the lowest trained block learns.

    Frozen parts need no gradient from the input on, so they have no backward pass and no state in the optimizer. They
    are in evaluation mode (the paper does not say): no drop path, dropout or running statistics. To call `train` on the
    whole would undo that; `evaluate` puts each part back as it was.

    Raises InputError for a number that is no multiple of a half or more than there are blocks.
    """
    if trainable_blocks is None:
        return ""
    blocks = transformer_blocks(classifier)
    if trainable_blocks * 2 % 1:
        raise InputError(f"trainable_blocks is {trainable_blocks:g}: give a multiple of 0.5")
    if trainable_blocks > len(blocks):
        raise InputError(
            f"trainable_blocks is {trainable_blocks:g}, and the encoder has {len(blocks)} blocks: give at most "
            "that, or null for everything"
        )
    first = len(blocks) - int(trainable_blocks)  # the lowest block that learns as a whole
    if first > 0:
        learning = _learning(classifier, blocks, first, half=trainable_blocks % 1 > 0)
        classifier.eval().requires_grad_(False)
        for part in learning:
            part.requires_grad_(True)
            if isinstance(part, nn.Module):
                part.train()
    total, trained = (sum(p.numel() for p in classifier.parameters() if p.requires_grad or every) for every in (1, 0))
    share = f"{trained:,} of {total:,} parameters"
    return f"training the last {trainable_blocks:g} of {len(blocks)} blocks and what is behind them: {share}"


def _learning(classifier: nn.Module, blocks: list[Any], first: int, *, half: bool) -> list[Any]:
    """Returns the modules and parameters that learn."""
    found = [child for name, child in classifier.named_children() if name in BEHIND]
    found += blocks[first:]
    stages: Any = getattr(classifier, "layers", ())  # a Swin's
    for below, above in zip(stages, stages[1:], strict=False):
        if any(below.blocks[-1] is block for block in blocks[first - half :]):
            found.append(above.downsample)
    if half:
        lower = blocks[first - 1]
        if not hasattr(lower, "mlp"):
            raise InputError(f"trainable_blocks: a {type(lower).__name__} has no MLP of its own: give a whole number")
        found += [getattr(lower, name) for name in OF_THE_MLP if hasattr(lower, name)]
        found += [lower.gamma_2] if isinstance(getattr(lower, "gamma_2", None), nn.Parameter) else []  # a scale
    return found
