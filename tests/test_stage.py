"""What every stage does before it starts: damaged shards, the options of the order, and numbers that cannot be."""

import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TINY, TINY_PRETRAIN, arguments, write_tars

from quarterlight.finetune.classify import finetune
from quarterlight.finetune.config import FinetuneConfig, LinearProbeConfig
from quarterlight.finetune.linear_probe import linear_probe
from quarterlight.ssl import stage as stage_module
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import DataConfig, PretrainConfig
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.pretrain import pretrain
from quarterlight.ssl.stage import cache_folder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def start(given: dict[str, str], stage: Callable[..., Any] = pretrain, kind: type = PretrainConfig) -> Path:
    """Runs a command in this process. Returns its run_dir."""
    try:
        run_command(lambda: parse_config(kind, "", arguments(given)), stage)
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
    return Path(given["run_dir"])


def refusal(capsys, given: dict[str, str], *command: Any) -> str:
    """Returns the one sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        start(given, *command)
    printed = capsys.readouterr().err
    assert ended.value.code in (1, 2)
    assert printed.startswith("error: ") and len(printed.splitlines()) == 1, printed
    return printed


def options(train: str, run_dir: Path, **more: str) -> dict[str, str]:
    short = {"steps": "3", "optim.warmup_steps": "1", "record_samples": "true"}
    return TINY_PRETRAIN | short | {"data.train": train, "run_dir": str(run_dir)} | more


def probe_options(train: str, val: str, run_dir: Path) -> dict[str, str]:
    more = {"epochs": "2", "batch_size": "16", "neighbors": "[5]", "extract_batch_size": "16"}
    return TINY | more | {"data.train": train, "data.val": val, "run_dir": str(run_dir)}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(run_dir: Path) -> list[list[dict[str, Any]]]:
    """What each step has seen, in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for record in lines(run_dir / "samples-rank0.jsonl"):
        found.setdefault(record["step"], []).append(record)
    return list(found.values())


def keys(run_dir: Path) -> list[list[str]]:
    return [[record["key"] for record in step] for step in steps(run_dir)]


def damage(path: Path, samples: range) -> tuple[int, int]:
    """Overwrites these samples of a tar, headers and all. Returns the bytes' offset and number."""
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar][::2]  # each sample has an image and a label
    first, stop = starts[samples.start], starts[samples.stop]
    with path.open("r+b") as file:
        file.seek(first)
        file.write(b"\xff" * (stop - first))
    return first, stop - first


# Damaged shards


@pytest.fixture
def damaged(tmp_path) -> tuple[str, Path, int, int]:
    """60 images in three shards, of which the second lacks three: the glob, that shard, and what is lost of it."""
    train = write_tars(tmp_path / "shards", "train", 60, size=66)
    shard = tmp_path / "shards" / "train-0001.tar"
    return train, shard, *damage(shard, range(5, 8))


def test_a_run_says_which_shard_is_damaged_and_trains_on_the_rest(damaged, tmp_path, capsys):
    train, shard, offset, size = damaged
    given = options(train, tmp_path / "run", steps="null", epochs="1")
    run_dir = start(given)
    said = capsys.readouterr().out
    assert said.count("lost in damaged shards, about 3 samples in all:") == 1
    assert said.count(f"{shard}: a damaged header (byte {offset}, {size} bytes lost)") == 1
    (listed,) = lines(run_dir / "bad_samples.jsonl")
    assert (listed["step"], listed["shard"], listed["offset"], listed["size"]) == (-1, str(shard), offset, size)
    seen = Counter(key for step in keys(run_dir)[:-1] for key in step)  # the last step ends in the next epoch
    assert set(seen.values()) == {1}
    wanted = {f"train{i:05d}" for i in range(60)} - {f"train{i:05d}" for i in range(25, 28)}
    assert set(sum(keys(run_dir), [])) == wanted
    start(given)  # nothing is left to do, and what was listed is not listed twice
    assert lines(run_dir / "bad_samples.jsonl") == [listed]


