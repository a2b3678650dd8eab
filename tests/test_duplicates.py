"""Images in both sets, against a plain comparison of all bytes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tars

from quarterlight.finetune import duplicates
from quarterlight.finetune.duplicates import describe_shared, shared_images
from quarterlight.ssl.index import ShardIndex, open_index


def write(path: Path, images: dict[str, bytes]) -> ShardIndex:
    with tarfile.open(path, "w") as tar:
        for key, content in images.items():
            for extension, data in (("jpg", content), ("cls", b"0")):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return open_index(str(path))


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[ShardIndex, ShardIndex]:
    """Training images of few sizes, and evaluation images that are some of them, nearly some of them, or new."""
    train = {f"t{i}": noise(i, 300 + i % 7) for i in range(40)}
    first_byte = b"x" + train["t5"][1:]  # as large, and the same middle
    middle = train["t6"][:150] + b"y" + train["t6"][151:]
    val = {"v0": train["t3"], "v1": first_byte, "v2": noise(99, 303), "v3": train["t39"], "v4": middle,
           "v5": train["t3"], "v6": b"tiny", "v7": noise(98, 5000)}  # fmt: skip
    train["t40"], train["t41"] = b"tiny", train["t3"]
    (tmp_path / "more").mkdir()
    return write(tmp_path / "train.tar", train), write(tmp_path / "val.tar", val)


def test_it_finds_what_a_comparison_of_all_bytes_finds(sets: tuple[ShardIndex, ShardIndex]):
    train, val = sets
    plain = {i: [j for j in range(len(train)) if train.read(j) == val.read(i)] for i in range(len(val))}
    wanted = {i: js[0] for i, js in plain.items() if js}
    found = shared_images(train, np.arange(len(train)), val)
    assert found == wanted and [val.key(i) for i in found] == ["v0", "v3", "v5", "v6"]
    said = describe_shared(train, val, found)
    assert said.startswith(
        "warning: 4 of the 8 images of data.val are in data.train too, byte for byte (v0 in val.tar is "
    )
    assert "v5 in val.tar is t3 in train.tar; ...)" in said and "v6" not in said


def test_only_what_is_trained_on_counts(sets: tuple[ShardIndex, ShardIndex]):
    train, val = sets
    ids = np.array([i for i in range(len(train)) if train.key(i) in ("t39", "t1")])
    assert [val.key(i) for i in shared_images(train, ids, val)] == ["v3"]
    assert shared_images(train, ids[:0], val) == {}


def test_little_is_read(sets: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch):
    whole: list[int] = []
    read = duplicates._whole
    monkeypatch.setattr(duplicates, "_whole", lambda *where: whole.append(where[2]) or read(*where))
    train, val = sets
    shared_images(train, np.arange(len(train)), val)
    assert len(whole) <= 5 + 5 + 2  # those that are equal on both sides, and the ones that only their middle makes so


def test_the_same_shard_on_both_sides_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = open_index(write_tars(tmp_path, "train", 30, per_shard=10))
    monkeypatch.setattr(duplicates, "_of_shard", None)
    found = shared_images(index, np.arange(30), open_index(str(tmp_path / "train-0001.tar")))
    assert found == {i: i + 10 for i in range(10)}
    assert describe_shared(index, index, {}) == ""


def test_a_shard_that_is_gone_is_passed_over(sets: tuple[ShardIndex, ShardIndex], tmp_path: Path):
    train, val = sets
    (tmp_path / "train.tar").unlink()
    assert shared_images(train, np.arange(len(train)), val) == {}
