"""Accuracy against a plain loop over the tars and scikit-learn, in one process and in two. As a script: one of two."""

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

from quarterlight.finetune import confusion
from quarterlight.finetune.evaluate import Outcomes, calibration_error, evaluate, outcomes
from quarterlight.ssl.augment import CenterCrop, Normalize
from quarterlight.ssl.batches import Samples
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index
from quarterlight.ssl.loader import Loader, build_loader
from quarterlight.ssl.order import FileOrder
from quarterlight.ssl.processes import build_accelerator
from quarterlight.ssl.spans import EvalSpans

SIDE, CLASSES = 8, 7


def write_tar(path: Path, count: int, *, bad: int | None = None) -> None:
    """Writes `count` labelled noise images; the PNG of number `bad` is cut short."""
    random = np.random.default_rng(count + 3)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(png, format="PNG")
            image = png.getvalue()[: 60 if i == bad else None]
            for extension, content in (("png", image), ("cls", str(random.integers(CLASSES)).encode())):
                member = tarfile.TarInfo(f"{i:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * SIDE * SIDE, CLASSES))
    return nn.Sequential(Normalize((0.5, 0.25, 0.75), (0.25, 0.5, 0.125)), head)


def loader_of(path: Path, accelerator: Accelerator, *, batch_size: int = 4, num_workers: int = 0) -> Loader:
    index = open_index(str(path))
    samples = Samples(index, FileOrder(np.arange(len(index))), CenterCrop((SIDE, SIDE), 1.0), 0)
    spans = EvalSpans(
        len(index), batch_size=batch_size, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    return build_loader(samples, spans, num_workers=num_workers)


def measured(path: Path, accelerator: Accelerator, **how: int) -> dict[str, float]:
    return evaluate(classifier(), loader_of(path, accelerator, **how), accelerator)


def logits_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits, one image after another, without any of the code under test but the classifier's weights."""
    head, labels, logits = classifier()[1].eval(), [], []
    with tarfile.open(path) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith(".png")):
            pixels = np.array(Image.open(io.BytesIO(tar.extractfile(name).read())), dtype=np.float64) / 255
            pixels = (pixels - [0.5, 0.25, 0.75]) / [0.25, 0.5, 0.125]
            labels.append(int(tar.extractfile(name.replace(".png", ".cls")).read()))
            logits.append(head(torch.tensor(pixels).permute(2, 0, 1)[None].float()).detach()[0].double().numpy())
    return np.array(labels), np.array(logits)


def plain_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            total += inside.sum() / len(confidence) * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def expected(path: Path) -> dict[str, float]:
    """The figures by scikit-learn."""
    labels, logits = logits_of(path)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    all_classes = np.arange(CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few labels, classes without an image
        return {
            "top1": 100 * top_k_accuracy_score(labels, p, k=1, labels=all_classes),
            "top5": 100 * top_k_accuracy_score(labels, p, k=5, labels=all_classes),
            "loss": log_loss(labels, p, labels=all_classes),
            "images": len(labels),
            "mean_class_top1": 100 * balanced_accuracy_score(labels, p.argmax(axis=1)),
            "ece_pct": 100 * plain_calibration_error(p.max(axis=1), p.argmax(axis=1) == labels),
        }


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield build_accelerator("no")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    for count in (1, 2, 21):
        write_tar(path / f"{count}.tar", count)
    write_tar(path / "bad.tar", 5, bad=4)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    """What each of two real processes measured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*launcher, __file__, str(folder)], check=True, env=environment, capture_output=True, text=True, timeout=200
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("batch_size", [1, 4, 21, 50])
def test_figures_are_those_of_a_plain_loop_for_any_batch_size(folder: Path, accelerator: Accelerator, batch_size: int):
    found = measured(folder / "21.tar", accelerator, batch_size=batch_size)
    assert found == pytest.approx(expected(folder / "21.tar"), abs=1e-5)
    assert found["images"] == 21


def test_the_test_data_tells_top1_from_top5(folder: Path):
    figures = expected(folder / "21.tar")
    assert 0 < figures["top1"] < figures["top5"] < 100


def test_loader_processes_do_not_change_the_figures(folder: Path, accelerator: Accelerator):
    assert measured(folder / "21.tar", accelerator, num_workers=2) == measured(folder / "21.tar", accelerator)


def test_with_fewer_than_five_classes_top5_is_over_all_of_them(folder: Path, accelerator: Accelerator):
    index = open_index(str(folder / "21.tar"))
    index.label %= 2
    samples = Samples(index, FileOrder(np.arange(21)), CenterCrop((SIDE, SIDE), 1.0), 0)
    loader = build_loader(samples, EvalSpans(21, batch_size=4, rank=0, world_size=1), num_workers=0)
    model = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))
    found = evaluate(model, loader, accelerator)
    assert found["top5"] == 100
    assert 0 < found["top1"] < 100


@pytest.mark.parametrize("training", [True, False])
def test_the_classifier_is_evaluated_in_eval_mode_and_put_back(folder: Path, accelerator: Accelerator, training: bool):
    index = open_index(str(folder / "2.tar"))
    samples = Samples(index, FileOrder(np.arange(2)), CenterCrop((SIDE, SIDE), 1.0), 0)
    loader = build_loader(samples, EvalSpans(2, batch_size=2, rank=0, world_size=1), num_workers=0)
    model = classifier().train(training)
    evaluate(model, loader, accelerator)
    assert all(module.training == training for module in model.modules())


def test_an_unreadable_image_is_refused_by_name(folder: Path, accelerator: Accelerator):
    with pytest.raises(InputError) as caught:
        measured(folder / "bad.tar", accelerator)
    assert str(folder / "bad.tar") in str(caught.value)
    assert "004" in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 21])
def test_two_processes_find_the_same_figures_as_one(folder: Path, ranks: list[dict], count: int):
    for found in ranks:
        assert found[str(count)] == pytest.approx(expected(folder / f"{count}.tar"), abs=1e-5)
        assert found[str(count)]["images"] == count


def test_an_unreadable_image_is_refused_on_every_process(folder: Path, ranks: list[dict]):
    for found in ranks:
        assert str(folder / "bad.tar") in found["bad"]
        assert "004" in found["bad"]


@pytest.mark.parametrize("count", [1, 2, 21])
def test_two_processes_read_every_image_once_in_the_order_of_the_files(folder: Path, ranks: list[dict], count: int):
    labels, logits = logits_of(folder / f"{count}.tar")
    keys = [key for found in ranks for key in found[f"keys {count}"]]
    assert keys == [f"{i:03d}" for i in range(count)]
    for found in ranks:
        judged = found[f"outcomes {count}"]
        assert judged["labels"] == labels.tolist() and judged["predicted"] == logits.argmax(axis=1).tolist()
        assert judged["matrix"] == confusion_matrix(labels, logits.argmax(axis=1), labels=range(CLASSES)).tolist()


def test_several_classifiers_are_judged_in_one_pass(folder: Path, accelerator: Accelerator):
    loader = loader_of(folder / "21.tar", accelerator)
    passes = []
    inside = loader.samples.batch
    loader.samples.batch = lambda *where: passes.append(where) or inside(*where)
    other = classifier()
    nn.init.zeros_(other[1][2].weight)
    first, second = outcomes([classifier(), other], loader, accelerator)
    assert len(passes) == 6  # batches of 4
    assert first.figures() == pytest.approx(measured(folder / "21.tar", accelerator))
    assert len(set(second.predicted.tolist())) == 1 and second.figures() != first.figures()


@pytest.mark.parametrize("sure", [0.0, 1.0, 6.0])
def test_the_calibration_error_is_that_of_the_formula(sure: float):
    random = np.random.default_rng(1)
    confidence = 1 - random.random(500) ** (1 + sure) * 0.9
    correct = random.random(500) < confidence**2
    confidence[:4] = [1.0, 2 / 15, 1 / 15, 1e-9]  # edges of bins belong to the lower one
    wanted = plain_calibration_error(confidence, correct)
    assert calibration_error(confidence, correct) == pytest.approx(wanted, abs=1e-12)


def test_the_calibration_error_of_who_is_always_right_to_say_so_is_zero():
    assert calibration_error(np.ones(5, np.float32), np.ones(5, bool)) == 0
    assert calibration_error(np.ones(4, np.float32), np.array([True, False, True, False])) == 0.5


def main(folder: Path) -> None:
    """One rank of two."""
    accelerator, found = build_accelerator("no"), {}
    assert accelerator.num_processes == 2
    for count in (1, 2, 21):
        path = folder / f"{count}.tar"
        found[str(count)] = measured(path, accelerator)
        found[f"keys {count}"] = [key for batch in loader_of(path, accelerator) for key in batch.keys]
        judged: Outcomes = outcomes([classifier()], loader_of(path, accelerator), accelerator)[0]
        matrix = confusion.confusion_matrix(judged, CLASSES).tolist()
        found[f"outcomes {count}"] = {
            "labels": judged.labels.tolist(), "predicted": judged.predicted.tolist(), "matrix": matrix
        }  # fmt: skip
    try:
        measured(folder / "bad.tar", accelerator)
    except InputError as error:
        found["bad"] = str(error)
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