def test_a_run_that_continues_keeps_the_list(damaged, tmp_path):
    train, _, _, _ = damaged
    given = options(train, tmp_path / "run", save_every_steps="1")
    run_dir = start(given)
    before = (run_dir / "bad_samples.jsonl").read_text()
    for file in (run_dir / "state" / "step-00000003").iterdir():
        file.unlink()
    (run_dir / "state" / "step-00000003").rmdir()
    start(given)
    assert (run_dir / "bad_samples.jsonl").read_text() == before


def test_more_damage_than_may_be_is_refused_with_the_shards(tmp_path, capsys):
    train = write_tars(tmp_path / "shards", "train", 60, size=66)
    shard = tmp_path / "shards" / "train-0002.tar"
    damage(shard, range(2, 15))
    said = refusal(capsys, options(train, tmp_path / "run"))
    assert re.match(r"error: about 1\d of 6\d samples are lost in damaged shards \(data.max_bad_share is 0.01\)", said)
    assert f"{shard}: a damaged header" in said
    assert "raise data.max_bad_share, or leave out what is lost with launch/shards.py repair" in said
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
    run_dir = start(options(train, tmp_path / "run", **{"data.max_bad_share": "0.3"}))
    assert len(lines(run_dir / "bad_samples.jsonl")) == 1


