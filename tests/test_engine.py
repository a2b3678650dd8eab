"""The loop's own rules; test_pretrain.py and test_finetune.py run it as users do."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import TINY_PRETRAIN, arguments, write_tars
from ranks import Nursery
from safetensors.torch import load_file

from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.engine import micro_batch_size
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.pretrain import pretrain


@pytest.mark.parametrize(
    ("batch", "micro", "world", "wanted"), [(64, None, 1, 64), (64, None, 4, 16), (64, 8, 4, 8), (4096, 32, 8, 32)]
)
def test_micro_batches_follow_from_the_global_batch(batch, micro, world, wanted):
    assert micro_batch_size(batch, micro, world) == wanted


@pytest.mark.parametrize(
    ("batch", "micro", "world", "said"),
    [
        (100, None, 3, "batch_size 100 is not a multiple of the 3 processes: use 99 or 102"),
        (2, None, 4, "use 4"),
        (96, 32, 2, "micro_batch_size 32 does not divide the 48 images .* use 16, 24, 48"),
        (96, 0, 2, "micro_batch_size 0"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_sizes_that_do(batch, micro, world, said):
    with pytest.raises(InputError, match=said):
        micro_batch_size(batch, micro, world)


def run(train: str, run_dir, **more: str) -> None:
    given = TINY_PRETRAIN | {"data.train": train, "run_dir": str(run_dir)} | more
    run_command(lambda: parse_config(PretrainConfig, "", arguments(given)), pretrain)


def damage(path, count: int) -> None:
    """Overwrites the pixels of the first `count` images of a tar."""
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".png")][:count]
    with path.open("r+b") as file:
        for member in images:
            file.seek(member.offset_data + 20)
            file.write(bytes(member.size - 20))


def test_a_damaged_sample_is_replaced_counted_and_listed(tmp_path):
    pattern = write_tars(tmp_path / "shards", "train", 40)
    damage(tmp_path / "shards" / "train-0000.tar", 1)
    run(pattern, tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {(x["key"], x["shard"].rsplit("/", 1)[1]) for x in listed} == {("train00000", "train-0000.tar")}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_samples"] == len(listed) > 0


def test_too_many_damaged_samples_stop_the_run(tmp_path, capsys):
    pattern = write_tars(tmp_path / "shards", "train", 40)
    damage(tmp_path / "shards" / "train-0000.tar", 15)
    with pytest.raises(SystemExit) as ended:
        run(pattern, tmp_path / "run")
    assert ended.value.code == 1
    assert "(data.max_bad_share is 0.01): see bad_samples.jsonl" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, capsys):
    pattern = write_tars(tmp_path / "shards", "train", 40)
    with pytest.raises(SystemExit):
        run(pattern, tmp_path / "run", **{"optim.base_lr": "1e30", "steps": "40", "save_every_steps": "40"})
    assert "the loss is" in (said := capsys.readouterr().err) and "lower optim.base_lr" in said
    assert not (tmp_path / "run" / "encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("num_workers", "-1", "num_workers is -1: it must be at least 0"),
        ("steps", "0", "steps is 0: it must be at least 1"),
        ("data.crop_pct", "0", "data.crop_pct is 0.0: it must be above 0 and at most 1"),
        ("data.crop_scale", "[1.0,0.2]", "the smallest comes first"),
        ("data.auto_augment", "nonsense", "timm has no such policy"),
        ("mask.ratio", "0", "hides none of the 16 units"),
        ("data.val", "nowhere/*.tar", "nowhere/*.tar matches no file"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_trained(shards, tmp_path, capsys, option, value, said):
    with pytest.raises(SystemExit) as ended:
        run(shards[0], tmp_path / "run", **{option: value})
    assert ended.value.code in (1, 2) and said in capsys.readouterr().err
    assert not (tmp_path / "run" / "state").exists()


def test_a_run_killed_before_its_last_export_is_repaired_by_the_same_command(shards, tmp_path):
    run(shards[0], tmp_path / "run")
    encoder = tmp_path / "run" / "encoder.safetensors"
    before = load_file(encoder)
    encoder.unlink()
    shutil.rmtree(tmp_path / "run" / "hub")
    (tmp_path / "run" / "result.json").unlink()
    run(shards[0], tmp_path / "run")
    assert all(torch.equal(x, before[name]) for name, x in load_file(encoder).items())
    assert (tmp_path / "run" / "hub" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["loss"] > 0


def test_one_bad_sample_an_epoch_never_stops_a_long_run(tmp_path):
    pattern = write_tars(tmp_path / "shards", "train", 200, per_shard=200)
    damage(tmp_path / "shards" / "train-0000.tar", 1)
    run(pattern, tmp_path / "run", batch_size="100", steps="40", save_every_steps="40", log_every_steps="10")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_samples"] >= 20


COUNT_GRAPHS = """
import sys, torch
compiled = []
original = torch.nn.Module.compile
def backend(graph, inputs):
    compiled.append(graph)
    return graph
torch.nn.Module.compile = lambda self: original(self, backend=backend)
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import PretrainConfig
from quarterlight.ssl.pretrain import pretrain
run_command(lambda: parse_config(PretrainConfig, ""), pretrain)
print("graphs:", len(compiled))
"""


def test_a_compiled_run_is_compiled_once(shards, tmp_path):
    given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(tmp_path / "run"), "compile": "true", "steps": "6"}
    words = [sys.executable, "-c", COUNT_GRAPHS, *arguments(given)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    graphs = int(done.stdout.rsplit("graphs: ", 1)[1])
    assert 0 < graphs <= 2  # training, and the picture at the end


def test_a_run_of_four_processes_is_continued_with_the_same_bits(shards, tmp_path):
    """Two processes are not enough: how numbers are added up matters only from three on."""
    nursery = Nursery(tmp_path)

    def finish(name: str) -> dict[str, torch.Tensor]:
        given = TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(tmp_path / name), "keep_states": "3"}
        with nursery.run(4, given) as ranks:
            assert [rank.ended() for rank in ranks] == [0, 0, 0, 0], ranks[0].said()
        return load_file(tmp_path / name / "state" / "step-00000012" / "model.safetensors")

    wanted = finish("undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "continued")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "continued" / "state" / f"step-{step:08d}")
    ours = finish("continued")
    nursery.close()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
