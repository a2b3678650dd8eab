"""What `launch/shards.py verify` finds in shards, and what it says."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loopback
import numpy as np
import pytest
import webdataset
from PIL import Image

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.shard_config import VerifyConfig
from quarterlight.ssl.tar_scan import NO_END_MARK
from quarterlight.ssl.verify import SHOWN, verify_shards

SCRIPT = Path(__file__).parent.parent / "launch" / "shards.py"


def picture(seed: int, format: str = "JPEG", side: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, format)
    return buffer.getvalue()


def sample(number: int, *, label: int | None = 0, **more: bytes) -> dict[str, Any]:
    found = {"__key__": f"{number:05d}", "jpg": picture(number), "json": b'{"caption": "a picture"}', **more}
    return found | ({"cls": str(label).encode()} if label is not None else {})


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for one in samples:
            tar.write(one)
    return path


def dataset(folder: Path, count: int = 8, shards: int = 2, classes: int = 2) -> Path:
    """Writes shards of `count` samples each, and the dataset.json that belongs to them."""
    listed = []
    for shard in range(shards):
        numbers = range(shard * count, (shard + 1) * count)
        tar = write_tar(folder / f"train-{shard:06d}.tar", [sample(i, label=i % classes) for i in numbers])
        sha256 = hashlib.sha256(tar.read_bytes()).hexdigest()
        listed.append({"name": tar.name, "samples": count, "bytes": tar.stat().st_size, "sha256": sha256})
    per_class = [sum(i % classes == c for i in range(count * shards)) for c in range(classes)]
    train = {"samples": count * shards, "per_class": per_class, "shards": listed}
    record = {"classes": [f"class {i}" for i in range(classes)], "splits": {"train": train}, "left_out": 0}
    (folder / "dataset.json").write_text(json.dumps(record))
    return folder


def offset_of(tar: Path, name: str) -> int:
    """Returns where the header of a file lies."""
    with tarfile.open(tar) as opened:
        return opened.getmember(name).offset


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def break_header(tar: Path, name: str) -> int:
    offset = offset_of(tar, name)
    overwrite(tar, offset + 148, b"7777777")  # the checksum
    return offset


def break_image(tar: Path, name: str) -> int:
    offset = offset_of(tar, name) + 512
    overwrite(tar, offset + 20, bytes(300))
    return offset


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(given, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.fixture
def verify(tmp_path: Path) -> Callable[..., tuple[bool, list[dict[str, Any]]]]:
    """Returns a function that verifies shards in this process: (is all whole?, the lines of the report)."""

    def verify(*patterns: object) -> tuple[bool, list[dict[str, Any]]]:
        report = tmp_path / "report.jsonl"
        is_whole = verify_shards(list(map(str, patterns)), VerifyConfig(report=str(report), num_workers=0))
        return is_whole, [json.loads(line) for line in report.read_text().splitlines()]

    return verify


@pytest.fixture
def served() -> Iterator[loopback.WebServer]:
    """Yields a web server on this machine."""
    pytest.importorskip("aiohttp")
    with loopback.web_server() as server:
        yield server


def publish(server: loopback.WebServer, folder: Path) -> str:
    """Puts the files of a folder on a web server; returns their address."""
    server.files |= {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return f"{server.url}/data"


# The command.


def test_whole_shards_give_a_line_each_a_last_line_and_status_0(tmp_path):
    dataset(tmp_path / "in")
    (tmp_path / "in" / "index.npz").write_bytes(b"not an index, and not asked")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    done = run("verify", "in/train-*.tar", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, last = done.stdout.splitlines()
    assert " ".join(first.split()) == "in/train-000000.tar 8 samples 0.0 MB 8 labelled 0 unreadable 0 damaged"
    assert second.startswith("in/train-000001.tar ")
    assert last == "2 shards, 16 samples, 0.1 MB, 16 labelled: all whole"
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_damage_is_listed_with_shard_key_and_byte_and_gives_status_1(tmp_path):
    folder = dataset(tmp_path)
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    header, image = break_header(first, "00003.cls"), break_image(second, "00010.jpg")
    done = run("verify", first.name, second.name, "--report", "all.jsonl", "--num_workers", 1, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    counts = [" ".join(line.split()[-6:]) for line in lines[:2]]
    assert counts == ["7 labelled 0 unreadable 1 damaged", "8 labelled 1 unreadable 0 damaged"]
    assert lines[2] == f"damaged: {first.name}, byte {header}: a damaged header (1024 bytes lost)"
    assert lines[3].startswith(f"unreadable: {second.name}, 00010, byte {image}: ")
    assert ": 1 unreadable image, 1 damaged part, 1 wrong count; " in lines[-1]
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in found] == ["damaged", "unreadable", "miscounted", "note"]
    assert found[1].items() >= {"shard": str(second), "key": "00010", "byte": image}.items()
    assert found[1]["reason"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-*.tar"], r"shards: no-\*.tar matches no file"),
        (["no.tar"], "shards: no.tar does not exist"),
        (["."], "shards: . is a folder; name its tars"),
        (["a.tar", "--report", "no/report.jsonl"], "report no/report.jsonl cannot be written"),
        (["a.tar", "--report", "."], "report . cannot be written"),
    ],
)
def test_what_cannot_be_verified_is_refused_in_one_sentence(tmp_path, monkeypatch, words, message):
    write_tar(tmp_path / "a.tar", [sample(0)])
    monkeypatch.chdir(tmp_path)
    report = words[2] if len(words) > 1 else None
    with pytest.raises(InputError, match=message) as refused:
        verify_shards(words[:1], VerifyConfig(num_workers=0, report=report))
    assert "\n" not in str(refused.value)


def test_shards_at_an_address_are_fetched_and_a_missing_one_is_listed(served, tmp_path, verify, monkeypatch):
    folder = dataset(tmp_path / "in")
    image = break_image(folder / "train-000001.tar", "00010.jpg")
    address = publish(served, folder)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    is_whole, found = verify(f"{address}/train-{{000000..000002}}.tar")
    assert not is_whole
    assert [(line["kind"], line["shard"], line["key"], line["byte"]) for line in found] == [
        ("unreadable", f"{address}/train-000001.tar", "00010", image),
        ("damaged", f"{address}/train-000002.tar", None, 0),
    ]
    assert not list(scratch.iterdir())
    assert [request for request in served.requests if "dataset" not in request] == [
        f"GET /data/train-00000{i}.tar" for i in range(3)
    ]


# What is found.


def test_every_way_to_end_too_early_is_found(tmp_path, verify):
    whole = write_tar(tmp_path / "whole.tar", [sample(i) for i in range(4)]).read_bytes()
    last = offset_of(tmp_path / "whole.tar", "00003.jpg")
    after_cls = offset_of(tmp_path / "whole.tar", "00003.cls") + 1024
    cuts = {"header": last + 100, "data": last + 600, "padding": after_cls - 200, "between two files": after_cls}
    for where, at in cuts.items():
        (tmp_path / "cut.tar").write_bytes(whole[:at])
        is_whole, found = verify(tmp_path / "cut.tar")
        assert not is_whole, where
        assert [line["kind"] for line in found] == ["damaged"], where
        assert (found[0]["reason"] == NO_END_MARK) == (where in ("padding", "between two files"))


def test_a_changed_byte_that_decoding_cannot_see_is_found(tmp_path, verify, capsys):
    folder = dataset(tmp_path / "set")
    assert verify(folder / "*.tar") == (True, [])
    damaged = folder / "train-000001.tar"
    overwrite(damaged, offset_of(damaged, "00009.json") + 512 + 3, b"C")  # in a caption
    is_whole, found = verify(folder / "*.tar")
    assert not is_whole
    assert [(line["kind"], line["shard"]) for line in found] == [("changed", str(damaged))]
    assert "the sha256 in dataset.json: copy it again" in found[0]["reason"]
    assert "1 changed shard" in capsys.readouterr().out


def test_a_dataset_json_without_hashes_compares_none(tmp_path, verify):
    folder = dataset(tmp_path / "set")
    record = json.loads((folder / "dataset.json").read_text())
    for shard in record["splits"]["train"]["shards"]:
        del shard["sha256"]
    (folder / "dataset.json").write_text(json.dumps(record))
    assert verify(folder / "*.tar") == (True, [])


def test_files_that_are_no_tar_are_listed_and_the_rest_is_read(tmp_path, verify, capsys):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    write_tar(tmp_path / "c.tar", [sample(0)])
    is_whole, found = verify(tmp_path / "*.tar")
    assert not is_whole
    assert [(Path(line["shard"]).name, line["kind"]) for line in found] == [("a.tar", "damaged"), ("b.tar", "damaged")]
    assert all("not a tar" in line["reason"] for line in found)
    rows = capsys.readouterr().out.splitlines()
    marked = [row for row in rows if row.endswith("(cannot be read at all)")]
    assert len(marked) == 2 and "a.tar" in marked[0] and "b.tar" in marked[1]


def test_all_kinds_of_images_are_decoded(tmp_path, verify):
    samples = [{"__key__": x, x: picture(1, "JPEG" if x == "jpg" else x.upper())} for x in ("jpg", "png", "webp")]
    write_tar(tmp_path / "whole.tar", samples)
    assert verify(tmp_path / "whole.tar") == (True, [])
    write_tar(tmp_path / "cut.tar", [x | {x["__key__"]: x[x["__key__"]][:-300]} for x in samples])
    is_whole, found = verify(tmp_path / "cut.tar")
    assert not is_whole
    assert [(line["kind"], line["key"]) for line in found] == [("unreadable", x) for x in ("jpg", "png", "webp")]


def test_what_dataset_json_counts_is_compared(tmp_path, verify):
    folder = dataset(tmp_path / "in", shards=3)
    (folder / "train-000002.tar").unlink()
    write_tar(folder / "train-000001.tar", [sample(i, label=i % 2) for i in range(8, 15)])
    is_whole, found = verify(folder / "*.tar")
    assert not is_whole
    assert {(line["kind"], Path(line["shard"]).name) for line in found} == {
        ("missing", "train-000002.tar"),
        ("miscounted", "train-000001.tar"),
    }
    write_tar(folder / "train-000002.tar", [sample(i, label=0) for i in range(16, 24)])
    _, found = verify(folder / "*.tar")
    reasons = [line["reason"] for line in found if line["shard"].endswith("dataset.json")]
    assert reasons == [
        "split train has 24 samples here, and 23 in its shards",
        "split train has other counts per_class than its shards for 2 classes, such as 12 and 16 for class 0",
    ]


def test_a_part_of_the_shards_may_be_verified_alone(tmp_path, verify):
    folder = dataset(tmp_path / "in")
    assert verify(folder / "train-000001.tar") == (True, [])


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\x00"])
def test_a_damaged_dataset_json_is_found(tmp_path, verify, content):
    folder = dataset(tmp_path / "in")
    (folder / "dataset.json").write_bytes(content)
    is_whole, found = verify(folder / "*.tar")
    assert not is_whole
    assert [(line["kind"], Path(line["shard"]).name) for line in found] == [("damaged", "dataset.json")]


@pytest.mark.parametrize("content", ['{"name": "of another tool"}', '{"splits": ["train"]}', '{"splits": {"a": 1}}'])
def test_a_dataset_json_of_another_tool_does_no_harm(tmp_path, verify, content):
    folder = dataset(tmp_path / "in")
    (folder / "dataset.json").write_text(content)
    assert verify(folder / "*.tar")[0]


def test_what_is_odd_is_noted_and_changes_no_status(tmp_path, verify):
    write_tar(tmp_path / "a.tar", [sample(i) for i in range(3)] + [sample(3, label=None, cls=b"cat")])
    write_tar(tmp_path / "b.tar", [sample(2), sample(4, label=None), sample(5, label=7)])
    (tmp_path / "dataset.json").write_text('{"classes": ["one", "two"], "splits": {}}')
    is_whole, found = verify(tmp_path / "*.tar")
    assert is_whole
    assert {line["kind"] for line in found} == {"note"}
    notes = [(Path(line["shard"]).name, line["key"], line["reason"]) for line in found]
    assert notes[0][:2] == ("a.tar", None) and "is b'cat', not a class number" in notes[0][2]
    assert notes[1:] == [
        ("b.tar", None, "labels that are none of the 2 classes in dataset.json: 1"),
        ("b.tar", "00002", "keys that occur in more than one shard: 1, such as this"),
        ("a.tar", "00003", "samples without a label: 2 of 7, first this"),
        ("", None, "images that are the same as another, byte for byte: 1"),
    ]


def test_only_the_first_findings_are_shown_and_the_report_lists_all(tmp_path, verify, capsys):
    write_tar(tmp_path / "a.tar", [{"__key__": f"{i:03d}", "jpg": b"\xff\xd8 no"} for i in range(SHOWN + 5)])
    is_whole, found = verify(tmp_path / "a.tar")
    assert not is_whole
    assert len(found) == SHOWN + 5
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("unreadable: ") for line in shown) == SHOWN
    assert f"and 5 more; {tmp_path / 'report.jsonl'} lists all" in shown


def test_any_number_of_processes_finds_the_same(tmp_path, capsys):
    folder = dataset(tmp_path / "in", count=600, shards=1)  # more than a process is given at once
    for number in (3, 300, 599):
        break_image(folder / "train-000000.tar", f"{number:05d}.jpg")
    said = []
    for num_workers in (0, 2):
        assert not verify_shards([str(folder / "*.tar")], VerifyConfig(num_workers=num_workers))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].count("\nunreadable: ") == 3
