"""Damaged shards made whole: what is left out, what is kept, and what a kill leaves."""

import errno
import gc
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import KILLED_BEFORE
from test_verify import break_header, break_image, dataset, offset_of, overwrite, run, sample, write_tar

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import open_index
from quarterlight.ssl.repair import repair_shards
from quarterlight.ssl.shard_config import RepairConfig, VerifyConfig
from quarterlight.ssl.verify import verify_shards


def repair(*patterns: object) -> bool:
    return repair_shards(list(map(str, patterns)), RepairConfig(num_workers=0))


def is_whole(*patterns: object) -> bool:
    return verify_shards(list(map(str, patterns)), VerifyConfig(num_workers=0))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_in(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened if member.isreg()]


def seen_by_webdataset(tar: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        found = [
            {key: value for key, value in one.items() if key not in ("__url__", "__local_path__")}
            for one in webdataset.WebDataset(str(tar), shardshuffle=False)
        ]
        gc.collect()
    return found


def left_out(folder: Path) -> list[tuple[str, str | None, str]]:
    lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    return [(line["shard"], line["key"], line["reason"]) for line in lines]


def test_the_command_leaves_out_what_is_damaged_and_keeps_every_other_file(tmp_path):
    folder = dataset(tmp_path)
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    whole = files_in(first)
    untouched = second.read_bytes()
    image, header = break_image(first, "00005.jpg"), break_header(first, "00002.cls")
    damaged = first.read_bytes()
    done = run("repair", "train-*.tar", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "train-000000.tar: rewritten without 2 samples and 1 damaged part; the damaged one is now "
        "train-000000.tar.damaged"
    )
    assert lines[1] == f"  damage (byte {header}): a damaged header"
    assert lines[2].startswith("  00002 (byte ") and lines[2].endswith("): its cls lay in the damaged part")
    assert lines[3].startswith(f"  00005 (byte {image}): ")
    assert lines[4].startswith("1 of 2 shards rewritten without 2 samples and 1 damaged part, all listed in left_out")
    assert files_in(first) == [(name, data) for name, data in whole if name[:5] not in ("00002", "00005")]
    assert (tmp_path / "train-000000.tar.damaged").read_bytes() == damaged
    assert second.read_bytes() == untouched
    assert [line[:2] for line in left_out(tmp_path)] == [
        (first.name, None),
        (first.name, "00002"),
        (first.name, "00005"),
    ]
    before = content(tmp_path)
    again = run("repair", "train-*.tar", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == "2 shards, all whole: nothing to repair\n"
    assert content(tmp_path) == before


def test_dataset_json_counts_what_is_left_and_verify_agrees(tmp_path):
    folder = dataset(tmp_path / "in")
    break_image(folder / "train-000001.tar", "00011.jpg")
    break_image(folder / "train-000001.tar", "00012.jpg")
    break_image(folder / "train-000001.tar", "00014.jpg")
    open_index(str(folder / "*.tar"))
    assert not is_whole(folder / "*.tar")
    assert repair(folder / "*.tar")
    record = json.loads((folder / "dataset.json").read_text())
    train = record["splits"]["train"]
    assert record["left_out"] == 3
    assert (train["samples"], train["per_class"]) == (13, [6, 7])
    assert [shard["samples"] for shard in train["shards"]] == [8, 5]
    assert is_whole(folder / "*.tar")
    assert len(open_index(str(folder / "*.tar"))) == 13


def test_samples_of_which_not_even_the_key_is_left_are_counted_and_listed(tmp_path, capsys):
    folder = dataset(tmp_path / "in")
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: offset_of(shard, "00012.jpg") + 10])
    assert repair(folder / "*.tar")
    said = capsys.readouterr().out
    record = json.loads((folder / "dataset.json").read_text())
    lost = 8 - record["splits"]["train"]["shards"][1]["samples"]
    assert lost >= 4 and f"rewritten without {lost} samples" in said.splitlines()[0]
    gone = [json.loads(x) for x in (folder / "left_out.jsonl").read_text().splitlines() if '"samples"' in x]
    named = [reason for _, key, reason in left_out(folder) if key is not None]
    assert [line["samples"] for line in gone] == [lost - len(named)]
    assert "dataset.json lists 8: the others lay in the damage" in gone[0]["reason"]


