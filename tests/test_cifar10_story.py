"""benchmarks/cifar10.py and compare_transformers.py: the commands are ones that launchers take, and do as is said."""

import argparse
import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import write_tars

from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import flat
from quarterlight.ssl.errors import InputError

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import cifar10  # noqa: E402
import compare_transformers  # noqa: E402
from cifar10 import CONFIGS, SCALES, carry_out, finished, story, words, write_page  # noqa: E402


@pytest.mark.parametrize("scale", list(SCALES))
def test_every_command_of_the_story_is_one_that_its_launcher_takes(scale: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = story(SCALES[scale])
    assert len({run.name for run in runs}) == len(runs)
    seen = set()
    for run in runs:
        assert run.init is None or run.init in seen  # carry_out waits for it
        seen.add(run.name)
        config = parse_config(CONFIGS[run.command], None, words(run, "shards/cifar10", Path("runs"))[1:])
        if run.command == "pretrain" and run.group == "options":
            assert config.steps * config.batch_size == pytest.approx(SCALES[scale].short_images, rel=0.01)


def test_a_recipes_batch_is_the_one_that_lengths_are_counted_in():
    for scale in SCALES.values():
        recipe = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{scale.vit}.yaml").read_text())
        assert recipe["batch_size"] == scale.batch_size
        given = flat(recipe)
        for change in cifar10.OPTIONS + scale.rates:  # what is compared is not the recipe again
            assert "seed" in change or any(given.get(key) != value for key, value in change.items()), change


def test_a_story_runs_continues_and_becomes_a_page(tmp_path):
    """A story of three runs on 40 images by the real commands, one of which takes the encoder of another."""
    write_tars(tmp_path / "shards", "train", 40, size=32)
    write_tars(tmp_path / "shards", "val", 20, size=32)
    tiny = {"encoder.args": "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}", "decoder.embed_dim": 24}
    tiny |= {"decoder.depth": 1, "decoder.num_heads": 2, "batch_size": 8, "num_workers": 0, "precision": "no"}
    runs = []
    for run in story(SCALES["cpu"]):
        if run.name in ("mae-0", "short-seed_0", "probe-untrained-0"):
            short = cifar10.length(2) | tiny if run.command == "pretrain" else {"num_workers": 0, "epochs": 1}
            short |= {"data.samples_per_class": 5} if run.command == "linear_probe" else {}
            runs.append(replace(run, options=run.options | short))
    runs.append(cifar10.Run("probe", "fails", "linear_probe", "", {}, "mae-0"))
    runs[-1].options["epochs"] = 0
    folder = tmp_path / "runs"
    folder.mkdir()
    failures = carry_out(runs, str(tmp_path / "shards"), folder, 2)
    assert len(failures) == 1 and failures[0].startswith("fails ended with ") and "epochs is 0" in failures[0], failures
    before = (folder / "mae-0" / "metrics.jsonl").stat().st_mtime_ns
    assert len(carry_out(runs, str(tmp_path / "shards"), folder, 1)) == 1
    assert (folder / "mae-0" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another configuration .mask.ratio was 0.75, is 0.5"):
        finished(replace(runs[0], options=runs[0].options | {"mask.ratio": 0.5}), str(tmp_path / "shards"), folder)
    alone = [run for run in runs if run.name.startswith("probe")]  # as by --only
    (folder / alone[0].name / "result.json").unlink()
    assert carry_out(alone, str(tmp_path / "shards"), folder, 1) == []
    page = tmp_path / "page.md"
    write_page(runs[:-1], "cpu", page, "shards/cifar10", folder)
    text = page.read_text()
    assert "short-seed_0" in text and "`seed 0`" in text and "fails" not in text
    assert (tmp_path / "page_options.png").stat().st_size > 10_000


def test_the_same_start_and_optimizer_give_the_same_losses_as_transformers(tmp_path):
    write_tars(tmp_path / "shards", "train", 40, size=32)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "compare_transformers.py", "--shards", tmp_path / "shards", "--steps", "4"]
        + ["--batch_size", "8", "--depth", "2", "--precision", "no", "--device", "cpu", "--out", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "losses.jsonl").read_text().splitlines()]
    ours, same, own_start, example, shipped = list(lines[0]["loss"])
    for line in lines:
        assert line["loss"][ours] == pytest.approx(line["loss"][same], abs=2e-5)
    first, last = lines[0]["loss"], lines[-1]["loss"]
    assert first[own_start] == first[example] != last[example] and last[own_start] != last[example]
    assert len({round(last[name], 4) for name in (ours, own_start, example, shipped)}) == 4
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == 32


def test_its_batches_are_those_of_the_launcher(tmp_path):
    write_tars(tmp_path / "shards", "train", 40, size=32)
    write_tars(tmp_path / "shards", "val", 20, size=32)
    options = cifar10.length(3) | {"batch_size": 16, "num_workers": 0, "record_samples": True}
    options |= {"encoder.args": "{patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}", "precision": "no"}
    run = cifar10.Run("", "run", "pretrain", "cifar10_vit_cpu", options)
    assert carry_out([run], str(tmp_path / "shards"), tmp_path, 1) == []
    recorded = [json.loads(line) for line in (tmp_path / "run" / "samples-rank0.jsonl").read_text().splitlines()]
    given = argparse.Namespace(shards=tmp_path / "shards", seed=0, batch_size=16, steps=3, depth=1, out=tmp_path)
    seen = []
    for step, batch in enumerate(compare_transformers.batches(given)):
        for key, image, ids in zip(batch.keys, batch.images, batch.masking.ids_keep, strict=True):
            pixels, mask = (zlib.crc32(x.numpy().tobytes()) for x in (image, ids))
            seen.append((step, key, pixels, mask))
    assert len(seen) == 48 and seen == [(x["step"], x["key"], x["pixels"], x["mask"]) for x in recorded]
