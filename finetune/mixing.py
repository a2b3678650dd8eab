"""Mixup, cutmix, label smoothing and random erasing, by timm, and the loss that goes with them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from quarterlight.ssl.errors import InputError

from .config import MixingConfig


class MixedLoss(nn.Module):
    """Mixes a batch of normalized images and returns the classifier's loss on it.

    All of it draws from the global generators, which the engine seeds at every step. Raises InputError when mixup would
    get a batch of odd size, which timm pairs with its own mirror image and so refuses.
    """

    weights: Tensor | None

    def __init__(
        self,
        config: MixingConfig,
        *,
        num_classes: int,
        batch_size: int,
        class_weights: Float[Tensor, " C"] | None = None,
    ) -> None:
        super().__init__()
        self.mixup: Mixup | None = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(config.label_smoothing)
        if config.mixup > 0 or config.cutmix > 0:
            if batch_size % 2:
                raise InputError(
                    f"mixup and cutmix need an even number of images in a forward pass, not {batch_size}: change "
                    "batch_size or micro_batch_size, or set mixing.mixup 0 and mixing.cutmix 0"
                )
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes
            )
            self.loss = SoftTargetCrossEntropy()
        self.probability = config.random_erasing
        self.smoothing = config.label_smoothing
        self.register_buffer("weights", class_weights, persistent=False)  # follows from the options and the data

    def forward(
        self, classifier: nn.Module, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy against smoothed, mixed labels, weighted by class where that is wanted."""
        if self.probability > 0:
            images = RandomErasing(self.probability, mode="pixel", device=images.device.type)(images)
        targets: Tensor = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        logits = classifier(images).float()
        return self.loss(logits, targets) if self.weights is None else self._weighted(logits, targets, self.weights)

    def _weighted(self, logits: Float[Tensor, "B C"], targets: Tensor, weights: Tensor) -> Float[Tensor, ""]:
        """Returns the mean of the images' losses, each times its weight: that of its class, mixed as its labels are.

        Not torch's `weight`, which weighs the terms of a soft label one by one: the share of the label that smoothing
        gives to a rare class would then count as often as the class is rare, and drown the label itself. The mean is
        over images and not over weights, so that it does not depend on how a step is split among processes.
        """
        spread = self.smoothing / logits.shape[1]  # of a smoothed label to each class
        if targets.dim() == 1:
            hard = nn.functional.one_hot(targets, logits.shape[1]).to(logits)
            soft = hard * (1 - self.smoothing) + spread
        else:
            hard, soft = (targets - spread) / (1 - self.smoothing), targets
        losses = -(soft * logits.log_softmax(dim=1)).sum(dim=1)
        return (losses * (hard @ weights)).mean()


def class_weights_for(
    choice: Literal["balanced"] | Sequence[float] | None, labels: Int[np.ndarray, " n"], num_classes: int
) -> Float[Tensor, " C"] | None:
    """Returns the weight of each class, scaled so that the mean over the training images is 1; None: none is asked for.

    "balanced" are scikit-learn's: images / (classes * images of the class). Raises InputError for numbers that do not
    fit the classes.
    """
    if choice is None:
        return None
    counts = np.bincount(labels, minlength=num_classes)
    given = np.divide(1.0, counts, out=np.zeros(num_classes), where=counts > 0)
    if choice != "balanced":
        given = np.array(choice, np.float64)
        if len(given) != num_classes:
            raise InputError(f"class_weights has {len(given)} numbers for {num_classes} classes: give one each")
        if not np.isfinite(given).all() or (given < 0).any():
            raise InputError(f"class_weights is {list(choice)}: give numbers that are finite and not below 0")
    total = float(given @ counts)
    if total == 0:
        raise InputError("class_weights is 0 for every class in data.train: nothing would be learned")
    return torch.tensor(given * len(labels) / total, dtype=torch.float32)
