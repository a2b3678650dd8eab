"""Confusion matrices, tables and pictures against scikit-learn's."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix as by_sklearn
from sklearn.metrics import precision_score, recall_score

from quarterlight.finetune.confusion import confusion_matrix, named_classes, write_evaluation
from quarterlight.finetune.evaluate import Outcomes


def judged(classes: int, images: int, *, missing: int | None = None) -> Outcomes:
    """Images of random labels, 60 % right; without any of the class `missing`."""
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, images)
    if missing is not None:
        labels[labels == missing] = (missing + 1) % classes
    predicted = np.where(random.random(images) < 0.6, labels, random.integers(0, classes, images))
    return Outcomes(labels, predicted, labels == predicted, np.ones(images, np.float32), np.zeros(images))


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


NAMES = ["cat, tabby", 'the "dog"', "bird", "ガラス", "$x_1$"]  # what is awkward in tables and pictures


def test_the_matrix_is_scikit_learns():
    for classes, images in ((2, 9), (5, 100), (50, 2000)):
        outcomes = judged(classes, images)
        wanted = by_sklearn(outcomes.labels, outcomes.predicted, labels=range(classes))
        assert np.array_equal(confusion_matrix(outcomes, classes), wanted)
        for block in (b for b in (2, 3) if b < classes):  # of one block alone scikit-learn warns
            of_blocks = by_sklearn(
                outcomes.labels // block, outcomes.predicted // block, labels=range(-(-classes // block))
            )
            assert np.array_equal(confusion_matrix(outcomes, classes, block=block), of_blocks)


def test_tables_hold_the_matrix_and_each_class_with_its_name(tmp_path: Path):
    outcomes = judged(5, 100, missing=2)
    write_evaluation(tmp_path, outcomes, NAMES)
    matrix = table(tmp_path / "confusion.csv")
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] == NAMES
    wanted = by_sklearn(outcomes.labels, outcomes.predicted, labels=range(5))
    assert np.array_equal(np.array([row[1:] for row in matrix[1:]], int), wanted)
    header, *rows = table(tmp_path / "per_class.csv")
    assert header == ["label", "class", "images", "top1", "predictions", "precision"]
    assert [row[1] for row in rows] == NAMES and [row[0] for row in rows] == list("01234")
    assert rows[2][2:4] == ["0", ""]  # no image, no accuracy
    of_classes = {"labels": range(5), "average": None, "zero_division": 0}
    recall = recall_score(outcomes.labels, outcomes.predicted, **of_classes)
    precision = precision_score(outcomes.labels, outcomes.predicted, **of_classes)
    for label, row in enumerate(rows):
        assert float(row[3] or 0) == pytest.approx(100 * recall[label], abs=1e-4)
        assert float(row[5] or 0) == pytest.approx(100 * precision[label], abs=1e-4)
        assert int(row[2]) == wanted[label].sum() and int(row[4]) == wanted[:, label].sum()


@pytest.mark.parametrize("classes", [1, 10, 250])
def test_a_picture_is_drawn_for_few_classes_and_for_many(tmp_path: Path, classes: int):
    write_evaluation(tmp_path, judged(classes, 500), (NAMES * 50)[:classes], which="_ema")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{x}_ema.{y}" for x, y in (("confusion", "csv"), ("confusion", "png"), ("per_class", "csv"))
    }
    picture = Image.open(tmp_path / "confusion_ema.png")
    assert min(picture.size) > 400 and max(picture.size) < 3000
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_classes_without_names_have_numbers():
    assert named_classes(None, 3) == ["0", "1", "2"]
    assert named_classes(["a"], 2) == ["0", "1"]
    assert named_classes(["a", "b"], 2) == ["a", "b"]


def test_more_classes_than_a_table_holds_leave_those_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quarterlight.finetune.confusion.MOST_CLASSES", 4)
    write_evaluation(tmp_path, judged(5, 50), NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"per_class.csv", "confusion.png"}
