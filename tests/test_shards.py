import dataclasses
import gc
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import KILLED_BEFORE
from PIL import Image
from test_verify import publish
from test_verify import served as served

from quarterlight.ssl import make_index
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import class_names, open_index
from quarterlight.ssl.make_index import write_index
from quarterlight.ssl.shard_config import IndexConfig, ReshardConfig, ShardsConfig
from quarterlight.ssl.shards import reshard as reshard_in_process
from quarterlight.ssl.shards import write_shards
from quarterlight.ssl.sidecar import pack, read_sidecar, unpack

SCRIPT = Path(__file__).parent.parent / "launch" / "shards.py"
LEFT_OUT, DATASET = "left_out.jsonl", "dataset.json"


def picture(seed: int, height: int = 20, width: int = 26) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(seed: int, format: str = "JPEG", **size: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, **size).save(buffer, format)
    return buffer.getvalue()


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def animals(root: Path, count: int = 12) -> Path:
    return fill(root, {f"{('cat', 'dog', 'elk')[i % 3]}/{i:03d}.jpg": encoded(i) for i in range(count)})


def write(source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return write_shards(str(source), str(out), ShardsConfig(**{"num_workers": 0, "shard_size_mb": 0.01} | options))


def seen_by_webdataset(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    paths = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)) if paths else []
        gc.collect()
    return found


def image_of(sample: dict[str, Any]) -> bytes:
    (data,) = [sample[field] for field in ("jpg", "png", "webp") if field in sample]
    return data


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is in the shards.


def test_webdataset_reads_each_image_once_with_its_label_and_its_very_bytes(tmp_path):
    source = animals(tmp_path / "in")
    dataset = write(source, tmp_path / "out")
    samples = seen_by_webdataset(tmp_path / "out")
    found = {image_of(sample): int(sample["cls"]) for sample in samples}
    assert len(samples) == 12
    assert found == {encoded(i): i % 3 for i in range(12)}
    assert len({sample["__key__"] for sample in samples}) == 12
    assert dataset["classes"] == ["cat", "dog", "elk"]


