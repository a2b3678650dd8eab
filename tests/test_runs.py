"""Run folders: new, continued, or refused with what differs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from quarterlight.finetune.config import FinetuneConfig, FinetuneDataConfig, LinearProbeConfig
from quarterlight.finetune.probe_config import FewShotConfig, TrainProbeConfig
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import (
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    MaskConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
)
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.runs import git_commit, open_run, plain, write_run_files

DATA = DataConfig(train="train.tar")
TUNING_DATA = FinetuneDataConfig(train="train.tar")


def begin(run_dir: Path, config: RunConfig) -> None:
    """Leaves what a run leaves once it has saved a state."""
    write_run_files(run_dir, config)
    (run_dir / "state" / "step-00000001").mkdir(parents=True)


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(run_dir=str(tmp_path / "runs" / "x"), data=DATA, epochs=2.0, encoder=EncoderConfig(name="v"))


@pytest.fixture
def run_dir(config: PretrainConfig) -> Path:
    """A run folder that `config` has been started in."""
    begin(Path(config.run_dir), config)
    return Path(config.run_dir)


def refusal(config: PretrainConfig | FinetuneConfig | LinearProbeConfig) -> str:
    with pytest.raises(InputError) as caught:
        open_run(config)
    assert config.run_dir in str(caught.value)
    return str(caught.value)


def test_a_new_folder_is_opened(config: PretrainConfig):
    assert open_run(config) == Path(config.run_dir)


def test_an_empty_folder_is_opened(config: PretrainConfig):
    Path(config.run_dir).mkdir(parents=True)
    assert open_run(config) == Path(config.run_dir)


def test_a_folder_with_hidden_files_only_is_opened(config: PretrainConfig):
    Path(config.run_dir).mkdir(parents=True)
    (Path(config.run_dir) / ".config.yaml.123.partial").touch()
    assert open_run(config) == Path(config.run_dir)


def test_the_same_run_is_opened_again(config: PretrainConfig, run_dir: Path):
    assert open_run(config) == run_dir
    assert open_run(dataclasses.replace(config)) == run_dir


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 3.0}, "epochs was 2.0, is 3.0"),
        ({"batch_size": 8}, "batch_size was 256, is 8"),
        ({"precision": "no"}, "precision was bf16, is no"),
        ({"target": "pixels"}, "target was norm_pix, is pixels"),
        ({"init": "runs/y"}, "init was None, is runs/y"),
        ({"optim": OptimConfig(base_lr=1.0)}, "optim.base_lr was 0.00015, is 1.0"),
        ({"optim": OptimConfig(betas=(0.9, 0.5))}, "optim.betas was [0.9, 0.95], is [0.9, 0.5]"),
        ({"mask": MaskConfig(ratio=0.5)}, "mask.ratio was 0.75, is 0.5"),
        ({"decoder": DecoderConfig(depth=1)}, "decoder.depth was 8, is 1"),
        ({"encoder": EncoderConfig(name="w")}, "encoder.name was v, is w"),
        ({"data": DataConfig(train="train.tar", hflip=0.0)}, "data.hflip was 0.5, is 0.0"),
    ],
)
def test_an_option_that_changes_the_result_is_refused_with_the_difference(
    config: PretrainConfig, run_dir: Path, change: dict, difference: str
):
    message = refusal(dataclasses.replace(config, **change))
    assert f"({difference})" in message


def test_all_differences_are_listed(config: PretrainConfig, run_dir: Path):
    message = refusal(dataclasses.replace(config, seed=1, optim=OptimConfig(weight_decay=0.5)))
    assert "(optim.weight_decay was 0.05, is 0.5; seed was 0, is 1)" in message


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"depth": 2}),
        ({"depth": 2}, {}),
        ({"depth": 2}, {"depth": 2, "proj_drop_rate": 0.1}),
        ({"depth": 2}, {"depth": 3}),
    ],
)
def test_an_encoder_argument_given_changed_or_taken_away_is_refused(config: PretrainConfig, before: dict, now: dict):
    started = dataclasses.replace(config, encoder=EncoderConfig(name="v", args=before))
    begin(Path(config.run_dir), started)
    assert open_run(started) == Path(config.run_dir)
    assert "encoder.args" in refusal(dataclasses.replace(config, encoder=EncoderConfig(name="v", args=now)))


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 9},
        {"compile": True},
        {"micro_batch_size": 2},
        {"save_every_steps": 1},
        {"keep_states": 9},
        {"log_every_steps": 1},
        {"record_samples": True},
        {"picture_every_steps": 0},
        {"data": DataConfig(train="elsewhere/train.tar", val="val.tar", max_bad_share=0.5)},
    ],
)
def test_options_that_do_not_change_the_result_may_change(config: PretrainConfig, run_dir: Path, change: dict):
    assert open_run(dataclasses.replace(config, **change)) == run_dir


def test_a_moved_run_is_opened(config: PretrainConfig, run_dir: Path, tmp_path: Path):
    run_dir.rename(tmp_path / "moved")
    assert open_run(dataclasses.replace(config, run_dir=str(tmp_path / "moved"))) == tmp_path / "moved"


def test_a_whole_number_of_epochs_is_the_same_however_it_is_written(config: PretrainConfig, run_dir: Path):
    saved = run_dir / "config.yaml"
    saved.write_text(saved.read_text().replace("epochs: 2.0", "epochs: 2"))
    assert open_run(config) == run_dir


def test_resume_never_refuses_a_run_and_takes_a_new_folder(config: PretrainConfig, run_dir: Path, tmp_path: Path):
    message = refusal(dataclasses.replace(config, resume="never"))
    assert "never" in message
    fresh = dataclasses.replace(config, resume="never", run_dir=str(tmp_path / "fresh"))
    assert open_run(fresh) == tmp_path / "fresh"


def test_a_foreign_folder_is_refused(config: PretrainConfig):
    Path(config.run_dir).mkdir(parents=True)
    (Path(config.run_dir) / "thesis.tex").touch()
    assert "not empty" in refusal(config)


def test_a_run_of_another_command_is_refused(config: PretrainConfig, run_dir: Path):
    probe = LinearProbeConfig(run_dir=config.run_dir, data=DATA, epochs=2, batch_size=256, encoder=config.encoder)
    refusal(probe)


def test_fine_tuning_in_the_folder_of_a_pretraining_is_refused(tmp_path: Path):
    before = PretrainConfig(run_dir=str(tmp_path / "x"), data=DATA, epochs=2.0, init="runs/y")
    tuning = FinetuneConfig(run_dir=str(tmp_path / "x"), data=TUNING_DATA, epochs=2.0, init="runs/y")
    same = OptimConfig(base_lr=tuning.optim.base_lr, min_lr=tuning.optim.min_lr, betas=tuning.optim.betas)
    begin(tmp_path / "x", dataclasses.replace(before, optim=same))
    refusal(tuning)


@pytest.mark.parametrize("content", ["", "seed: [", "- 1\n", "\x00"])
def test_a_damaged_config_is_refused(config: PretrainConfig, run_dir: Path, content: str):
    (run_dir / "config.yaml").write_text(content)
    refusal(config)


def test_a_file_in_the_place_of_the_folder_is_refused(config: PretrainConfig):
    Path(config.run_dir).parent.mkdir(parents=True)
    Path(config.run_dir).touch()
    with pytest.raises((InputError, OSError)) as caught:
        open_run(config)
    assert config.run_dir in str(caught.value)


def test_the_written_config_runs_again_as_it_is(config: PretrainConfig):
    rich = dataclasses.replace(
        config,
        data=DataConfig(train=["a.tar", "b.tar"], img_size=(32, 48), mean=(0.5,), crop_scale=(0.25, 1.0)),
        encoder=EncoderConfig(name="v", args={"depth": 2, "qk_norm": True}),
        optim=OptimConfig(min_lr=1e-6, base_lr=1e-3),
        init="runs/y",
    )
    write_run_files(Path(config.run_dir), rich)
    assert parse_config(PretrainConfig, "", ["--config", str(Path(config.run_dir) / "config.yaml")]) == rich


def test_the_written_config_of_every_stage_is_that_stage_again(tmp_path: Path):
    for stage in (PretrainConfig, FinetuneConfig, LinearProbeConfig, TrainProbeConfig, FewShotConfig):
        data = TUNING_DATA if stage is FinetuneConfig else DATA
        config = stage(run_dir=str(tmp_path / stage.__name__), data=data)
        write_run_files(tmp_path / stage.__name__, config)
        file = tmp_path / stage.__name__ / "config.yaml"
        assert parse_config(stage, "", ["--config", str(file)]) == config
        assert open_run(config) == tmp_path / stage.__name__


def test_plain_is_what_yaml_gives_back(config: PretrainConfig):
    assert yaml.safe_load(yaml.safe_dump(plain(config))) == plain(config)


def test_environment_names_versions_commit_and_facts(config: PretrainConfig):
    write_run_files(Path(config.run_dir), config, processes=3)
    found = json.loads((Path(config.run_dir) / "environment.json").read_text())
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert set(found["packages"]) >= {"quarterlight", "timm", "accelerate"}
    assert found["processes"] == 3
    assert found["git_commit"] == git_commit()


def test_nothing_half_written_is_left_beside_the_run_files(config: PretrainConfig, run_dir: Path):
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "environment.json", "state"}


def test_a_run_that_never_saved_a_state_gives_its_folder_back(config: PretrainConfig):
    write_run_files(Path(config.run_dir), config)
    assert open_run(dataclasses.replace(config, seed=5)) == Path(config.run_dir)


def test_a_folder_that_cannot_be_written_is_refused_by_name(config: PretrainConfig):
    with pytest.raises(InputError, match="run_dir /proc/x cannot be written"):
        open_run(dataclasses.replace(config, run_dir="/proc/x"))


def test_states_whose_config_is_gone_are_no_empty_folder(config: PretrainConfig):
    (Path(config.run_dir) / "state" / "step-00000004").mkdir(parents=True)
    assert "holds states, but its config.yaml is gone: write it anew with --print_config" in refusal(config)
