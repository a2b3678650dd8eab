"""Mixup, cutmix, label smoothing and random erasing, by timm, and the loss that goes with them."""

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

    def __init__(self, config: MixingConfig, *, num_classes: int, batch_size: int) -> None:
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

    def forward(
        self, classifier: nn.Module, images: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Returns the mean cross-entropy against smoothed, mixed labels."""
        if self.probability > 0:
            images = RandomErasing(self.probability, mode="pixel", device=images.device.type)(images)
        targets: Tensor = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        return self.loss(classifier(images).float(), targets)
