"""Sets of small images decoded once: the array, when it is made, and that it changes nothing but the time it takes."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import KILLED_BEFORE
from PIL import Image

from quarterlight.ssl import small_images
from quarterlight.ssl.augment import CenterCrop, RandomCrop
from quarterlight.ssl.batches import Batch, Samples
from quarterlight.ssl.decode import decode_image
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex, open_index
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.masking import MaskSampler
from quarterlight.ssl.order import FileOrder, Order, RepeatedOrder, ShuffledOrder
from quarterlight.ssl.small_images import LARGEST_SIDE, LEFTOVER_S, SIZE_SAMPLES, find_small_images
from quarterlight.ssl.spans import Spans

COUNT = 40
NOISE = RandomCrop((12, 12), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)


def pixels_of(i: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, channels), np.uint8)
    picture = Image.fromarray(coarse.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(picture)


def write(
    folder: Path,
    *,
    size: tuple[int, int] = (16, 16),
    channels: int = 3,
    format: str = "PNG",
    broken: tuple[int, ...] = (),
    other_size: tuple[int, ...] = (),
    count: int = COUNT,
) -> ShardIndex:
    """Two shards of small pictures; broken ones have a good name and no pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    extension = {"PNG": "png", "JPEG": "jpg"}[format]
    with webdataset.ShardWriter(f"{folder}/train-%06d.tar", maxcount=25, verbose=0) as writer:
        for i in range(count):
            shape = (size[0] + 1, size[1]) if i in other_size else size
            buffer = io.BytesIO()
            Image.fromarray(pixels_of(i, *shape, channels)).save(buffer, format)
            data = buffer.getvalue()
            if i in broken:
                data = data[:60] + bytes(len(data) - 60)
            writer.write({"__key__": f"{i:02d}", extension: data, "cls": i % 5})
    return open_index(f"{folder}/train-*.tar")


