from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.sources import Source, read_source


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def read(source: Path | str, *, labels: str = "auto", val_share: float | None = None, seed: int = 0) -> Source:
    return read_source(str(source), labels=labels, val_share=val_share, seed=seed)


def listed(source: Source, split: str = "train") -> list[tuple[str, int | None]]:
    return [(image.name, image.label) for image in source.splits[split]]


def test_class_folders_are_numbered_as_image_folder_numbers_them(tmp_path):
    for i, name in enumerate(["dog/1", "dog/sub/deep/2", "Cat/3", "10/4", "9/5", "élan/6", "two words/7", "v1.5/8"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1), i).save(path)
    theirs = ImageFolder(str(tmp_path))
    ours = read(tmp_path)
    assert ours.classes == theirs.classes
    assert {(str(x.content), x.label) for x in ours.splits["train"]} == set(theirs.samples)
    assert list(ours.splits) == ["train"]


@pytest.mark.parametrize(
    "name", ["a.b.c.jpg", "with space.png", "größe 漢字.webp", "x.JPG", "x.Jpeg", "x.tif", "-x.bmp", "#1.gif"]
)
def test_names_of_any_kind_are_found(tmp_path, name):
    fill(tmp_path, f"class one/{name}", "class two/plain.jpg")
    source = read(tmp_path)
    assert listed(source) == [(f"class one/{name}", 0), ("class two/plain.jpg", 1)]
    assert source.splits["train"][0].content == tmp_path / "class one" / name


def test_a_name_that_is_not_utf8_is_found(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    fill(tmp_path, name)
    assert listed(read(tmp_path)) == [(name, None)]


def test_a_flat_folder_is_unlabelled(tmp_path):
    fill(tmp_path, "b.jpg", "a.png", "notes.txt", "c.jpg.part")
    source = read(tmp_path)
    assert source.classes is None
    assert listed(source) == [("a.png", None), ("b.jpg", None)]


def test_one_loose_image_makes_all_of_them_unlabelled(tmp_path):
    source = read(fill(tmp_path, "cat/1.jpg", "dog/2.jpg", "loose.jpg"))
    assert source.classes is None
    assert {label for _, label in listed(source)} == {None}


def test_labels_from_folders_refuse_a_loose_image_by_name(tmp_path):
    with pytest.raises(InputError, match="loose.jpg"):
        read(fill(tmp_path, "cat/1.jpg", "loose.jpg"), labels="folders")


def test_labels_may_be_left_out(tmp_path):
    source = read(fill(tmp_path, "cat/1.jpg", "dog/2.jpg"), labels="none")
    assert source.classes is None
    assert listed(source) == [("cat/1.jpg", None), ("dog/2.jpg", None)]


def test_hidden_files_and_hidden_folders_are_no_images_and_no_classes(tmp_path):
    fill(tmp_path, "cat/1.jpg", "cat/._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "cat/.thumbs/1.jpg", "dog/2.jpg")
    source = read(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert listed(source) == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]


def test_linked_folders_are_followed(tmp_path):
    fill(tmp_path, "elsewhere/1.jpg", "images/dog/2.jpg")
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "elsewhere")
    assert listed(read(tmp_path / "images")) == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]


def test_a_link_to_a_parent_does_not_multiply_the_images(tmp_path):
    fill(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    images = read(tmp_path).splits["train"]
    assert len(images) == 2


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("training", "validation"), ("Train", "Test"), ("train", "valid")]
)
def test_own_train_and_val_folders_are_the_splits(tmp_path, train, val):
    source = read(fill(tmp_path, f"{train}/cat/1.jpg", f"{train}/dog/2.jpg", f"{train}/elk/3.jpg", f"{val}/dog/4.jpg"))
    assert source.classes == ["cat", "dog", "elk"]
    assert listed(source) == [("cat/1.jpg", 0), ("dog/2.jpg", 1), ("elk/3.jpg", 2)]
    assert listed(source, "val") == [("dog/4.jpg", 1)]
    assert source.splits["val"][0].content == tmp_path / val / "dog/4.jpg"


def test_val_is_preferred_to_test(tmp_path):
    source = read(fill(tmp_path, "train/cat/1.jpg", "test/cat/2.jpg", "val/cat/3.jpg"))
    assert listed(source, "val") == [("cat/3.jpg", 0)]


def test_own_train_and_val_folders_may_be_flat(tmp_path):
    source = read(fill(tmp_path, "train/1.jpg", "train/2.jpg", "val/3.jpg"))
    assert source.classes is None
    assert listed(source) == [("1.jpg", None), ("2.jpg", None)]
    assert listed(source, "val") == [("3.jpg", None)]