def test_webdataset_sees_the_same_good_samples_as_before(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [sample(i, **{"seg.png": b"more", "txt": b"caption"}) for i in range(6)])
    before = seen_by_webdataset(tar)
    break_image(tar, "00003.jpg")
    assert repair(tar)
    assert seen_by_webdataset(tar) == before[:3] + before[4:]


def test_names_times_and_owners_stay_in_any_flavour_of_tar(tmp_path):
    names = ["größe/漢字 1.jpg", f"{'deep/' * 40}{'x' * 90}.jpg", b"caf\xe9/2.jpg".decode("utf-8", "surrogateescape")]
    for flavour in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{flavour}.tar"
        with tarfile.open(path, "w", format=flavour) as tar:
            for i, name in enumerate(["bad.jpg", *names, "README", ".hidden.jpg"]):
                header = tarfile.TarInfo(name)
                data = sample(i)["jpg"]
                header.size, header.mtime, header.uid, header.uname, header.mode = len(data), 1000 + i, 12, "me", 0o640
                tar.addfile(header, io.BytesIO(data))
        break_image(path, "bad.jpg")
        with tarfile.open(path) as tar:
            before = [(x.name, x.mtime, x.uid, x.uname, x.mode) for x in tar]
        files = files_in(path)
        assert repair(path)
        assert files_in(path) == files[1:]
        with tarfile.open(path) as tar:
            assert [(x.name, x.mtime, x.uid, x.uname, x.mode) for x in tar] == before[1:]


def test_a_shard_that_is_cut_off_ends_with_its_last_whole_sample(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [sample(i) for i in range(6)]).read_bytes()
    files = files_in(tmp_path / "a.tar")
    jpg = offset_of(tmp_path / "a.tar", "00004.jpg")
    for at in (jpg, jpg + 300, jpg + 700):  # before a header, in it, in the image; 00004.cls is before it
        (tmp_path / "a.tar").write_bytes(whole[:at])
        assert not is_whole(tmp_path / "a.tar")
        assert repair(tmp_path / "a.tar")
        assert files_in(tmp_path / "a.tar") == files[:12]
        assert is_whole(tmp_path / "a.tar")


def test_samples_next_to_damage_stay_when_nothing_of_them_is_lost(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [sample(i) for i in range(6)])
    files = files_in(tar)
    start, stop = offset_of(tar, "00002.cls"), offset_of(tar, "00003.cls")
    overwrite(tar, start, bytes(stop - start))
    assert repair(tar)
    assert files_in(tar) == files[:6] + files[9:]
    assert [line[1] for line in left_out(tmp_path)] == [None]


def test_captions_that_only_some_have_are_no_reason_to_leave_others_out(tmp_path):
    captioned = [sample(i, **({"txt": b"a caption"} if i % 3 == 0 else {})) for i in range(9)]
    tar = write_tar(tmp_path / "a.tar", captioned)
    files = files_in(tar)
    break_image(tar, "00004.jpg")
    assert repair(tar)
    assert files_in(tar) == [x for x in files if not x[0].startswith("00004")]