def test_webdataset_decodes_what_is_written(tmp_path):
    write(animals(tmp_path / "in", 6), tmp_path / "out", shard_size_mb=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pipeline = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
        pairs = list(pipeline.decode("rgb8").to_tuple("jpg", "cls"))
        gc.collect()
    assert sorted(label for _, label in pairs) == [0, 0, 1, 1, 2, 2]
    assert all(pixels.shape == (20, 26, 3) for pixels, _ in pairs)


def test_our_index_reads_what_webdataset_reads(tmp_path):
    write(animals(tmp_path / "in"), tmp_path / "out")
    index = open_index(str(tmp_path / "out" / "train-*.tar"))
    ours = [(index.key(i), index.read(i), int(index.label[i])) for i in range(len(index))]
    theirs = [(x["__key__"], image_of(x), int(x["cls"])) for x in seen_by_webdataset(tmp_path / "out")]
    assert ours == theirs
    assert class_names(index) == ["cat", "dog", "elk"]


def test_a_flat_folder_gives_shards_without_labels(tmp_path):
    source = fill(tmp_path / "in", {f"{i}.jpg": encoded(i) for i in range(5)})
    dataset = write(source, tmp_path / "out")
    samples = seen_by_webdataset(tmp_path / "out")
    assert len(samples) == 5
    assert not any("cls" in sample for sample in samples)
    assert dataset["classes"] is None
    assert open_index(str(tmp_path / "out" / "*.tar")).label.tolist() == [-1] * 5


def test_names_of_any_kind_become_plain_keys_that_stay_one_sample_each(tmp_path):
    names = [
        "a.b.c.jpg",
        "a.b.d.jpg",
        "two words.jpg",
        "größe 漢字.jpg",
        "漢字.jpg",
        "x" * 200 + ".jpg",
        "-.jpg",
        "sub dir/a.jpg",
    ]
    names.append(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    write(fill(tmp_path / "in put", {name: encoded(i) for i, name in enumerate(names)}), tmp_path / "out put")
    samples = seen_by_webdataset(tmp_path / "out put")
    assert {image_of(sample) for sample in samples} == {encoded(i) for i in range(len(names))}
    assert all(re.fullmatch(r"[0-9]{8}-[A-Za-z0-9_-]{1,60}", sample["__key__"]) for sample in samples)


def test_images_are_stored_as_what_they_are_and_other_kinds_as_png(tmp_path):
    files = {
        "jpeg called png.png": encoded(0),
        "png called jpg.jpg": encoded(1, "PNG"),
        "webp.webp": encoded(2, "WEBP"),
        "bmp.bmp": encoded(3, "BMP"),
        "tiff.tif": encoded(4, "TIFF"),
        "ppm.ppm": encoded(5, "PPM"),
    }
    write(fill(tmp_path / "in", files), tmp_path / "out")
    samples = {sample["__key__"].split("-", 1)[1]: sample for sample in seen_by_webdataset(tmp_path / "out")}
    assert samples["jpeg_called_png"]["jpg"] == files["jpeg called png.png"]
    assert samples["png_called_jpg"]["png"] == files["png called jpg.jpg"]
    assert samples["webp"]["webp"] == files["webp.webp"]
    for name, seed in {"bmp": 3, "tiff": 4, "ppm": 5}.items():
        with Image.open(io.BytesIO(samples[name]["png"])) as image:
            assert np.array_equal(np.array(image), np.array(picture(seed)))


def test_resize_shrinks_the_shorter_side_and_leaves_small_images_alone(tmp_path):
    smooth = Image.fromarray((np.mgrid[:90, :121].sum(0) % 256).astype(np.uint8)).convert("RGB")
    buffers = {"wide.png": smooth, "tall.png": smooth.rotate(90, expand=True)}
    for name, image in buffers.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / name)
    fill(
        tmp_path / "in",
        {"small.png": encoded(1, "PNG", height=30, width=200), "equal.jpg": encoded(2, height=32, width=40)},
    )
    write(tmp_path / "in", tmp_path / "out", resize=32, quality=95)
    samples = {sample["__key__"].split("-", 1)[1]: sample for sample in seen_by_webdataset(tmp_path / "out")}
    assert samples["small"]["png"] == encoded(1, "PNG", height=30, width=200)
    assert samples["equal"]["jpg"] == encoded(2, height=32, width=40)
    for name, size in {"wide": (43, 32), "tall": (32, 43)}.items():
        with Image.open(io.BytesIO(samples[name]["jpg"])) as image:
            assert image.format == "JPEG" and image.size == size
            reference = np.array(buffers[f"{name}.png"].resize(size, Image.Resampling.BICUBIC)).astype(float)
            assert np.sqrt(((np.array(image) - reference) ** 2).mean()) < 12


def test_quality_decides_the_bytes_of_resized_images(tmp_path):
    source = fill(tmp_path / "in", {"1.png": encoded(0, "PNG", height=80, width=80)})
    sizes = []
    for quality in (30, 90):
        write(source, tmp_path / f"{quality}", resize=64, quality=quality)
        sizes.append(len(seen_by_webdataset(tmp_path / f"{quality}")[0]["jpg"]))
    assert sizes[0] < sizes[1] / 2


def test_shards_are_closed_at_their_size_and_shuffled_across_classes(tmp_path):
    source = animals(tmp_path / "in", 90)
    dataset = write(source, tmp_path / "out", shard_size_mb=0.05)
    shards = dataset["splits"]["train"]["shards"]
    assert [shard["name"] for shard in shards] == [f"train-{i:06d}.tar" for i in range(len(shards))]
    assert len(shards) >= 3
    assert all(50_000 <= shard["bytes"] < 50_000 + 2 * 10_240 + 4096 for shard in shards[:-1])
    for shard in shards[:-1]:
        with tarfile.open(tmp_path / "out" / shard["name"]) as tar:
            labels = {tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".cls")}
        assert labels == {b"0", b"1", b"2"}


