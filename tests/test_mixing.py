"""Mixup, cutmix, smoothing and erasing against cross-entropies written out by hand."""

import random

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.finetune.config import MixingConfig
from quarterlight.finetune.mixing import MixedLoss, class_weights_for
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


GIVEN = torch.randn(6, 4, generator=torch.Generator().manual_seed(5)) * 2
SKEWED = torch.tensor([0, 1, 2, 3, 0, 0])


class Fixed(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return GIVEN


def weighted(weights: list[float], **mixing: float) -> tuple[float, MixedLoss]:
    given = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "random_erasing": 0.0} | mixing
    loss = MixedLoss(MixingConfig(**given), num_classes=4, batch_size=6, class_weights=torch.tensor(weights))
    np.random.seed(3)
    torch.manual_seed(3)
    return float(loss(Fixed(), torch.rand(6, 3, 8, 8), SKEWED)), loss


WEIGHTS = [0.5, 4.0, 1.0, 2.0]


def test_weights_without_soft_labels_are_torchs():
    found, loss = weighted(WEIGHTS)
    total = nn.functional.cross_entropy(GIVEN, SKEWED, weight=torch.tensor(WEIGHTS), reduction="sum")
    assert found == pytest.approx(float(total) / 6, rel=1e-6)  # over images, so that micro-batches add up
    assert not loss.state_dict()  # a state of a run stays what it was


@pytest.mark.parametrize("mixing", [{}, {"label_smoothing": 0.1}, {"mixup": 0.8}, {"mixup": 0.8, "cutmix": 1.0}])
def test_weights_of_one_change_nothing(mixing: dict[str, float]):
    mixing = {"label_smoothing": 0.2} | mixing
    plain = MixedLoss(
        MixingConfig(**{"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0} | mixing), num_classes=4, batch_size=6
    )
    np.random.seed(3)
    torch.manual_seed(3)
    wanted = float(plain(Fixed(), torch.rand(6, 3, 8, 8), SKEWED))
    assert weighted([1.0] * 4, **mixing)[0] == pytest.approx(wanted, rel=1e-5)


def test_a_mixed_image_weighs_what_its_two_labels_do_in_their_shares():
    found, loss = weighted(WEIGHTS, mixup=0.8, label_smoothing=0.1)
    np.random.seed(3)
    lam = loss.mixup._params_per_batch()[0]
    total = 0.0
    for i in range(6):
        mix = np.zeros(4)
        mix[SKEWED[i]] += lam
        mix[SKEWED[5 - i]] += 1 - lam
        soft = mix * 0.9 + 0.1 / 4
        log_p = GIVEN[i].double().log_softmax(0).numpy()
        total += float(mix @ WEIGHTS) * float(-(soft * log_p).sum())
    assert found == pytest.approx(total / 6, rel=1e-5)


def test_balanced_weights_are_scikit_learns():
    labels = np.repeat([0, 1, 3], [6, 30, 2])
    found = class_weights_for("balanced", labels, 5).numpy()
    wanted = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(found[[0, 1, 3]], wanted, rtol=1e-6)
    assert (found[[2, 4]] == 0).all()  # which no image has
    assert found[labels].mean() == pytest.approx(1)


def test_given_weights_keep_their_ratios_and_a_mean_of_one():
    labels = np.repeat([0, 1], [3, 1])
    found = class_weights_for([1.0, 5.0], labels, 2).numpy()
    assert found[1] / found[0] == pytest.approx(5) and found[labels].mean() == pytest.approx(1)
    assert class_weights_for(None, labels, 2) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [([1.0], "has 1 numbers for 2 classes"), ([1.0, -1.0], "not below 0"), ([1.0, float("nan")], "finite"),
     ([0.0, 0.0], "is 0 for every class")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(given: list[float], said: str):
    with pytest.raises(InputError, match=said):
        class_weights_for(given, np.array([0, 1]), 2)
