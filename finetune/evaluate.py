"""What a classifier makes of a set of images, each counted exactly once however many processes share the work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from quarterlight.ssl.augment import CenterCrop
from quarterlight.ssl.batches import BadSample, Batch, refuse_bad
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.loader import Loader, build_loader
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.spans import EvalSpans
from quarterlight.ssl.stage import Opened

CALIBRATION_BINS = 15


def loader_of_all(
    opened: Opened, index: ShardIndex, crop: CenterCrop, batch_size: int, *, persistent: bool = False
) -> Loader:
    """Returns a loader of this process's part of all images in `index`, `batch_size` at a time, in file order."""
    accelerator, workers = opened.accelerator, opened.config.num_workers
    samples = opened.samples(index, FileOrder(np.arange(len(index))), crop)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    spans = EvalSpans(len(index), batch_size=batch_size, rank=rank, world_size=world_size)
    return build_loader(samples, spans, num_workers=workers, persistent=persistent, fetching=opened.fetching)


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of each image, in the order of the files; the same on every process."""

    labels: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]  # the class with the largest logit
    in_top5: Bool[np.ndarray, " n"]  # whether the label is among the five largest, or all where there are fewer
    confidence: Float[np.ndarray, " n"]  # softmax probability of the predicted class
    loss: Float[np.ndarray, " n"]  # cross-entropy

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Where the prediction is the label."""
        return self.predicted == self.labels

    def figures(self) -> dict[str, float]:
        """Returns top1 and top5, the mean cross-entropy `loss`, `images`, mean_class_top1 and ece_pct.

        All but loss and images are in percent. `mean_class_top1` is the mean over the classes that occur of the top-1
        of each (scikit-learn's balanced_accuracy_score): what to look at where classes differ in size.
        """
        count = np.bincount(self.labels)
        per_class = np.bincount(self.labels, weights=self.correct, minlength=len(count))
        return {
            "top1": 100 * float(self.correct.mean()),
            "top5": 100 * float(self.in_top5.mean()),
            "loss": float(self.loss.mean()),
            "images": len(self.labels),
            "mean_class_top1": 100 * float((per_class[count > 0] / count[count > 0]).mean()),
            "ece_pct": 100 * calibration_error(self.confidence, self.correct),
        }


def calibration_error(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> float:
    """Returns the expected calibration error, 0 to 1, over 15 bins of equal width (Guo et al. 2017, equation 3).

    Images are put into bins (0, 1/15], (1/15, 2/15], ... by the probability of the predicted class; the error is the
    mean over images of |share correct - mean probability| of their bin.
    """
    numbers = np.ceil(confidence.astype(np.float64) * CALIBRATION_BINS) - 1
    bins = np.nan_to_num(numbers).clip(0, CALIBRATION_BINS - 1).astype(np.int64)
    gaps = np.bincount(bins, weights=correct.astype(np.float64) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def evaluate(classifier: nn.Module, loader: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Returns the figures (`Outcomes.figures`) of one classifier; see `outcomes`."""
    return outcomes([classifier], loader, accelerator)[0].figures()


@torch.no_grad()
def outcomes(classifiers: Sequence[nn.Module], loader: Iterable[Batch], accelerator: Accelerator) -> list[Outcomes]:
    """Returns what each classifier makes of all images, which are read once; all processes must call it.

    A classifier takes uint8 images [B, H, W, C] and returns logits; `loader` gives this process its own part
    (`spans.EvalSpans`). Nothing waits for the device before the end. Raises InputError, on every process, when an image
    cannot be read.
    """
    training = [module for classifier in classifiers for module in classifier.modules() if module.training]
    for classifier in classifiers:
        classifier.eval()
    labels, bad = [torch.empty(0, dtype=torch.int64)], list[BadSample]()
    judged = [[torch.empty(0, 4, device=accelerator.device)] for _ in classifiers]
    for batch in loader:
        bad += batch.bad
        images, wanted = (x.to(accelerator.device, non_blocking=True) for x in (batch.images, batch.labels))
        for classifier, found in zip(classifiers, judged, strict=True):
            with accelerator.autocast():
                logits = classifier(images)
            found.append(judge(logits.float(), wanted))
        labels.append(batch.labels)
    for module in training:  # one by one: parts may have been in evaluation mode before
        module.training = True
    refuse_bad(gather_object(bad))
    mine = [torch.cat(labels).numpy(), *(torch.cat(found).cpu().numpy() for found in judged)]
    parts: Any = gather_object([mine])  # a rank reads a stretch of the files: in the order of ranks they are in order
    all_labels, *all_judged = (np.concatenate(part) for part in zip(*parts, strict=True))
    return [
        Outcomes(all_labels, x[:, 0].astype(np.int64), x[:, 1] > 0, x[:, 2].copy(), x[:, 3].astype(np.float64))
        for x in all_judged
    ]


def judge(logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B 4"]:
    """Returns for each image the predicted class, whether the label is in the top 5, the confidence, and the loss."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    confidence = logits.softmax(dim=1).amax(dim=1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    in_top5 = (top == labels[:, None]).any(dim=1)
    return torch.stack([top[:, 0].float(), in_top5.float(), confidence, loss], dim=1)