def test_odd_labels_are_told_and_do_not_stop_a_run_without_labels(tmp_path, capsys):
    train = write_tars(tmp_path / "shards", "train", 20)
    shard = tmp_path / "shards" / "train-0000.tar"
    with tarfile.open(shard) as tar:
        offset = tar.getmember("train00004.cls").offset_data
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    run_dir = start(options(train, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "noticed in the shards:" in said and "lost" not in said
    assert f"{shard}: label of train00004.cls is b'x', not a class number (byte {offset})" in said
    assert [line["size"] for line in lines(run_dir / "bad_samples.jsonl")] == [0]


def test_nothing_is_said_of_whole_shards(shards, tmp_path, capsys):
    run_dir = start(options(shards[0], tmp_path / "run"))
    said = capsys.readouterr().out
    assert "damaged" not in said and "noticed" not in said
    assert not (run_dir / "bad_samples.jsonl").exists()


def test_damaged_shards_to_evaluate_on_are_refused_by_name(damaged, shards, tmp_path, capsys):
    broken, shard, offset, _ = damaged
    named = f"error: {shard}: a damaged header (byte {offset}, "
    more = {"data.val": broken}
    assert refusal(capsys, options(shards[0], tmp_path / "a", **more)).startswith(named)
    tuning = TINY | {"data.train": shards[0], "run_dir": str(tmp_path / "b"), "batch_size": "8", "steps": "1"} | more
    assert refusal(capsys, tuning, finetune, FinetuneConfig).startswith(named)
    probe = probe_options(shards[0], broken, tmp_path / "c")
    said = refusal(capsys, probe, linear_probe, LinearProbeConfig)
    assert said.startswith(named) and "an evaluation must count every image" in said


def test_a_probe_refuses_damage_in_what_it_learns_from(damaged, shards, tmp_path, capsys):
    broken, shard, _, _ = damaged
    given = probe_options(broken, shards[1], tmp_path / "run")
    assert refusal(capsys, given, linear_probe, LinearProbeConfig).startswith(f"error: {shard}: a damaged header")
    assert not (tmp_path / "run" / "result.json").exists()


# The order


def test_repeats_show_an_image_several_times_in_a_row(shards, tmp_path):
    run_dir = start(options(shards[0], tmp_path / "run", **{"data.repeats": "2"}))
    plain = [key for step in keys(start(options(shards[0], tmp_path / "plain"))) for key in step]
    assert [key for step in keys(run_dir) for key in step] == [key for key in plain[:12] for _ in range(2)]
    for step in steps(run_dir):
        for first, second in zip(step[::2], step[1::2], strict=True):
            assert first["pixels"] != second["pixels"]
        assert len({record["mask"] for record in step}) > 4


def test_blocks_keep_to_few_shards_at_a_time(shards, tmp_path):
    given = options(shards[0], tmp_path / "run", steps="7", **{"data.block_samples": "20"})
    seen = [key for step in keys(start(given)) for key in step]
    shard_numbers = [int(key.removeprefix("train")) // 20 for key in seen]
    assert [len(set(shard_numbers[first : first + 20])) for first in (0, 20)] == [1, 1]
    assert len(set(seen[:56])) == 56


def test_lanes_go_through_parts_of_their_own(shards, tmp_path):
    given = options(shards[0], tmp_path / "run", steps="7", **{"data.lanes": "2", "data.block_samples": "20"})
    seen = keys(start(given))
    in_lanes = [[key for step in seen for key in step[lane : lane + 4]] for lane in (0, 4)]
    assert len({key for lane in in_lanes for key in lane}) == 56
    for lane in in_lanes:
        assert len({int(key.removeprefix("train")) // 20 for key in lane}) == 2  # 28 images of blocks of 20


def test_sources_are_mixed_by_their_weights(shards, tmp_path):
    given = options("::".join(shards), tmp_path / "run", steps="null", epochs="1", batch_size="12")
    seen = Counter(key for step in keys(start(given | {"data.train_weights": "[0.5,2]"})) for key in step)
    counts = [[count for key, count in seen.items() if key.startswith(name)] for name in ("train", "val")]
    assert (len(counts[0]), sum(counts[0])) == (30, 30)
    assert (len(counts[1]), set(counts[1])) == (21, {2})  # 72 positions are an epoch


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.repeats": "0"}, "data.repeats is 0: it must be at least 1"),
        ({"data.repeats": "1.5"}, "data.repeats is 1.5: it must be a whole number"),
        ({"data.block_samples": "0"}, "data.block_samples is 0: it must be at least 1"),
        ({"data.lanes": "0"}, "data.lanes is 0: it must be at least 1"),
        ({"data.lanes": "6"}, "data.lanes 6 does not divide batch_size 8: use 1, 2, 4, 8"),
        ({"data.cache_gb": "-1"}, "data.cache_gb is -1.0: it must be above 0"),
        ({"data.max_bad_share": "2"}, "data.max_bad_share is 2.0: it must be at least 0 and at most 1"),
        ({"data.train_weights": "[]"}, "data.train_weights is empty: give at least one number"),
        ({"data.train_weights": "[1,0]"}, "data.train_weights is 0.0: it must be at least 0.001 and at most 1000"),
        ({"data.train_weights": "[1,0.0009]"}, "data.train_weights is 0.0009: it must be at least 0.001"),
        (
            {"data.train_weights": "[1,1001]"},
            "data.train_weights is 1001.0: it must be at least 0.001 and at most 1000",
        ),
        ({"data.repeats": "3"}, "data.repeats 3 does not divide 8, the images of a lane in a batch (batch_size 8"),
        ({"data.repeats": "4", "data.lanes": "4"}, "data.repeats 4 does not divide 2, the images of a lane"),
        ({"data.repeats": "4", "micro_batch_size": "2"}, "data.repeats 4 does not divide the 2 images that a process"),
        ({"data.train_weights": "[1,2,3]"}, "data.train_weights has 3 numbers for 2 sources in data.train"),
        ({"data.train_weights": "[.nan,1]"}, "data.train_weights is nan: it must be at least 0.001 and at most 1000"),
        ({"data.train_weights": "[.inf,1]"}, "data.train_weights"),
        ({"data.cache_gb": ".nan"}, "data.cache_gb is nan: it must be above 0"),
        ({"data.cache_gb": ".inf"}, "data.cache_gb"),
    ],
    ids=lambda x: " ".join(f"{key}={value}" for key, value in x.items()) if isinstance(x, dict) else "",
)
def test_numbers_that_cannot_be_are_refused_in_one_sentence(shards, tmp_path, capsys, change, said):
    assert said in refusal(capsys, options("::".join(shards), tmp_path / "run", **change))


def test_a_source_that_another_one_holds_already_cannot_be_weighed(shards, tmp_path, capsys):
    given = options(f"{shards[0]}::{shards[0]}", tmp_path / "run", **{"data.train_weights": "[1,1]"})
    assert "data.train: source 2 of 2 has no samples of its own" in refusal(capsys, given)


@pytest.mark.parametrize("what", ["weights", "number of weights"])
def test_what_costs_nothing_to_look_at_is_refused_before_the_shards_are_read(
    shards, tmp_path, capsys, monkeypatch, what
):
    def too_early(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the shards were opened")

    monkeypatch.setattr("quarterlight.ssl.stage.open_index", too_early)
    if what == "weights":
        tuning = TINY | {"data.train": shards[0], "data.val": shards[1], "run_dir": str(tmp_path / "run"), "steps": "1"}
        more = {"init": str(tmp_path / "none.safetensors"), "batch_size": "8"}
        assert "none.safetensors" in refusal(capsys, tuning | more, finetune, FinetuneConfig)
        return
    given = options(shards[0], tmp_path / "run", **{"data.train_weights": "[1,2]"})
    assert "2 numbers for 1 sources" in refusal(capsys, given)


def test_small_images_are_decoded_once_a_set(shards, tmp_path, capsys, monkeypatch):
    looked, find = [], stage_module.find_small_images

    def counted(index: ShardIndex, *args: Any) -> Any:
        looked.append(index.paths[0])
        return find(index, *args)

    monkeypatch.setattr(stage_module, "find_small_images", counted)
    start(options(shards[0], tmp_path / "run", **{"data.val": shards[1]}))
    assert len(looked) == len(set(looked)) == 2


# A run that goes on


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data.lanes": "2"}, "another order of samples (lanes 1, now 2;"),
        ({"data.block_samples": "20"}, "; block_samples 81, now 20;"),
        ({"data.repeats": "2"}, "(data.repeats was 1, is 2)"),
        ({"data.train_weights": "[1,2]"}, "(data.train_weights was None, is [1.0, 2.0])"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_run_goes_on_only_in_the_order_in_which_it_began(shards, tmp_path, capsys, change, reason):
    given = options("::".join(shards), tmp_path / "run", save_every_steps="1")
    start(given)
    _forget_the_end(tmp_path / "run")
    assert reason in refusal(capsys, given | change)
    start(given)


def test_sources_that_are_parted_otherwise_are_another_order(tmp_path, capsys):
    """`{a,b}::c` and `a::{b,c}` name the same shards, and weights mean other samples."""
    write_tars(tmp_path / "shards", "train", 60)
    folder = f"{tmp_path}/shards/train-"
    given = options("", tmp_path / "run", save_every_steps="1", **{"data.train_weights": "[1,1]"})
    first = given | {"data.train": f"{folder}{{0000,0001}}.tar::{folder}0002.tar"}
    start(first)
    _forget_the_end(tmp_path / "run")
    said = refusal(capsys, first | {"data.train": f"{folder}0000.tar::{folder}{{0001,0002}}.tar"})
    assert "the run began with another order of samples" in said
    assert "samples_of_sources [40, 20], now [20, 40]" in said and "and the sources as they were" in said
    start(first)
    assert (tmp_path / "run" / "result.json").exists()


def _forget_the_end(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "state" / "step-00000003")
    (run_dir / "result.json").unlink()


# The cache


def test_where_fetched_shards_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(DataConfig(train="t")) == tmp_path / ".cache" / "quarterlight" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataConfig(train="t")) == tmp_path / "xdg" / "quarterlight" / "shards"
    assert cache_folder(DataConfig(train="t", cache_dir="~/mine")) == tmp_path / "mine"