def test_a_class_that_only_val_has_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="elk"):
        read(fill(tmp_path, "train/cat/1.jpg", "val/elk/2.jpg"))


def test_a_split_without_images_is_refused(tmp_path):
    fill(tmp_path, "train/cat/1.jpg")
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="val: no image"):
        read(tmp_path)


def test_a_class_called_train_is_a_class_when_there_is_no_val_folder(tmp_path):
    assert read(fill(tmp_path, "bus/1.jpg", "train/2.jpg")).classes == ["bus", "train"]


@pytest.mark.parametrize("names", [["train", "val"], ["train", "test"], ["train"]], ids=" ".join)
@pytest.mark.parametrize("val_share", [0.0, 0.25])
def test_split_folders_never_pass_for_classes_when_a_val_share_is_given(tmp_path, names, val_share):
    fill(tmp_path, *(f"{name}/{kind}/{i}.jpg" for name in names for kind in ("cat", "dog") for i in range(4)))
    try:
        source = read(tmp_path, val_share=val_share)
    except InputError:
        return
    assert source.classes == ["cat", "dog"]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_val_share_splits_the_images_once_and_for_all(tmp_path, share):
    fill(tmp_path, *(f"{i % 3}/{i:02d}.jpg" for i in range(40)))
    source = read(tmp_path, val_share=share)
    train, val = listed(source), listed(source, "val")
    assert len(val) == 40 * share
    assert sorted(train + val) == listed(read(tmp_path))
    assert source == read(tmp_path, val_share=share)
    assert source != read(tmp_path, val_share=share, seed=1)


def test_the_split_by_share_is_that_of_earlier_versions(tmp_path):
    fill(tmp_path, *(f"{i:02d}.jpg" for i in range(20)))
    val = read(tmp_path, val_share=0.25, seed=3).splits["val"]
    assert [image.name for image in val] == ["01.jpg", "05.jpg", "10.jpg", "14.jpg", "15.jpg"]


def test_a_val_share_of_nothing_gives_no_val(tmp_path):
    fill(tmp_path, *(f"{i}.jpg" for i in range(4)))
    assert list(read(tmp_path, val_share=0.0).splits) == ["train"]


@pytest.mark.parametrize("share", [1.0, -0.1, 7.0])
def test_a_share_outside_its_range_is_refused(tmp_path, share):
    with pytest.raises(InputError, match=f"val_share {share}"):
        read(fill(tmp_path, "1.jpg", "2.jpg"), val_share=share)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_share_that_leaves_a_split_empty_is_refused(tmp_path, share):
    with pytest.raises(InputError, match="2 images"):
        read(fill(tmp_path, "1.jpg", "2.jpg"), val_share=share)


def test_what_is_not_there_is_refused_with_what_might_be(tmp_path):
    with pytest.raises(InputError, match="nowhere.*digits"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="one.jpg"):
        read(fill(tmp_path, "one.jpg") / "one.jpg")


def test_a_folder_without_images_is_refused_with_the_suffixes(tmp_path):
    with pytest.raises(InputError, match=r"no image.*\.jpg"):
        read(fill(tmp_path, "a/notes.txt"))


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(fill(tmp_path, "images/1.jpg")))
    assert listed(read("~/images")) == [("1.jpg", None)]


def test_digits_are_those_of_scikit_learn():
    theirs = load_digits()
    source = read("digits")
    assert source.classes == [str(i) for i in range(10)]
    assert [len(source.splits[split]) for split in ("train", "val")] == [1438, 359]
    images = sorted(source.splits["train"] + source.splits["val"], key=lambda image: image.name)
    assert [image.label for image in images] == theirs.target.tolist()
    pixels = np.stack([image.content for image in images])
    assert pixels.dtype == np.uint8
    assert np.array_equal(np.rint(pixels / 255 * 16), theirs.images)


def test_digits_may_be_split_otherwise_and_a_folder_of_that_name_read(tmp_path, monkeypatch):
    assert [len(images) for images in read("digits", val_share=0.5).splits.values()] == [899, 898]
    assert list(read("digits", val_share=0.0).splits) == ["train"]
    monkeypatch.chdir(fill(tmp_path, "digits/cat/1.jpg"))
    assert listed(read("./digits")) == [("cat/1.jpg", 0)]


def test_cifar10_without_a_network_says_so_and_what_to_do(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match="cifar10 could not be downloaded.*folder"):
        read("cifar10")
