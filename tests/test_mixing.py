"""Mixup, cutmix, smoothing and erasing against cross-entropies written out by hand."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.finetune.config import MixingConfig
from quarterlight.finetune.mixing import MixedLoss
from quarterlight.ssl.errors import InputError

CLASSES, BATCH, SIDE = 5, 4, 16
LABELS = torch.tensor([0, 3, 1, 4])


class Watched(nn.Module):
    """A linear classifier that keeps the images it was last given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * SIDE * SIDE, CLASSES)
        self.seen = torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images.detach().clone()
        return self.head(images.flatten(1))


def config(**given: float) -> MixingConfig:
    return MixingConfig(**({"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "random_erasing": 0.0} | given))


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def flat_images() -> Tensor:
    """Images of one color each: image i is i + 1 everywhere."""
    return torch.arange(1.0, BATCH + 1)[:, None, None, None].expand(BATCH, 3, SIDE, SIDE).clone()


def mixed(given: MixingConfig, at: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, the images that the classifier saw, and its logits on them, under seed `at`."""
    classifier, loss = Watched(), MixedLoss(given, num_classes=CLASSES, batch_size=BATCH)
    seed(at)
    found = loss(classifier, flat_images(), LABELS.clone())
    images = classifier.seen
    return found, images, classifier(images)


def soft_cross_entropy(logits: Tensor, share: float, smoothing: float) -> Tensor:
    """Mean cross-entropy against `share` of the own label and the rest of that of the mirror image."""
    smooth = F.one_hot(LABELS, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    targets = share * smooth + (1 - share) * smooth.flip(0)
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_torchs_cross_entropy(smoothing: float):
    found, images, logits = mixed(config(label_smoothing=smoothing), 0)
    assert torch.equal(images, flat_images())
    expected = F.cross_entropy(logits, LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at", range(5))
def test_mixup_mixes_labels_in_the_proportion_of_the_images(at: int, smoothing: float):
    found, images, logits = mixed(config(mixup=0.8, label_smoothing=smoothing), at)
    own, mirrored = 1.0, float(BATCH)
    share = (float(images[0, 0, 0, 0]) - mirrored) / (own - mirrored)
    assert 0 <= share <= 1
    expected_images = share * flat_images() + (1 - share) * flat_images().flip(0)
    torch.testing.assert_close(images, expected_images, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, soft_cross_entropy(logits, share, smoothing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at", range(5))
def test_cutmix_mixes_labels_in_the_proportion_of_the_areas(at: int, smoothing: float):
    found, images, logits = mixed(config(cutmix=1.0, label_smoothing=smoothing), at)
    is_own = images == flat_images()
    assert torch.equal(images, torch.where(is_own, flat_images(), flat_images().flip(0)))
    share = float(is_own[0].float().mean())
    torch.testing.assert_close(found, soft_cross_entropy(logits, share, smoothing), rtol=0, atol=1e-5)


def test_mixup_and_cutmix_take_turns():
    whole, cut = 0, 0
    for at in range(20):
        _, images, _ = mixed(config(mixup=0.8, cutmix=1.0), at)
        values = images[0].unique()
        cut += len(values) == 2
        whole += len(values) == 1 and float(values[0]) not in (1.0, 4.0)
    assert whole >= 4
    assert cut >= 4


def test_mixing_changes_from_seed_to_seed_and_repeats_with_one():
    given = MixingConfig()
    losses = [mixed(given, at)[0].item() for at in (0, 1, 2, 0)]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_erasing_replaces_a_rectangle_of_every_image_at_probability_1():
    _, images, logits = mixed(config(random_erasing=1.0), 0)
    is_erased = images[:, 0] != flat_images()[:, 0]
    for mask in is_erased:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        assert 0 < int(mask.sum()) < mask.numel()
        assert bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def test_erasing_leaves_labels_alone():
    found, _, logits = mixed(config(random_erasing=1.0), 0)
    torch.testing.assert_close(found, F.cross_entropy(logits, LABELS), rtol=1e-6, atol=1e-6)


def test_erasing_hits_the_share_of_images_that_it_is_asked_for():
    classifier, loss = Watched(), MixedLoss(config(random_erasing=0.25), num_classes=CLASSES, batch_size=400)
    seed(0)
    images = torch.ones(400, 3, SIDE, SIDE)
    loss(classifier, images.clone(), torch.zeros(400, dtype=torch.long))
    hit = int((classifier.seen != images).flatten(1).any(dim=1).sum())
    assert 70 <= hit <= 130


@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_an_odd_batch_is_refused_where_images_are_paired(given: dict):
    with pytest.raises(InputError, match="even number of images.*not 7"):
        MixedLoss(config(**given), num_classes=CLASSES, batch_size=7)


def test_an_odd_batch_is_fine_where_nothing_is_mixed():
    loss = MixedLoss(config(label_smoothing=0.1), num_classes=CLASSES, batch_size=3)
    found = loss(Watched(), flat_images()[:3], LABELS[:3])
    assert found.shape == ()


def test_the_loss_reaches_the_classifiers_parameters():
    classifier = Watched()
    MixedLoss(MixingConfig(), num_classes=CLASSES, batch_size=BATCH)(classifier, flat_images(), LABELS).backward()
    assert float(classifier.head.weight.grad.abs().sum()) > 0


def test_a_half_precision_classifier_is_scored_in_float32():
    classifier, loss = Watched(), MixedLoss(MixingConfig(), num_classes=CLASSES, batch_size=BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(flat_images()).dtype == torch.bfloat16
        assert loss(classifier, flat_images(), LABELS).dtype == torch.float32
