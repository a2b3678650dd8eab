"""Command lines and config files: what they give, and how a mistake is answered."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest
import yaml

from quarterlight.finetune.config import FinetuneConfig, FinetuneOptimConfig, LinearProbeConfig, MixingConfig
from quarterlight.finetune.probe_config import FewShotConfig, TrainProbeConfig
from quarterlight.ssl.command import parse_config, run_command
from quarterlight.ssl.config import DataConfig, DecoderConfig, EncoderConfig, OptimConfig, PretrainConfig
from quarterlight.ssl.errors import InputError, did_you_mean

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))
REQUIRED = ("--run_dir", "r", "--data.train", "t")
HEAVY = {"torch", "torchvision", "timm", "accelerate", "numpy", "PIL", "webdataset", "tensorboard", "sklearn"}


def parse(*args: str, config: type = PretrainConfig, required: tuple[str, ...] = REQUIRED):
    return parse_config(config, "A test.", [*required, *args])


def refusal(capsys: pytest.CaptureFixture[str], *args: str, required: tuple[str, ...] = REQUIRED) -> str:
    """Returns the one line that a refused command line leaves on stderr."""
    with pytest.raises(SystemExit) as ended:
        parse(*args, required=required)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def launch(script: Path | str, *args: str, flags: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    path = script if isinstance(script, Path) else ROOT / "launch" / script
    plain = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    return subprocess.run(
        [sys.executable, *flags, str(path), *args], capture_output=True, text=True, env=plain | env, timeout=60
    )


def test_required_options_alone_give_the_defaults():
    assert parse() == PretrainConfig(run_dir="r", data=DataConfig(train="t"))


def test_options_of_every_kind_reach_the_config():
    config = parse(
        "--seed", "3", "--compile", "true", "--epochs", "1.5", "--data.img_size", "[32, 48]", "--data.mean", "[0.5]",
        "--data.val", "['a.tar', 'b.tar']", "--encoder.args", "{patch_size: 4, depth: 2}", "--decoder.depth=1",
        "--optim.betas", "[0.8, 0.9]", "--precision", "no", "--init", "null",
    )  # fmt: skip
    assert config == PretrainConfig(
        run_dir="r",
        seed=3,
        compile=True,
        epochs=1.5,
        precision="no",
        data=DataConfig(train="t", val=["a.tar", "b.tar"], img_size=(32, 48), mean=(0.5,)),
        encoder=EncoderConfig(args={"patch_size": 4, "depth": 2}),
        optim=OptimConfig(betas=(0.8, 0.9)),
        decoder=DecoderConfig(depth=1),
    )


def test_other_stages_have_their_own_groups():
    tuned = parse("--mixing.mixup", "0", "--optim.layer_decay", "0.65", config=FinetuneConfig)
    assert tuned.mixing == MixingConfig(mixup=0.0)
    assert tuned.optim == FinetuneOptimConfig(layer_decay=0.65)
    probe = parse("--base_lrs", "[0.1, 0.2]", "--neighbors", "[5]", config=LinearProbeConfig)
    assert (probe.base_lrs, probe.neighbors) == ((0.1, 0.2), (5,))


def test_an_option_that_is_true_or_false_may_stand_alone():
    alone = parse("--eval_only", "--data.balanced", "--compile", "false", config=FinetuneConfig)
    assert (alone.eval_only, alone.data.balanced, alone.compile) == (True, True, False)
    assert parse("--eval_only=false", "--untrained", config=FinetuneConfig).untrained


def test_only_fine_tuning_can_do_without_shards_to_train_on():
    config = parse("--eval_only", "--data.val", "v", config=FinetuneConfig, required=("--run_dir", "r"))
    assert config.data.train is None


@pytest.mark.parametrize(("given", "wanted"), [("balanced", "balanced"), ("[1, 2.5]", [1.0, 2.5]), ("null", None)])
def test_class_weights_are_a_word_or_numbers(given: str, wanted: object):
    assert parse("--class_weights", given, config=FinetuneConfig).class_weights == wanted


def test_a_file_gives_options_and_a_later_file_wins(tmp_path: Path):
    first = written(tmp_path / "1.yaml", {"seed": 1, "optim": {"base_lr": 1.0, "min_lr": 0.5}})
    second = written(tmp_path / "2.yaml", {"seed": 2, "optim": {"base_lr": 2.0}})
    config = parse("--config", first, "--config", second)
    assert (config.seed, config.optim.base_lr, config.optim.min_lr) == (2, 2.0, 0.5)
    swapped = parse("--config", second, "--config", first)
    assert (swapped.seed, swapped.optim.base_lr) == (1, 1.0)


def test_an_option_after_a_file_wins_over_it(tmp_path: Path):
    file = written(tmp_path / "1.yaml", {"seed": 1, "epochs": 2})
    assert parse("--config", file, "--seed", "9").seed == 9
    assert parse("--config", file, "--seed", "9").epochs == 2


def test_required_options_may_come_from_a_file(tmp_path: Path):
    file = written(tmp_path / "1.yaml", {"run_dir": "r", "data": {"train": ["a", "b"]}})
    assert parse("--config", file, required=()).data.train == ["a", "b"]


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path):
    file = written(tmp_path / "1.yaml", "optim: {base_lr: 1e-3}\n")
    assert parse("--config", file).optim.base_lr == 1e-3
    assert parse("--optim.base_lr", "2e-3").optim.base_lr == 2e-3


def test_a_missing_required_option_is_named(capsys: pytest.CaptureFixture[str]):
    message = refusal(capsys, required=())
    assert "run_dir" in message
    assert "data.train" in message


@pytest.mark.parametrize(
    ("given", "known"),
    [("sede", "seed"), ("optim.base_lrr", "optim.base_lr"), ("data.img_sise", "data.img_size"), ("epocs", "epochs")],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, given: str, known: str
):
    assert f"unknown option {given}. Did you mean {known}?" in refusal(capsys, f"--{given}", "3")
    group, _, key = given.rpartition(".")
    file = written(tmp_path / "1.yaml", {group: {key: 3}} if group else {key: 3})
    assert f"unknown option {given}. Did you mean {known}?" in refusal(capsys, "--config", file)


def test_an_unknown_option_near_none_is_refused_without_a_proposal(capsys: pytest.CaptureFixture[str]):
    message = refusal(capsys, "--xyzzy", "3")
    assert "xyzzy" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize(("short", "full"), [("see", "seed"), ("epoch", "epochs"), ("optim.base", "optim.base_lr")])
def test_an_abbreviated_option_is_refused_with_the_whole_name(
    capsys: pytest.CaptureFixture[str], short: str, full: str
):
    message = refusal(capsys, f"--{short}", "5")
    assert short in message
    assert full in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", "1.5"),
        ("seed", "many"),
        ("epochs", "long"),
        ("precision", "fp8"),
        ("mask.strategy", "stripes"),
        ("optim.betas", "[0.9]"),
        ("optim.betas", "0.9"),
        ("compile", "maybe"),
        ("data.in_chans", "2"),
        ("data.img_size", "[1, 2, 3]"),
        ("encoder.args", "4"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, value: str
):
    assert option in refusal(capsys, f"--{option}", value)
    group, _, key = option.rpartition(".")
    loaded = yaml.safe_load(value)
    file = written(tmp_path / "1.yaml", {group: {key: loaded}} if group else {key: loaded})
    assert option in refusal(capsys, "--config", file)


def test_an_option_without_its_value_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "--seed" in refusal(capsys, "--seed")


@pytest.mark.parametrize("value", [3, None, "fast", [1]])
def test_a_scalar_for_a_group_is_refused_by_the_name_of_the_group(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, value: object
):
    message = refusal(capsys, "--config", written(tmp_path / "1.yaml", {"optim": value}))
    assert "optim" in message
    assert "seed" not in message, "names options that are no group"
    assert "functools" not in message, "shows the inside of the parser"


def test_a_scalar_for_a_group_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "optim" in refusal(capsys, "--optim", "3")


def test_a_missing_config_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "nowhere.yaml" in refusal(capsys, "--config", str(tmp_path / "nowhere.yaml"))


def test_a_folder_is_no_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert str(tmp_path) in refusal(capsys, "--config", str(tmp_path))


@pytest.mark.parametrize("content", ["seed: [\n", "- 1\n- 2\n", "seed\n"])
def test_a_file_that_is_no_mapping_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str):
    refusal(capsys, "--config", written(tmp_path / "broken.yaml", content))


def test_a_file_that_is_no_yaml_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    good, broken = written(tmp_path / "good.yaml", {"seed": 1}), written(tmp_path / "broken.yaml", "seed: [\n")
    assert "broken.yaml" in refusal(capsys, "--config", good, "--config", broken)


def test_a_binary_file_is_no_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"\xff\xfe\x00\x81")
    assert "weights.safetensors" in refusal(capsys, "--config", str(file))


@pytest.mark.parametrize("args", [("--sede", "3"), ("--seed", "x"), ("--config", "nowhere.yaml"), ()])
def test_other_ranks_are_refused_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        parse(*args, required=REQUIRED if args else ())
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("pretrain.py", PretrainConfig),
        ("finetune.py", FinetuneConfig),
        ("linear_probe.py", LinearProbeConfig),
        ("train_probe.py", TrainProbeConfig),
        ("few_shot.py", FewShotConfig),
    ],
)
def test_a_printed_config_fed_back_gives_the_same_config(tmp_path: Path, script: str, config: type):
    args = [
        *REQUIRED, "--seed", "3", "--data.img_size", "[32, 48]", "--data.std", "[0.25]", "--encoder.args.depth", "2",
        "--data.val", "[a, b]", "--init", "hf-hub:a/b",
    ]  # fmt: skip
    done = launch(script, *args, "--print_config")
    assert (done.returncode, done.stderr) == (0, "")
    again = parse_config(config, "", ["--config", written(tmp_path / "printed.yaml", done.stdout)])
    assert again == parse_config(config, "", args)
    assert again.data.img_size == (32, 48)
    twice = launch(script, "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert twice.stdout == done.stdout


@pytest.mark.parametrize(
    "args", [("--sede", "3"), ("--help",), (*REQUIRED, "--print_config")], ids=["error", "help", "print_config"]
)
def test_only_local_rank_0_speaks(args: tuple[str, ...]):
    spoken, silent = launch("pretrain.py", *args, LOCAL_RANK="0"), launch("pretrain.py", *args, LOCAL_RANK="1")
    assert spoken.stdout + spoken.stderr != ""
    assert (silent.stdout, silent.stderr) == ("", "")
    assert silent.returncode == spoken.returncode


def test_a_script_answers_a_mistake_with_one_line_and_status_2():
    done = launch("finetune.py", *REQUIRED, "--mixing.mixupp", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown option mixing.mixupp. Did you mean mixing.mixup?\n"


def test_shards_names_its_missing_arguments():
    done = launch("shards.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "source" in done.stderr
    assert "out_dir" in done.stderr


def test_shards_refuses_a_missing_source_in_one_line(tmp_path: Path):
    done = launch("shards.py", str(tmp_path / "images"), str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: source ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "images") in done.stderr


def documented_options(config: type, prefix: str = "") -> dict[str, str]:
    """Returns {"optim.base_lr": its text in the source, ...}, read from the source itself."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for statement, after in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[statement.target.id] = after.value.value
    found: dict[str, str] = {}
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            found |= documented_options(types[field.name], f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = texts[field.name]
    return found


def config_class_of(script: Path) -> type | None:
    """Returns the one config class that a launch script imports at its top."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("config"):
            names = [alias.name for alias in node.names if alias.name.endswith("Config")]
            return getattr(importlib.import_module(node.module), names[0])
    return None


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_help_documents_every_option_and_imports_nothing_heavy(script: Path):
    done = launch(script, "--help", flags=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & HEAVY == set()
    config = config_class_of(script)
    if config is None:
        return
    shown = re.sub(r"\s", "", done.stdout)
    for option, text in documented_options(config).items():
        assert f"--{option}" in shown, option
        assert re.sub(r"\s", "", text) in shown, option


def answer(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def raises(config: object) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: None, raises)
    return ended.value.code, capsys.readouterr().err


def test_a_mistake_found_while_running_ends_with_one_line_and_status_1(capsys: pytest.CaptureFixture[str]):
    assert answer(InputError("no such thing: make one"), capsys) == (1, "error: no such thing: make one\n")


def test_a_refusal_of_the_system_ends_with_one_line_and_status_1(capsys: pytest.CaptureFixture[str]):
    status, message = answer(PermissionError(13, "Permission denied", "/x"), capsys)
    assert status == 1
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert "/x" in message


def test_an_interrupt_ends_with_status_130(capsys: pytest.CaptureFixture[str]):
    assert answer(KeyboardInterrupt(), capsys) == (
        130,
        "error: interrupted: the same command continues from the newest saved state, if there is one\n",
    )


def test_a_bug_keeps_its_traceback():
    def broken(config: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(lambda: None, broken)


def test_the_result_of_parsing_is_what_runs():
    seen: list[int] = []
    run_command(lambda: 7, seen.append)
    assert seen == [7]


def test_near_names_are_proposed_and_far_ones_are_not():
    assert did_you_mean("vit_tny", ["vit_tiny", "swin_tiny"]) == ". Did you mean vit_tiny?"
    assert did_you_mean("abc", ["xyz"]) == ""
    assert did_you_mean("ab1", ["ab2", "ab3"], most=2).count(" or ") == 1
