"""The settings: documented, frozen, quick to import, and lengths counted in steps."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from quarterlight.finetune.config import FinetuneConfig, FinetuneOptimConfig, LinearProbeConfig
from quarterlight.finetune.probe_config import TrainProbeConfig
from quarterlight.ssl.command import parse_config
from quarterlight.ssl.config import (
    DataConfig,
    EncoderConfig,
    OptimConfig,
    PretrainConfig,
    flat,
    steps_in,
)
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.shard_config import ShardsConfig

ROOT = Path(__file__).parents[1]
SOURCES = (
    ROOT / "ssl" / "config.py",
    ROOT / "ssl" / "convert_config.py",
    ROOT / "finetune" / "config.py",
    ROOT / "finetune" / "probe_config.py",
)
STAGES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "linear_probe": LinearProbeConfig}
STAGES["train_probe"] = TrainProbeConfig
RECIPES = [path for stage in STAGES for path in sorted((ROOT / "configs" / stage).glob("*.yaml"))]


def fields_and_texts() -> list[tuple[str, str, str | None]]:
    """Returns (class, field, the text below it or None) for every field of every config class."""
    found = []
    for source in SOURCES:
        for node in ast.parse(source.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    found.append((node.name, statement.target.id, after.value.value if is_text else None))
    return found


@pytest.mark.parametrize(("owner", "name", "text"), fields_and_texts(), ids=lambda x: str(x)[:30])
def test_every_field_is_documented(owner: str, name: str, text: str | None):
    assert text, f"{owner}.{name} has no text under it"
    assert text.strip().endswith("."), f"{owner}.{name}: {text}"


def test_every_config_class_is_frozen_and_takes_keywords_only():
    for config in (DataConfig, EncoderConfig, OptimConfig, ShardsConfig, FinetuneOptimConfig, *STAGES.values()):
        assert config.__dataclass_params__.frozen, config
        assert all(field.kw_only for field in dataclasses.fields(config)), config


def test_importing_the_configs_imports_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import quarterlight.ssl.config, quarterlight.finetune.config; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = set(done.stdout.split()) - sys.stdlib_module_names - {"quarterlight"}
    assert {name for name in foreign if not name.startswith("__editable__")} == set()


def test_frozen_configs_refuse_assignment():
    config = ShardsConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_defaults_of_two_configs_share_no_dictionary():
    first, second = EncoderConfig(), EncoderConfig()
    assert first.args == {}
    assert first.args is not second.args


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_parse(recipe: Path):
    required = ["--run_dir", "runs/x", "--data.train", "train.tar"]
    config = parse_config(STAGES[recipe.parent.name], "", ["--config", str(recipe), *required])
    assert config.run_dir == "runs/x"


def test_flat_gives_dotted_keys_of_dataclasses_and_of_dictionaries_alike():
    config = PretrainConfig(
        run_dir="r", data=DataConfig(train="t"), encoder=EncoderConfig(args={"depth": 2, "block": {"a": 1}})
    )
    found = flat(config)
    assert found["run_dir"] == "r"
    assert found["data.train"] == "t"
    assert found["optim.base_lr"] == 1.5e-4
    assert found["encoder.args.depth"] == 2
    assert found["encoder.args.block.a"] == 1
    assert flat(dataclasses.asdict(config)) == found


def test_flat_keeps_an_empty_dictionary():
    assert flat({"encoder": {"args": {}}}) == {"encoder.args": {}}


def test_steps_are_taken_as_they_are():
    assert steps_in("the run", 7, None, samples=100, batch_size=3) == 7


@pytest.mark.parametrize(
    ("epochs", "samples", "batch_size", "steps"),
    [(1.0, 10, 5, 2), (1.0, 10, 4, 3), (0.5, 10, 4, 2), (3.0, 1437, 128, 34), (2.0, 3, 8, 1), (0.0, 10, 4, 0)],
)
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, samples: int, batch_size: int, steps: int):
    assert steps_in("the run", None, epochs, samples=samples, batch_size=batch_size) == steps


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (3, 1.0)])
@pytest.mark.parametrize(("what", "prefix"), [("the run", ""), ("warm-up", "optim.warmup_")])
def test_a_length_is_given_exactly_once(what: str, prefix: str, steps: int | None, epochs: float | None):
    with pytest.raises(InputError) as caught:
        steps_in(what, steps, epochs, samples=10, batch_size=2)
    assert f"{prefix}steps={steps}" in str(caught.value)
    assert f"{prefix}epochs={epochs}" in str(caught.value)