def left(folder: Path) -> list[str]:
    """What lies there beside the shards and their index, hidden files too."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".tar" and p.name != "index.npz")


def samples_of(index: ShardIndex, small, order: Order | None = None, **changes) -> Samples:
    order = ShuffledOrder(np.arange(len(index)), 0) if order is None else order
    crop = changes.pop("transform", NOISE)
    return Samples(index, order, crop, 0, masks=MaskSampler((4, 4), 0.75), small=small, **changes)


def assert_same_but_for_rounding(a: Batch, b: Batch) -> None:
    assert a.keys == b.keys and a.bad == b.bad
    assert torch.equal(a.labels, b.labels)
    assert all(torch.equal(x, y) for x, y in zip(a.masking[:3], b.masking[:3], strict=True))
    off = (a.images.int() - b.images.int()).abs()
    assert off.max() <= 5 and (off > 1).float().mean() < 0.002


# The array.


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((8, 8), 1), ((64, 20), 3)])
def test_the_array_holds_the_decoded_images(tmp_path, size, channels, format, in_chans):
    index = write(tmp_path / "shards", size=size, channels=channels, format=format)
    small = find_small_images(index, in_chans, tmp_path / "cache")
    assert small.unreadable == {}
    ids = np.array([3, 0, 39, 3])
    found = small.read(ids)
    assert found.dtype == torch.uint8 and found.shape == (4, *size, in_chans)
    for pixels, sample in zip(found.numpy(), ids.tolist(), strict=True):
        assert np.array_equal(pixels, decode_image(index.read(sample), in_chans))
    assert small.file.parent == tmp_path / "shards" and not (tmp_path / "cache").exists()
    assert left(tmp_path / "shards") == [small.file.with_suffix(".json").name, small.file.name]


def test_color_and_grey_have_an_array_each_and_other_shards_another(tmp_path):
    index = write(tmp_path)
    some = open_index(f"{tmp_path}/train-000001.tar")
    files = {find_small_images(x, chans, tmp_path).file for x in (index, some) for chans in (1, 3)}
    assert len(files) == 4
    assert len(find_small_images(some, 3, tmp_path).read(np.arange(15))) == 15


@pytest.mark.parametrize("size", [(LARGEST_SIDE + 1, 20), (20, LARGEST_SIDE + 1), (300, 200)])
def test_a_set_of_larger_images_has_none_and_leaves_nothing(tmp_path, size):
    index = write(tmp_path / "shards", size=size)
    assert find_small_images(index, 3, tmp_path / "cache") is None
    assert left(tmp_path / "shards") == [] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("other", [(0,), tuple(range(0, COUNT, 2))])
def test_a_set_of_several_sizes_has_none_and_leaves_nothing(tmp_path, other, capsys):
    index = write(tmp_path / "shards", other_size=other)
    assert find_small_images(index, 3, tmp_path / "cache") is None
    assert left(tmp_path / "shards") == [] and not capsys.readouterr().out


def test_a_set_that_only_the_making_finds_to_have_several_sizes_is_not_tried_again(tmp_path, monkeypatch, capsys):
    index = write(tmp_path, other_size=(38,))
    assert find_small_images(index, 3, tmp_path) is None
    assert capsys.readouterr().out.count("decoding 40 images") == 1
    (name,) = left(tmp_path)
    assert json.loads((tmp_path / name).read_text()) == {"one_size": False, "unreadable": {}}
    calls = count_decodings(monkeypatch)
    assert find_small_images(open_index(f"{tmp_path}/train-*.tar"), 3, tmp_path) is None
    assert len(calls) <= SIZE_SAMPLES and left(tmp_path) == [name] and not capsys.readouterr().out
    for path in index.paths:
        os.utime(path, ns=(1, 1))
    mended = write(tmp_path)
    small = find_small_images(mended, 3, tmp_path)
    assert np.array_equal(small.read(np.array([38]))[0].numpy(), decode_image(mended.read(38)))


def test_images_as_large_as_it_goes_have_one(tmp_path):
    index = write(tmp_path, size=(LARGEST_SIDE, LARGEST_SIDE), count=5)
    assert find_small_images(index, 3, tmp_path).read(np.arange(5)).shape == (5, LARGEST_SIDE, LARGEST_SIDE, 3)


def test_a_set_in_which_nothing_can_be_read_has_none(tmp_path):
    index = write(tmp_path / "shards", broken=tuple(range(COUNT)))
    assert find_small_images(index, 3, tmp_path / "cache") is None
    assert left(tmp_path / "shards") == []


# Made once, and anew when it must be.


def count_decodings(monkeypatch) -> list[int]:
    calls: list[int] = []

    def counting(data: bytes, in_chans: int) -> np.ndarray:
        calls.append(len(data))
        return decode_image(data, in_chans)

    monkeypatch.setattr(small_images, "decode_image", counting)
    return calls


def test_it_is_made_once(tmp_path, monkeypatch, capsys):
    index = write(tmp_path)
    first = find_small_images(index, 3, tmp_path)
    assert capsys.readouterr().out == f"decoding 40 images of 16 x 16 px once, into {first.file}\n"
    written = first.file.stat().st_mtime_ns
    calls = count_decodings(monkeypatch)
    again = find_small_images(open_index(f"{tmp_path}/train-*.tar"), 3, tmp_path)
    assert len(calls) < COUNT and again.file == first.file
    assert again.file.stat().st_mtime_ns == written and not capsys.readouterr().out
    assert torch.equal(again.read(np.arange(COUNT)), first.read(np.arange(COUNT)))


def test_unreadable_images_are_remembered(tmp_path):
    index = write(tmp_path, broken=(4, 30))
    first, again = (find_small_images(index, 3, tmp_path) for _ in range(2))
    assert set(first.unreadable) == {4, 30} and again.unreadable == first.unreadable
    assert all(first.unreadable.values())
    assert first.read(np.array([4])).max() == 0 and first.read(np.array([5])).max() > 0


def test_a_mended_shard_is_decoded_anew(tmp_path):
    index = write(tmp_path, broken=(4, 30))
    stale = find_small_images(index, 3, tmp_path)
    fingerprint, sizes = index.fingerprint(), [os.stat(path).st_size for path in index.paths]
    for path in index.paths:
        os.utime(path, ns=(1, 1))  # so that the mended ones are newer, whatever the clock's resolution
    before, begun = stale.file.read_bytes(), stale.read(np.arange(COUNT)).clone()
    index = write(tmp_path)
    assert index.fingerprint() == fingerprint and [os.stat(path).st_size for path in index.paths] == sizes
    mended = find_small_images(index, 3, tmp_path)
    assert mended.file != stale.file and mended.unreadable == {}
    assert stale.file.read_bytes() == before and torch.equal(stale.read(np.arange(COUNT)), begun), "a run may read it"
    for sample in (4, 30):
        assert np.array_equal(mended.read(np.array([sample]))[0].numpy(), decode_image(index.read(sample)))


@pytest.mark.parametrize("change", ["label", "key", "fewer"])
def test_other_samples_under_the_same_names_are_decoded_anew(tmp_path, change):
    find_small_images(write(tmp_path), 3, tmp_path)
    if change == "fewer":
        index = write(tmp_path, count=30)
    else:
        with webdataset.TarWriter(f"{tmp_path}/train-000001.tar") as tar:
            for i in range(25, COUNT):
                buffer = io.BytesIO()
                Image.fromarray(pixels_of(i + 100, 16, 16)).save(buffer, "PNG")
                key, label = (f"k{i}", i % 5) if change == "key" else (f"{i:02d}", 7)
                tar.write({"__key__": key, "png": buffer.getvalue(), "cls": label})
        index = open_index(f"{tmp_path}/train-*.tar")
    found = find_small_images(index, 3, tmp_path).read(np.arange(len(index)))
    assert np.array_equal(found[-1].numpy(), decode_image(index.read(len(index) - 1)))


def _cut(file: Path, to: int) -> None:
    file.write_bytes(file.read_bytes()[:to])


DAMAGE = {
    "array cut": lambda file: _cut(file, -100),
    "array cut in its header": lambda file: _cut(file, 50),
    "array empty": lambda file: _cut(file, 0),
    "array of garbage": lambda file: file.write_bytes(b"<html>404</html>" * 2000),
    "array header flipped": lambda file: file.write_bytes(file.read_bytes().replace(b"}", b"(", 1)),
    "array of another kind": lambda file: np.save(file, np.zeros((COUNT, 16, 16, 3), np.int8)),
    "array of objects": lambda file: np.save(file, np.array([{}], object), allow_pickle=True),
    "array gone": lambda file: file.unlink(),
    "json cut": lambda file: _cut(file.with_suffix(".json"), 7),
    "json empty": lambda file: _cut(file.with_suffix(".json"), 0),
    "json of something else": lambda file: file.with_suffix(".json").write_text("[1, 2]"),
    "json without a list": lambda file: file.with_suffix(".json").write_text(
        json.dumps({**json.loads(file.with_suffix(".json").read_text()), "unreadable": None})
    ),
    "json not in utf-8": lambda file: file.with_suffix(".json").write_bytes(b"\xff\xfe{}"),
    "json gone": lambda file: file.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_left_damaged_is_made_anew(tmp_path, what):
    index = write(tmp_path, broken=(4,))
    small = find_small_images(index, 3, tmp_path)
    expected = small.read(np.arange(COUNT)).clone()
    DAMAGE[what](small.file)
    for _ in range(2):
        again = find_small_images(index, 3, tmp_path)
        assert torch.equal(again.read(np.arange(COUNT)), expected)
        assert set(again.unreadable) == {4}
    assert left(tmp_path) == [small.file.with_suffix(".json").name, small.file.name]


# Where it is put.


def fake_read_only(monkeypatch, folder: Path) -> None:
    """os.access as a user without the right to write would see it; root may always."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (Path(path) == folder and mode & os.W_OK) and access(path, mode)
    )