def test_the_record_counts_what_is_there(tmp_path):
    source = fill(
        tmp_path / "in",
        {f"train/{c}/{i}.jpg": encoded(10 * c + i) for c in range(3) for i in range(c + 2)}
        | {f"val/{c}/{i}.jpg": encoded(100 + 10 * c + i) for c in range(2) for i in range(2)},
    )
    dataset = write(source, tmp_path / "out")
    assert dataset == json.loads((tmp_path / "out" / DATASET).read_text())
    assert dataset["splits"]["train"]["per_class"] == [2, 3, 4]
    assert dataset["splits"]["val"]["per_class"] == [2, 2, 0]
    for split, count in {"train": 9, "val": 4}.items():
        samples = seen_by_webdataset(tmp_path / "out", split)
        info = dataset["splits"][split]
        assert len(samples) == info["samples"] == sum(shard["samples"] for shard in info["shards"]) == count
        for shard in info["shards"]:
            data = (tmp_path / "out" / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert {image_of(x) for x in seen_by_webdataset(tmp_path / "out", "val")} == {
        encoded(100 + 10 * c + i) for c in range(2) for i in range(2)
    }


def test_a_val_share_sets_images_aside(tmp_path):
    dataset = write(animals(tmp_path / "in", 20), tmp_path / "out", val_share=0.25)
    assert {split: info["samples"] for split, info in dataset["splits"].items()} == {"train": 15, "val": 5}
    images = [image_of(x) for split in ("train", "val") for x in seen_by_webdataset(tmp_path / "out", split)]
    assert sorted(images) == sorted(encoded(i) for i in range(20))


def test_digits_become_pngs_of_eight_by_eight(tmp_path):
    dataset = write("digits", tmp_path / "out", shard_size_mb=1.0)
    assert {split: info["samples"] for split, info in dataset["splits"].items()} == {"train": 1438, "val": 359}
    sample = seen_by_webdataset(tmp_path / "out", "val")[0]
    with Image.open(io.BytesIO(sample["png"])) as image:
        assert image.size == (8, 8)


# The same bytes.


def test_bytes_do_not_depend_on_workers_time_or_place(tmp_path):
    write(animals(tmp_path / "a"), tmp_path / "out a", num_workers=0)
    for file in animals(tmp_path / "b").rglob("*.jpg"):
        os.utime(file, (1, 1))
    write(tmp_path / "b", tmp_path / "out b", num_workers=2)
    assert content(tmp_path / "out a") == content(tmp_path / "out b")
    assert len(content(tmp_path / "out a")) >= 4


def test_the_shuffled_order_is_that_of_earlier_versions_and_of_the_seed(tmp_path):
    source = animals(tmp_path / "in", 10)
    orders = []
    for seed in (0, 1):
        write(source, tmp_path / f"{seed}", shard_size_mb=1.0, seed=seed)
        orders.append([sample["__key__"] for sample in seen_by_webdataset(tmp_path / f"{seed}")])
    assert orders[0] == [
        "00000000-000",
        "00000001-003",
        "00000002-005",
        "00000003-001",
        "00000004-008",
        "00000005-006",
        "00000006-004",
        "00000007-007",
        "00000008-009",
        "00000009-002",
    ]
    assert orders[0] != orders[1]


def test_a_finished_folder_is_left_as_it_is(tmp_path, capsys):
    source = animals(tmp_path / "in")
    dataset = write(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert write(source, tmp_path / "out", num_workers=1) == dataset
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "complete already" in capsys.readouterr().out


def test_a_finished_folder_that_lost_a_shard_is_not_called_complete(tmp_path):
    source = animals(tmp_path / "in")
    write(source, tmp_path / "out")
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    try:
        write(source, tmp_path / "out")
    except InputError:
        return
    assert content(tmp_path / "out") == whole


def test_the_default_shard_size_may_be_given_in_full(tmp_path):
    source = animals(tmp_path / "in", 2)
    for config in (ShardsConfig(num_workers=0), ShardsConfig(num_workers=0, shard_size_mb=256.0)):
        write_shards(str(source), str(tmp_path / "out"), config)


# Refusals.


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"resize": 8}, {"shard_size_mb": 1.0}, {"labels": "none"}, {"val_share": 0.5}]
)
def test_a_folder_of_other_options_is_refused_and_left_alone(tmp_path, change):
    source = animals(tmp_path / "in")
    write(source, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match="other images or options"):
        write(source, tmp_path / "out", **change)
    assert content(tmp_path / "out") == before


def test_a_folder_of_other_images_is_refused(tmp_path):
    source = animals(tmp_path / "in")
    write(source, tmp_path / "out")
    fill(source, {"cat/new.jpg": encoded(99)})
    with pytest.raises(InputError, match="other images or options"):
        write(source, tmp_path / "out")


def test_foreign_tars_are_refused_and_left_alone(tmp_path):
    source = animals(tmp_path / "in")
    fill(tmp_path / "out", {"mine-000000.tar": b"foreign"})
    with pytest.raises(InputError, match="already holds tars"):
        write(source, tmp_path / "out")
    assert content(tmp_path / "out") == {"mine-000000.tar": b"foreign"}


