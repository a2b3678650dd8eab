"""Accuracy over a set of images, every image counted exactly once however many processes share the work."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import accuracy
from torch import nn

from quarterlight.ssl.batches import BadSample, Batch, refuse_bad


@torch.no_grad()
def evaluate(classifier: nn.Module, loader: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Returns top1 and top5 in percent, the mean cross-entropy `loss`, and `images`, the number counted.

    `classifier` takes uint8 images [B, H, W, C]; `loader` gives this process its own part (`loader.EvalSpans`).
    Raises InputError, on every process, when an image cannot be read.
    """
    was_training = classifier.training
    classifier.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    bad: list[BadSample] = []
    for batch in loader:
        bad += batch.bad
        with accelerator.autocast():
            logits = classifier(batch.images.to(accelerator.device, non_blocking=True)).float()
        labels = batch.labels.to(accelerator.device)
        count = len(labels)
        top = [float(x) * count for x in accuracy(logits, labels, topk=(1, min(5, logits.shape[1])))]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.tensor([*top, float(loss), count], dtype=torch.float64)
    classifier.train(was_training)
    refuse_bad(gather_object(bad))
    total: Any = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
    top1, top5, loss, images = total.tolist()
    return {"top1": top1 / images, "top5": top5 / images, "loss": loss / images, "images": int(images)}
