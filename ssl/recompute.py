"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): blocks compute anew in the backward pass.

Only the inputs of a block are then kept from the forward pass, for about a third more work.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(module: nn.Module) -> None:
    """Makes every transformer block in `module` compute its activations anew in the backward pass.

    For a `MaskedAutoencoder` as for a timm classifier. Outputs and gradients stay the same, random draws included, and
    so do the keys of the state dict. A second call changes nothing.
    """
    for block in transformer_blocks(module):
        if not getattr(block, "recomputed", False):
            block.recomputed = True  # for code that runs the parts of a block itself: see `runner`
            # On the instance, not a wrapping module: keys and the block's class stay what they are.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def runner(block: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, which does the work of `block`, computing anew in the backward pass if the block does."""
    return partial(checkpoint, function, use_reentrant=False) if getattr(block, "recomputed", False) else function


def transformer_blocks(module: nn.Module) -> list[Any]:
    """Returns the blocks of every transformer in `module`; none of a convolutional stem.

    Stems call their parts blocks too, but batch norms would count every batch twice.
    """
    return [
        child
        for name, blocks in module.named_modules()
        if name.rpartition(".")[2] == "blocks" and "patch_embed" not in name.split(".")
        for child in blocks.children()
    ]