def test_an_earlier_damaged_shard_is_not_overwritten(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [sample(i) for i in range(6)])
    damaged = []
    for number in (1, 3, 4):
        break_image(tar, f"0000{number}.jpg")
        damaged.append(tar.read_bytes())
        assert repair(tar)
    names = ["a.tar.damaged", "a.tar.damaged-2", "a.tar.damaged-3"]
    assert [(tmp_path / name).read_bytes() for name in names] == damaged
    assert [line[1] for line in left_out(tmp_path)] == ["00001", "00003", "00004"]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", [sample(i) for i in range(3)])
    break_image(tar, "00001.jpg")
    damaged = tar.read_bytes()

    def refused(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert repair(tar)
    assert (tmp_path / "a.tar.damaged").read_bytes() == damaged
    assert is_whole(tar)


def test_what_cannot_be_rescued_is_left_as_it_is_and_said(tmp_path, capsys):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(tmp_path / "all bad.tar", [sample(0)])
    break_image(tmp_path / "all bad.tar", "00000.jpg")
    write_tar(tmp_path / "some.tar", [sample(1), sample(2)])
    break_image(tmp_path / "some.tar", "00002.jpg")
    before = content(tmp_path)
    assert not repair(tmp_path / "*.tar")
    said = capsys.readouterr().out
    assert "page.tar: left as it is (not a tar (it begins with b'<html>" in said
    assert "all bad.tar: left as it is (none of its images can be read); fetch it again, or delete it" in said
    after = content(tmp_path)
    assert after.keys() - before.keys() == {"some.tar.damaged", "left_out.jsonl"}
    assert {name for name in before if after[name] != before[name]} == {"some.tar"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("no.tar", "no.tar does not exist"),
        (".", "is a folder; name its tars"),
        ("https://host/a.tar", "https://host/a.tar: shards at an address are not rewritten; .*reshard"),
        ("s3://bucket/train-{000..002}.tar", "s3://bucket/train-000.tar: shards at an address are not rewritten"),
    ],
)
def test_what_cannot_be_repaired_is_refused_in_one_sentence(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        repair(pattern)
    assert not content(tmp_path)


def test_left_overs_go_only_of_the_files_at_hand(tmp_path):
    folder = dataset(tmp_path)
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    break_image(first, "00005.jpg")
    own = [folder / f".{name}.0f.partial" for name in (first.name, "dataset.json", "left_out.jsonl")]
    others = [folder / f".{name}.0f.partial" for name in (second.name, "pixels-12-3.npy", "other.tar", "index.npz")]
    for file in [*own, *others]:
        file.write_bytes(b"half")
    repair(first)
    assert [file for file in own if file.exists()] == []
    assert [file for file in others if not file.exists()] == []


def test_a_read_only_folder_is_refused_and_left_alone(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", [sample(0), sample(1)])
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert repair(tar)  # nothing to write
    break_image(tar, "00001.jpg")
    before = content(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written: copy a.tar to a folder"):
        repair(tar)
    assert content(tmp_path) == before


@pytest.mark.parametrize("record", ["{", '{"splits": 3}', '{"splits": {"train": {"shards": [{"name": "a.tar"}]}}}'])
def test_a_dataset_json_of_another_kind_stays_as_it_is(tmp_path, record):
    tar = write_tar(tmp_path / "a.tar", [sample(0), sample(1)])
    break_image(tar, "00001.jpg")
    (tmp_path / "dataset.json").write_text(record)
    assert repair(tar)
    assert (tmp_path / "dataset.json").read_text() == record


# Kills.

KILLED_EVERYWHERE = """
import contextlib, io, json, os, shutil, signal, sys
from pathlib import Path
from quarterlight.ssl.shard_config import RepairConfig
from quarterlight.ssl.repair import repair_shards

source, root = Path(sys.argv[1]), Path(sys.argv[2])
EVENTS = {"open", "os.rename", "os.remove", "os.link"}


def repair(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        repair_shards([str(folder / "*.tar")], RepairConfig(num_workers=0))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


tars = {name: data for name, data in content(source).items() if name.endswith(".tar")}
shutil.copytree(source, root / "undisturbed")
repair(root / "undisturbed")
expected = content(root / "undisturbed")
lost, wrong, stages, killed = [], [], set(), True
while killed:
    folder = root / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    killed = killed_before(len(lost) + 1, EVENTS, folder, lambda: repair(folder))
    found = content(folder)
    lost.append([n for n in tars if n not in found or tars[n] not in found.values()])
    stages.add(sum(found.get(name) == expected[name] for name in expected))
    repair(folder)
    found = content(folder)
    wrong.append(sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)))
print(json.dumps([lost, wrong, sorted(stages), sorted(expected)]))
"""


def test_a_kill_at_any_moment_loses_nothing_and_the_same_call_again_repairs_all(tmp_path):
    folder = dataset(tmp_path / "in", count=3, shards=3)
    break_image(folder / "train-000000.tar", "00001.jpg")
    break_header(folder / "train-000002.tar", "00007.jpg")
    (tmp_path / "root").mkdir()
    given = [sys.executable, "-c", KILLED_BEFORE + KILLED_EVERYWHERE, str(folder), str(tmp_path / "root")]
    done = subprocess.run(given, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lost, wrong, stages, names = json.loads(done.stdout)
    assert len(lost) > 30
    assert not any(lost), "bytes of a damaged shard are nowhere, or a shard is gone"
    assert not any(wrong), "differs from an undisturbed repair"
    assert len(stages) >= 4, "killed in several stages"
    assert {"train-000000.tar.damaged", "train-000002.tar.damaged", "left_out.jsonl", "dataset.json"} < set(names)