def test_other_files_in_the_folder_are_no_harm(tmp_path):
    source = animals(tmp_path / "in")
    fill(tmp_path / "out", {"README.md": b"mine"})
    write(source, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == b"mine"
    assert len(seen_by_webdataset(tmp_path / "out")) == 12


@pytest.mark.parametrize(
    "options",
    [
        {"shard_size_mb": 0.0},
        {"shard_size_mb": -1.0},
        {"resize": 0},
        {"resize": -5},
        {"quality": 0, "resize": 8},
        {"quality": 101},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        write(animals(tmp_path / "in", 3), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*"))


# Damage in the source.


def test_an_unreadable_image_is_left_out_and_listed(tmp_path, capsys):
    source = animals(tmp_path / "in")
    good = encoded(77)
    fill(
        source,
        {
            "cat/cut off.jpg": good[: len(good) // 2],
            "dog/empty.jpg": b"",
            "elk/page.png": b"<html>404</html>",
        },
    )
    (source / "elk" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset = write(source, tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out" / LEFT_OUT).read_text().splitlines()]
    assert {line["file"] for line in listed} == {"cat/cut off.jpg", "dog/empty.jpg", "elk/page.png", "elk/dangling.jpg"}
    assert all(line["reason"] for line in listed)
    assert dataset["left_out"] == 4
    assert dataset["splits"]["train"]["samples"] == 12
    assert {image_of(x) for x in seen_by_webdataset(tmp_path / "out")} == {encoded(i) for i in range(12)}
    assert "left out 4" in capsys.readouterr().err


def test_nothing_left_out_leaves_no_list(tmp_path):
    write(animals(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / LEFT_OUT).exists()


def test_a_source_of_nothing_but_damage_is_refused_with_a_reason(tmp_path):
    source = fill(tmp_path / "in", {f"{i}.jpg": b"\xff\xd8 no" for i in range(3)})
    for _ in range(2):
        with pytest.raises(InputError, match="none of the 3 images"):
            write(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not (tmp_path / "out" / DATASET).exists()


def test_a_long_run_of_damage_makes_no_empty_shard(tmp_path):
    source = animals(tmp_path / "in", 6)
    fill(source, {f"cat/bad{i:03d}.jpg": b"\xff\xd8 no" for i in range(200)})
    dataset = write(source, tmp_path / "out", shard_size_mb=0.002)
    assert all(shard["samples"] > 0 for shard in dataset["splits"]["train"]["shards"])
    assert sum(shard["samples"] for shard in dataset["splits"]["train"]["shards"]) == 6
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == [shard["name"] for shard in dataset["splits"]["train"]["shards"]]
    assert dataset["left_out"] == len((tmp_path / "out" / LEFT_OUT).read_text().splitlines()) == 200


# Kills.

KILLED_EVERYWHERE = """
import contextlib, io, json, os, shutil, signal, sys
from pathlib import Path
from quarterlight.ssl.shard_config import ShardsConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.shards import write_shards

source, root = sys.argv[1], Path(sys.argv[2])
config = ShardsConfig(num_workers=0, shard_size_mb=0.01, val_share=0.2)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def write(out):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        write_shards(source, str(out), config)


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


write(root / "undisturbed")
expected = content(root / "undisturbed")
outcomes, killed = [], True
while killed:
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    killed = killed_before(len(outcomes) + 1, EVENTS, out, lambda: write(out))
    present = sorted(content(out)) if out.exists() else []
    try:
        write(out)
        found = content(out)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    except InputError as error:
        wrong = [f"refused: {error}"]
    outcomes.append([present, wrong])
print(json.dumps([sorted(expected), outcomes]))
"""


@pytest.fixture(scope="module")
def killed_everywhere(tmp_path_factory) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """What undisturbed writing leaves; for each kill, what was there, and what differed after the same call again."""
    root = tmp_path_factory.mktemp("killed")
    source = animals(root / "in", 8)
    fill(source, {"cat/bad.jpg": encoded(5)[:500]})
    command = [sys.executable, "-c", KILLED_BEFORE + KILLED_EVERYWHERE, str(source), str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_moment_and_the_same_call_again_give_the_same_tars(killed_everywhere):
    expected, outcomes = killed_everywhere
    assert [name for name in expected if name.endswith(".tar")] == [
        "train-000000.tar",
        "train-000001.tar",
        "val-000000.tar",
    ]
    assert len(outcomes) > 30
    stages = {len([name for name in present if name.endswith(".tar")]) for present, _ in outcomes}
    assert stages == {0, 1, 2, 3}
    failures = [(present, wrong) for present, wrong in outcomes if [x for x in wrong if not x.startswith(".")]]
    assert not failures


def test_a_kill_at_any_moment_and_the_same_call_again_leave_no_hidden_file_behind(killed_everywhere):
    leftovers = {name for _, wrong in killed_everywhere[1] for name in wrong if name.startswith(".")}
    assert not leftovers


def command(*args: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *(str(arg) for arg in args)]


def test_a_killed_command_given_again_writes_the_bytes_of_an_undisturbed_one(tmp_path):
    source = fill(
        tmp_path / "in", {f"{i % 2}/{i:04d}.jpg": encoded(i) for i in range(250)} | {"0/bad.jpg": encoded(0)[:400]}
    )
    options = ["--shard_size_mb", 0.02, "--val_share", 0.1]
    write(source, tmp_path / "undisturbed", shard_size_mb=0.02, val_share=0.1)
    expected = content(tmp_path / "undisturbed")
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command(source, out, "--num_workers", 2, *options), stdout=log, stderr=log)
        while not (out / "train-000001.tar").exists():
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait()
    tars = len(list(out.glob("*.tar")))
    assert 2 <= tars < len([name for name in expected if name.endswith(".tar")]), "killed in the middle"
    assert not (out / DATASET).exists()
    again = subprocess.run(command(source, out, "--num_workers", 0, *options), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert content(out) == expected
    assert "train 225 images" in again.stdout and "left out 1" in again.stderr


def test_a_mistake_ends_the_command_with_one_sentence(tmp_path):
    fill(tmp_path / "out", {"mine.tar": b"foreign"})
    done = subprocess.run(command(animals(tmp_path / "in", 3), tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*already holds tars.*\n", done.stderr)


def test_every_option_decides_the_plan_but_the_number_of_workers(tmp_path):
    source = animals(tmp_path / "in", 4)
    plans = {}
    changes = {
        "val_share": 0.5,
        "labels": "none",
        "resize": 8,
        "quality": 50,
        "shard_size_mb": 1.0,
        "seed": 1,
        "num_workers": 1,
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(ShardsConfig)}
    plain = write(source, tmp_path / "plain")["plan"]
    for name, value in changes.items():
        plans[name] = write(source, tmp_path / name, **{name: value})["plan"]
    assert plans.pop("num_workers") == plain
    assert len({plain, *plans.values()}) == len(plans) + 1


# Shards out of shards.


def reshard(patterns: Path | str | list[str], out: Path, **options: Any) -> dict[str, Any]:
    given = patterns if isinstance(patterns, list) else [str(patterns)]
    options = {"num_workers": 0, "shard_size_mb": 0.01} | options
    return reshard_in_process(given, str(out), ReshardConfig(**options))


def labelled_images(folder: Path, split: str = "train") -> dict[bytes, int | None]:
    samples = seen_by_webdataset(folder, split)
    return {image_of(x): int(x["cls"]) if "cls" in x else None for x in samples}


def test_resharded_are_the_same_images_labels_and_classes_shuffled_over_all(tmp_path):
    write(animals(tmp_path / "in", 60), tmp_path / "old", val_share=0.1)
    dataset = reshard(tmp_path / "old" / "*.tar", tmp_path / "new", shard_size_mb=0.02, seed=5)
    old, new = (json.loads((tmp_path / name / DATASET).read_text()) for name in ("old", "new"))
    assert dataset == new
    assert new["classes"] == old["classes"] == ["cat", "dog", "elk"]
    for split in ("train", "val"):
        assert labelled_images(tmp_path / "new", split) == labelled_images(tmp_path / "old", split)
        assert new["splits"][split]["per_class"] == old["splits"][split]["per_class"]
    assert len(new["splits"]["train"]["shards"]) < len(old["splits"]["train"]["shards"])
    keys = [sample["__key__"] for sample in seen_by_webdataset(tmp_path / "new")]
    assert [key[:8] for key in keys] == [f"{i:08d}" for i in range(54)]
    assert all(re.fullmatch(r"\d{8}-\d{3}", key) for key in keys), "keys grow with every resharding"
    from_old = [sample["__key__"][9:] for sample in seen_by_webdataset(tmp_path / "old")]
    first_half = set(from_old[:27])
    assert 5 < len(first_half & {key[9:] for key in keys[:27]}) < 22


def test_labels_are_kept_where_no_names_are_known(tmp_path):
    write(animals(tmp_path / "in", 12), tmp_path / "old")
    (tmp_path / "old" / DATASET).unlink()
    dataset = reshard(tmp_path / "old" / "*.tar", tmp_path / "new")
    assert dataset["classes"] is None
    assert dataset["splits"]["train"]["per_class"] == [4, 4, 4]
    assert labelled_images(tmp_path / "new") == {encoded(i): i % 3 for i in range(12)}


def test_shards_without_labels_stay_so(tmp_path):
    write(fill(tmp_path / "in", {f"{i}.jpg": encoded(i) for i in range(5)}), tmp_path / "old")
    dataset = reshard(tmp_path / "old" / "*.tar", tmp_path / "new")
    assert dataset["classes"] is None
    assert dataset["splits"]["train"]["per_class"] is None
    assert labelled_images(tmp_path / "new") == {encoded(i): None for i in range(5)}


def test_several_sources_become_one_set(tmp_path):
    write(animals(tmp_path / "in a", 9), tmp_path / "a")
    write(fill(tmp_path / "in b", {f"{i}.jpg": encoded(100 + i) for i in range(4)}), tmp_path / "b")
    dataset = reshard(f"{tmp_path}/a/*.tar::{tmp_path}/b/*.tar", tmp_path / "new", val_share=0.25)
    assert dataset["classes"] == ["cat", "dog", "elk"]
    assert {split: info["samples"] for split, info in dataset["splits"].items()} == {"train": 10, "val": 3}
    found = labelled_images(tmp_path / "new") | labelled_images(tmp_path / "new", "val")
    assert found == {encoded(i): i % 3 for i in range(9)} | {encoded(100 + i): None for i in range(4)}


def test_resharding_makes_images_smaller_and_lists_what_cannot_be_read(tmp_path, capsys):
    source = fill(tmp_path / "in", {f"{i}.jpg": encoded(i, height=60, width=80) for i in range(8)})
    write(source, tmp_path / "old", shard_size_mb=1.0)
    tar = tmp_path / "old" / "train-000000.tar"
    with tarfile.open(tar) as opened:
        members = opened.getmembers()
    data = bytearray(tar.read_bytes())
    data[members[2].offset + 148] ^= 1  # a header, and an image
    data[members[5].offset_data + 30 : members[5].offset_data + 400] = bytes(370)
    tar.write_bytes(data)
    dataset = reshard(tar, tmp_path / "new", resize=30)
    samples = seen_by_webdataset(tmp_path / "new")
    assert len(samples) == dataset["splits"]["train"]["samples"] == 6
    assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples} == {(40, 30)}
    listed = [json.loads(line) for line in (tmp_path / "new" / LEFT_OUT).read_text().splitlines()]
    assert [line["file"] for line in listed] == [tar.name, f"{tar.name}/{members[5].name.removesuffix('.jpg')}"]
    assert f"a damaged header (byte {members[2].offset}, " in listed[0]["reason"]
    assert dataset["left_out"] == 2
    assert "left out 1 unreadable images and 1 damaged parts of shards" in capsys.readouterr().err


def test_a_finished_resharding_is_complete_and_other_sources_are_refused(tmp_path, capsys):
    write(animals(tmp_path / "in", 12), tmp_path / "old")
    dataset = reshard(tmp_path / "old" / "*.tar", tmp_path / "new")
    before = content(tmp_path / "new")
    assert reshard(tmp_path / "old" / "*.tar", tmp_path / "new", num_workers=1) == dataset
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(InputError, match="other images or options"):
        reshard(tmp_path / "old" / "*.tar", tmp_path / "new", seed=1)
    fill(tmp_path / "in", {"elk/new.jpg": encoded(99)})
    write(tmp_path / "in", tmp_path / "other")
    with pytest.raises(InputError, match="other images or options"):
        reshard(tmp_path / "other" / "*.tar", tmp_path / "new")
    assert content(tmp_path / "new") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "resize 0 is not a number of pixels"),
        ({"quality": 0}, "quality 0 is not in 1-100"),
        ({"shard_size_mb": 0.0}, "shard_size_mb 0.0 is not positive"),
        ({"val_share": 1.0}, "val_share 1.0 is not in"),
        ({"val_share": 0.5}, "3 of the images are val images by their dataset.json: leave val_share out"),
    ],
    ids=str,
)
def test_resharding_refuses_numbers_out_of_range(tmp_path, options, message):
    write(animals(tmp_path / "in", 12), tmp_path / "old", val_share=0.25)
    with pytest.raises(InputError, match=re.escape(message)):
        reshard(tmp_path / "old" / "*.tar", tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/*"))


def test_resharding_refuses_what_it_cannot_read_or_write(tmp_path):
    old = tmp_path / "old"
    write(animals(tmp_path / "in", 12), old)
    with pytest.raises(InputError, match="old holds train-000000.tar, which is to be read: choose another folder"):
        reshard(old / "*.tar", old)
    with pytest.raises(InputError, match="old is a folder; name its tars"):
        reshard(old, tmp_path / "new")
    fill(tmp_path / "full", {"mine.tar": b"foreign"})
    with pytest.raises(InputError, match="already holds tars"):
        reshard(old / "*.tar", tmp_path / "full")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="out_dir .*file cannot be written"):
        reshard(old / "*.tar", tmp_path / "file")


def test_class_names_that_do_not_fit_are_refused(tmp_path):
    write(animals(tmp_path / "in", 9), tmp_path / "a")
    write(fill(tmp_path / "in b", {f"{x}/{x}.jpg": encoded(i) for i, x in enumerate("xyz")}), tmp_path / "b")
    with pytest.raises(InputError, match="have different classes: reshard them apart"):
        reshard([f"{tmp_path}/a/*.tar", f"{tmp_path}/b/*.tar"], tmp_path / "new")
    record = json.loads((tmp_path / "b" / DATASET).read_text())
    (tmp_path / "b" / DATASET).write_text(json.dumps(record | {"classes": ["x", "y"]}))
    with pytest.raises(InputError, match="names 2 classes, but .*-z has the label 2: mend the names"):
        reshard(f"{tmp_path}/b/*.tar", tmp_path / "new")


RESHARD_KILLED_EVERYWHERE = (
    KILLED_EVERYWHERE.replace("write_shards(source, str(out), config)", "reshard([source], str(out), config)")
    .replace("import write_shards", "import reshard")
    .replace("ShardsConfig", "ReshardConfig")
    .replace(", val_share=0.2", "")
)


def test_a_kill_at_any_moment_of_resharding_and_the_same_call_again_give_the_same_files(tmp_path):
    write(animals(tmp_path / "in", 8), tmp_path / "old", val_share=0.25)
    source = str(tmp_path / "old" / "*.tar")
    command = [sys.executable, "-c", KILLED_BEFORE + RESHARD_KILLED_EVERYWHERE, source, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, outcomes = json.loads(done.stdout)
    assert {"dataset.json", "train-000000.tar", "val-000000.tar"} <= set(expected)
    assert len(outcomes) > 20
    assert {len([name for name in present if name.endswith(".tar")]) for present, _ in outcomes} >= {0, 1, 2}
    assert not [wrong for _, wrong in outcomes if wrong]


def test_the_commands_make_new_shards_and_their_index(tmp_path):
    write(animals(tmp_path / "in", 12), tmp_path / "old")
    run = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    made = run(command("reshard", "old/train-000000.tar", "old/train-000001.tar", "new", "--num_workers", 1))
    assert made.returncode == 0, made.stderr
    assert len(labelled_images(tmp_path / "new")) == len(open_index(str(tmp_path / "old" / "train-00000[01].tar")))
    indexed = run(command("index", "new/*.tar"))
    assert indexed.returncode == 0, indexed.stderr
    assert re.fullmatch(r".*new/index.npz: \d+ samples in 1 shard\n", indexed.stdout)


def test_shards_at_an_address_are_fetched_once_and_not_for_nothing(served, tmp_path, capsys):
    write(animals(tmp_path / "in", 12), tmp_path / "old")
    address = publish(served, tmp_path / "old")
    shards = f"{address}/train-{{000000..000002}}.tar"
    dataset = reshard(shards, tmp_path / "new")
    assert dataset["classes"] == ["cat", "dog", "elk"]
    assert labelled_images(tmp_path / "new") == {encoded(i): i % 3 for i in range(12)}
    assert not [name for name in content(tmp_path / "new") if name.startswith(".")]
    assert sorted(x for x in served.requests if x.endswith(".tar")) == [
        f"GET /data/train-00000{i}.tar" for i in range(3)
    ]
    served.files.clear()
    assert reshard(shards, tmp_path / "new") == dataset
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(InputError, match="other images or options"):
        reshard(shards, tmp_path / "new", resize=8)


# index.npz by a command.


def index(*patterns: object, out: Path | None = None) -> None:
    write_index(list(map(str, patterns)), IndexConfig(out=str(out) if out else None))


def test_an_index_is_scanned_anew_and_keeps_what_it_knew_of_other_shards(tmp_path, capsys):
    write(animals(tmp_path / "in", 30), tmp_path / "out")
    open_index(str(tmp_path / "out" / "*.tar"))
    known = read_sidecar(tmp_path / "out")
    wrong = {stamp: dataclasses.replace(entries, label=entries.label + 1) for stamp, entries in known.items()}
    (tmp_path / "out" / "index.npz").write_bytes(pack(wrong))
    index(tmp_path / "out" / "train-000001.tar")
    assert capsys.readouterr().out.endswith("samples in 1 shard\n")
    found = read_sidecar(tmp_path / "out")
    assert found.keys() == known.keys()
    for stamp, entries in found.items():
        is_new = stamp[0] == "train-000001.tar"
        assert entries.label.tolist() == (known if is_new else wrong)[stamp].label.tolist()


def test_an_index_goes_where_it_is_told(tmp_path):
    write(animals(tmp_path / "in", 6), tmp_path / "out")
    before = content(tmp_path / "out")
    for out in (tmp_path / "folder", tmp_path / "some" / "file.npz"):
        index(tmp_path / "out" / "*.tar", out=out)
    assert content(tmp_path / "out") == before
    assert len(unpack((tmp_path / "folder" / "index.npz").read_bytes())) == 2
    assert len(unpack((tmp_path / "some" / "file.npz").read_bytes())) == 2


def test_an_index_of_an_address_is_written_there_or_here(served, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(animals(tmp_path / "in", 12), tmp_path / "out")
    address = publish(served, tmp_path / "out")
    for name in ("index.npz", "index-2.npz"):
        index(f"{address}/train-{{000000..000002}}.tar")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"{name}: 12 samples in 3 shards; put it beside the shards, as {address}/index.npz (")
    written: dict[str, bytes] = {}
    monkeypatch.setattr(make_index, "write_remote", written.__setitem__)
    served.files["/data/index.npz"] = Path("index.npz").read_bytes()
    index(f"{address}/train-000001.tar")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{address}/index.npz: ")
    assert unpack(written[f"{address}/index.npz"]).keys() == unpack(Path("index.npz").read_bytes()).keys()
    local = open_index(str(tmp_path / "out" / "*.tar"))
    entries = unpack(Path("index.npz").read_bytes()).values()
    assert np.concatenate([x.offset for x in entries]).tolist() == local.offset.tolist()


def test_an_index_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    write(animals(tmp_path / "in", 3), tmp_path / "a")
    write(animals(tmp_path / "in", 3), tmp_path / "b")
    with pytest.raises(InputError, match="takes one index, and the shards lie in 2 folders: index each by itself"):
        index(tmp_path / "a" / "*.tar", tmp_path / "b" / "*.tar", out=tmp_path)
    (tmp_path / "page.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(InputError, match="page.tar: not a tar"):
        index(tmp_path / "page.tar")
    with pytest.raises(InputError, match="cannot be written"):
        index(tmp_path / "a" / "*.tar", out=tmp_path / "page.tar" / "index.npz")
    with pytest.raises(InputError, match="nowhere.tar does not exist"):
        index(tmp_path / "nowhere.tar")


# Sub-commands.


def test_the_help_lists_the_sub_commands_and_each_has_its_own():
    shown = subprocess.run(command("--help"), capture_output=True, text=True).stdout
    for name, text in {
        "verify": "reads and decodes",
        "repair": "rewrites",
        "reshard": "makes new",
        "index": "writes",
    }.items():
        assert re.search(rf"^  {name} SHARDS\.\.\. .*{text}", shown, re.MULTILINE)
        own = subprocess.run(command(name, "--help"), capture_output=True, text=True).stdout
        assert f"shards.py {name} SHARDS..." in own
        assert ("--report" in own) == (name == "verify") and ("--resize" in own) == (name == "reshard")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verfy", "a.tar"), "verfy is no folder and no sub-command. Did you mean verify?"),
        (("--seed", "1", "verify", "a.tar"), "the sub-command verify comes first, before its options"),
        (("verify", "a.tar", "--reprot", "x"), "unknown option reprot. Did you mean report?"),
        (("repair",), "the following arguments are required: shards"),
        (("reshard", "a.tar"), "the following arguments are required: out_dir"),
        (("reshard", "a.tar", "out", "--resize", "small"), "resize is small: it must be a whole number or null"),
    ],
)
def test_a_mistaken_sub_command_is_answered_in_one_line(tmp_path, words, message):
    done = subprocess.run(command(*words), capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_folder_with_the_name_of_a_sub_command_is_a_folder(tmp_path):
    animals(tmp_path / "verify", 3)
    words = command("./verify", "out", "--num_workers", 0)
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(seen_by_webdataset(tmp_path / "out")) == 3