def test_beside_shards_in_a_folder_that_is_read_only_it_lies_in_the_cache(tmp_path, monkeypatch):
    index = write(tmp_path / "shards")
    fake_read_only(monkeypatch, tmp_path / "shards")
    small = find_small_images(index, 3, tmp_path / "cache")
    assert small.file.parent == tmp_path / "cache" and left(tmp_path / "shards") == []
    assert np.array_equal(small.read(np.array([7]))[0].numpy(), decode_image(index.read(7)))
    calls = count_decodings(monkeypatch)
    assert find_small_images(index, 3, tmp_path / "cache").file == small.file and len(calls) < COUNT


def test_what_lies_beside_the_shards_is_used_although_the_folder_is_read_only(tmp_path, monkeypatch):
    index = write(tmp_path / "shards")
    small = find_small_images(index, 3, tmp_path / "cache")
    fake_read_only(monkeypatch, tmp_path / "shards")
    assert find_small_images(index, 3, tmp_path / "cache").file == small.file
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    index = write(tmp_path / "shards")
    fake_read_only(monkeypatch, tmp_path / "shards")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot be written") as caught:
        find_small_images(index, 3, tmp_path / "cache")
    assert "\n" not in str(caught.value) and "data.cache_dir" in str(caught.value)


@pytest.fixture
def tiny_disk():
    """A folder on a disk of 400 kB."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("mounting a disk needs root")
    folder = Path(tempfile.mkdtemp(prefix="tiny-disk-"))  # not where another session of pytest cleans up
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip("no disk may be mounted here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)  # an index keeps its shards open
    finally:
        folder.rmdir()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tiny_disk, tmp_path):
    index = write(tiny_disk, size=(64, 64), format="JPEG")  # 40 images take 492 kB decoded
    with pytest.raises(InputError, match="No space left on device.*make room there") as caught:
        find_small_images(index, 3, tmp_path / "cache")
    assert "\n" not in str(caught.value) and str(tiny_disk) in str(caught.value)
    assert left(tiny_disk) == []


def test_an_error_while_it_is_written_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    index = write(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(InputError, match="No space left on device"):
        find_small_images(index, 3, tmp_path / "cache")
    assert left(tmp_path) == []


def test_two_runs_that_make_it_at_once_both_have_it(tmp_path, monkeypatch):
    """As on two machines that share a disk: the second starts and ends while the first one is decoding."""
    index, seconds = write(tmp_path), []

    def interrupted(data: bytes, in_chans: int) -> np.ndarray:
        if not seconds and list(tmp_path.glob(".pixels-*.partial")):
            seconds.append(0)
            code = (
                "import sys\n"
                "from pathlib import Path\n"
                "from quarterlight.ssl.index import open_index\n"
                "from quarterlight.ssl.small_images import find_small_images\n"
                "folder = Path(sys.argv[1])\n"
                "assert find_small_images(open_index(f'{folder}/train-*.tar'), 3, folder / 'cache')\n"
            )
            subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        return decode_image(data, in_chans)

    monkeypatch.setattr(small_images, "decode_image", interrupted)
    small = find_small_images(index, 3, tmp_path / "cache")
    assert seconds
    assert np.array_equal(small.read(np.array([7]))[0].numpy(), decode_image(index.read(7)))


def test_a_kill_while_it_is_made_leaves_nothing_that_is_taken_for_whole(tmp_path):
    """Killed before each change on disk, twice in a row at every place; then it is there and right."""
    write(tmp_path / "shards", count=6)
    script = tmp_path / "killed.py"
    script.write_text(
        KILLED_BEFORE
        + """
