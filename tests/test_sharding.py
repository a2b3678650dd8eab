"""FSDP2 on two CPU processes: the same run, whoever holds which part of it."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_PRETRAIN, command
from safetensors.torch import load_file
from test_stopping import ENVIRONMENT, UNTIL, logged, result

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate's launcher sets for such a config
SWIN = {
    "encoder.name": "swin_tiny_patch4_window7_224", "data.img_size": "64", "data.crop_pct": "1",
    "encoder.args": "{embed_dim: 12, depths: [2, 2, 2, 2], num_heads: [1, 2, 3, 4], window_size: 2}",
}  # fmt: skip


def run(
    stage: str, options: dict[str, str], *, processes: int = 2, sharded: bool = False
) -> subprocess.CompletedProcess:
    words = command(f"{stage}.py", options, processes=processes)
    environment = ENVIRONMENT | (SHARDED if sharded else {})
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def pretraining(shards, run_dir: Path, **more: str) -> dict[str, str]:
    return TINY_PRETRAIN | {"data.train": shards[0], "run_dir": str(run_dir), "log_every_steps": "1"} | more


def assert_close(a: Path, b: Path) -> None:
    ours, wanted = load_file(a), load_file(b)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        compared = torch.ones(len(value), dtype=torch.bool) if value.ndim else ...
        if name.endswith("qkv.bias"):  # softmax does not depend on the keys' part: rounding alone moves it
            compared[len(value) // 3 : 2 * len(value) // 3] = False
        torch.testing.assert_close(ours[name][compared], value[compared], rtol=1e-4, atol=1e-5)


CLIPPED = {"optim.clip_grad": "0.5", "micro_batch_size": "2", "grad_checkpointing": "true"}


@pytest.mark.parametrize("more", [{}, SWIN, CLIPPED])
def test_a_sharded_run_learns_and_releases_what_an_unsharded_one_does(shards, tmp_path, more):
    more = more | {"picture_every_steps": "6"}
    run("pretrain", pretraining(shards, tmp_path / "ddp", **more))
    run("pretrain", pretraining(shards, tmp_path / "fsdp", **more), sharded=True)
    ours, wanted = logged(tmp_path / "fsdp"), logged(tmp_path / "ddp")
    for a, b in zip(ours, wanted, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for file in ("encoder", "hub/model", "state/step-00000012/model", "state/step-00000012/optimizer"):
        assert_close(tmp_path / "fsdp" / f"{file}.safetensors", tmp_path / "ddp" / f"{file}.safetensors")
    assert (tmp_path / "fsdp" / "reconstructions.png").stat().st_size > 1000


PARTS = """
import runpy, torch
from quarterlight.ssl import engine
original = engine._Loop._step
def step(self, number):
    original(self, number)
    if number == 0:
        kinds = {name: type(p).__name__ for name, p in self.task.named_parameters() if "blocks.1" in name}
        local = sum(p._local_tensor.numel() for p in self.task.parameters())
        print("parts", set(kinds.values()), local / sum(p.numel() for p in self.task.parameters()), flush=True)
engine._Loop._step = step
runpy.run_path(SCRIPT, run_name="__main__")
"""


def test_processes_really_hold_parts(shards, tmp_path):
    words = command("pretrain.py", pretraining(shards, tmp_path / "run", steps="2"), processes=2)
    at = next(i for i, word in enumerate(words) if word.endswith("pretrain.py"))
    (tmp_path / "parts.py").write_text(PARTS.replace("SCRIPT", repr(words[at])))
    words[at] = str(tmp_path / "parts.py")
    done = subprocess.run(words, env=ENVIRONMENT | SHARDED, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("parts")]
    assert len(said) == 2 and all("{'DTensor'}" in line and 0.45 < float(line.split()[-1]) < 0.55 for line in said), (
        said
    )


def test_a_run_moves_between_sharded_and_not(shards, tmp_path):
    """4 steps each on two processes sharded, on one, on two unsharded, on two sharded; a state is the same file."""
    run("pretrain", pretraining(shards, tmp_path / "plain", steps="16"), processes=1)
    for i, (processes, sharded) in enumerate([(2, True), (1, False), (2, False), (2, True)]):
        options = pretraining(shards, tmp_path / "moved", steps="16", save_every_steps="4", keep_states="9")
        stop_at = 4 * (i + 1)
        words = command("pretrain.py", options, processes=processes)
        at = next(k for k, word in enumerate(words) if word.endswith("pretrain.py"))
        script = tmp_path / f"until{stop_at}.py"
        script.write_text(UNTIL.format(stop_at=stop_at, script=words[at]))
        words[at] = str(script)
        environment = ENVIRONMENT | (SHARDED if sharded else {})
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
        assert (done.returncode == 0) == (stop_at == 16), done.stderr
        assert result(tmp_path / "moved")["finished"] == (stop_at == 16)
    ours, wanted = logged(tmp_path / "moved"), logged(tmp_path / "plain")
    assert [x["step"] for x in ours] == list(range(1, 17))
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in zip(ours, wanted, strict=True))
    assert_close(tmp_path / "moved" / "encoder.safetensors", tmp_path / "plain" / "encoder.safetensors")


def test_a_sharded_classifier_is_evaluated_and_released(shards, tmp_path):
    def options(name: str) -> dict[str, str]:
        given = {"batch_size": "8", "micro_batch_size": "4", "steps": "12", "optim.warmup_steps": "2"}
        given |= {"log_every_steps": "1", "evaluate_every_steps": "6", "run_dir": str(tmp_path / name)}
        return TINY | given | {"data.train": shards[0], "data.val": shards[1]}

    run("finetune", options("ddp"))
    run("finetune", options("fsdp"), sharded=True)
    ours, wanted = ([x for x in logged(tmp_path / name) if "val_top1" in x] for name in ("fsdp", "ddp"))
    assert [x["val_loss"] for x in ours] == [pytest.approx(x["val_loss"], rel=1e-3) for x in wanted]
    assert [x["val_images"] for x in ours] == [21, 21]
    for file in ("classifier", "classifier_best", "hub/model"):
        assert_close(tmp_path / "fsdp" / f"{file}.safetensors", tmp_path / "ddp" / f"{file}.safetensors")


def test_the_config_for_eight_gpus_asks_accelerate_for_the_second_version(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp8.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2 and str(config.distributed_type).endswith("FSDP")