import warnings
from pathlib import Path
import numpy as np
from quarterlight.ssl.decode import decode_image
from quarterlight.ssl.index import open_index
from quarterlight.ssl.small_images import LEFTOVER_S, find_small_images

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
index = open_index(f"{folder}/train-*.tar")
expected = np.stack([decode_image(index.read(i)) for i in range(6)])
make = lambda: find_small_images(index, 3, folder)
number, killed = 1, True
while killed:
    for file in folder.glob("*pixels-*"):
        file.unlink()
    killed = killed_before(number, ("open", "os.rename", "os.remove", "os.unlink"), folder, make)
    if killed:
        killed_before(number, ("open", "os.rename", "os.remove", "os.unlink"), folder, make)
    for partial in folder.glob(".pixels-*.partial"):  # what another machine writes now is left alone
        os.utime(partial, (partial.stat().st_mtime - 2 * LEFTOVER_S,) * 2)
    small = make()
    assert np.array_equal(small.read(np.arange(6)).numpy(), expected), number
    left = sorted(file.suffix for file in folder.iterdir() if "pixels" in file.name)
    assert left == [".json", ".npy"], (number, left)
    number += 1
print(number)
"""
    )
    words = [sys.executable, str(script), str(tmp_path / "shards")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6, "so many changes on disk"


@pytest.mark.parametrize(("age", "stays"), [(0, True), (LEFTOVER_S - 60, True), (LEFTOVER_S + 60, False)])
def test_half_written_files_are_deleted_when_nobody_can_be_writing_them(tmp_path, age, stays):
    index = write(tmp_path)
    partial, other = tmp_path / ".pixels-0123-3.npy.x.partial", tmp_path / ".index.npz.x.partial"
    for file in (partial, other):
        file.write_bytes(b"x")
        os.utime(file, (time.time() - age,) * 2)
    assert find_small_images(index, 3, tmp_path / "cache") is not None
    assert partial.exists() == stays
    assert other.exists(), "no file of ours"


# It changes nothing but the time.

ORDERS = {
    "shuffled": lambda: ShuffledOrder(np.arange(COUNT), 0),
    "file": lambda: FileOrder(np.tile(np.arange(COUNT), 2)),
    "repeats": lambda: RepeatedOrder(ShuffledOrder(np.arange(COUNT), 0), 2),
    "nothing readable": lambda: ShuffledOrder(np.array([4, 5]), 0),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("broken", [(), (4, 5, 30)])
def test_keys_labels_masks_and_bad_samples_are_those_of_the_ordinary_path(tmp_path, name, broken, monkeypatch):
    if name == "nothing readable":  # 80 positions look for another image, this many times each
        monkeypatch.setattr("quarterlight.ssl.batches.REPLACEMENT_TRIES", 10)
    index = write(tmp_path, broken=broken)
    small = find_small_images(index, 3, tmp_path)
    ordinary, quick = (samples_of(index, x, ORDERS[name]()) for x in (None, small))
    whole = ordinary.batch(0, 80), quick.batch(0, 80)
    assert_same_but_for_rounding(*whole)
    if broken:
        wanted = [i for i in ORDERS[name]().ids(np.arange(80)).tolist() if i in broken]
        assert len(whole[0].bad) >= len(wanted) > 0, "once a position"
    if name == "nothing readable" and broken:
        expected = [f"{i:02d}" for i in ORDERS[name]().ids(np.arange(80)).tolist()]
        assert whole[0].keys == whole[1].keys == expected
        assert whole[1].images.max() == 0
    for samples, joined in zip((ordinary, quick), whole, strict=True):
        for size in (1, 7):
            parts = [samples.batch(start, min(80, start + size)) for start in range(0, 80, size)]
            assert [bad for part in parts for bad in part.bad] == joined.bad
            assert [key for part in parts for key in part.keys] == joined.keys
            assert torch.equal(torch.cat([part.images for part in parts]), joined.images)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "transform",
    [
        RandomCrop((16, 16), (0.2, 1.0), (3 / 4, 4 / 3), 0.5),
        RandomCrop((24, 8), (0.08, 1.0), (3 / 4, 4 / 3), 0.5),
        RandomCrop((16, 16), (0.5, 1.0), (3 / 4, 4 / 3), 0.5, "rand-m9-mstd0.5-inc1"),
        CenterCrop((12, 12), 0.875),
        CenterCrop((16, 20), 1.0),
    ],
    ids=["crop", "high crop", "policy", "center", "whole"],
)
def test_every_transform_gives_the_pixels_of_the_ordinary_path(tmp_path, transform, in_chans):
    index = write(tmp_path, size=(16, 20), format="JPEG")
    small = find_small_images(index, in_chans, tmp_path)
    a, b = (samples_of(index, x, transform=transform, in_chans=in_chans).batch(0, 40) for x in (None, small))
    if isinstance(transform, RandomCrop) and transform.auto_augment:  # may stretch a difference of one level
        assert ((a.images.int() - b.images.int()).abs() > 8).float().mean() < 0.02
        a = a._replace(images=b.images)
    assert_same_but_for_rounding(a, b)


def test_small_images_to_a_large_size_are_the_pixels_of_the_ordinary_path(tmp_path):
    index = write(tmp_path, size=(64, 64), count=6)
    small = find_small_images(index, 3, tmp_path)
    crop = RandomCrop((224, 224), (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    a, b = (samples_of(index, x, transform=crop).batch(0, 6) for x in (None, small))
    assert torch.equal(a.images, b.images)


def test_workers_give_the_same_batches(tmp_path):
    index = write(tmp_path, broken=(4, 30))
    small = find_small_images(index, 3, tmp_path)
    small.read(np.arange(3))  # opened before the workers start
    spans = Spans(range(9), batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    alone, shared = (list(build_loader(samples_of(index, small), spans, num_workers=n)) for n in (0, 2))
    assert all(
        torch.equal(a.images, b.images) and (a.keys, a.bad) == (b.keys, b.bad)
        for a, b in zip(alone, shared, strict=True)
    )
    assert len(alone) == len(shared) == 9
