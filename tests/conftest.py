"""Shards of small pictures, and the real commands as processes."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # two threads on shared cores can be many times slower than one

KILLED_BEFORE = """
import os, signal, sys


def killed_before(event_number, events, root, action):
    count = 0

    def hook(event, args):
        nonlocal count
        if event in events and str(args[0]).startswith(str(root)):
            count += 1
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""  # for scripts run by tests: does a SIGKILL before this change on disk below `root` hit `action`?


def write_tars(folder: Path, name: str, count: int, *, per_shard: int = 20, classes: int = 4, size: int = 20) -> str:
    """Writes labelled PNGs whose color tells the class, with webdataset's own writer. Returns a glob."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(name))
    for first in range(0, count, per_shard):
        with webdataset.TarWriter(str(folder / f"{name}-{first // per_shard:04d}.tar")) as tar:
            for i in range(first, min(count, first + per_shard)):
                label = i % classes
                pixels = random.integers(0, 80, (size, size, 3), np.uint8)
                pixels[:, : size // 2, label % 3] += np.uint8(100 + 20 * label)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="PNG")
                tar.write({"__key__": f"{name}{i:05d}", "png": buffer.getvalue(), "cls": str(label).encode()})
    return str(folder / f"{name}-*.tar")


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> tuple[str, str]:
    """Returns the globs of 60 training and 21 evaluation images of four classes."""
    folder = tmp_path_factory.mktemp("shards")
    return write_tars(folder, "train", 60), write_tars(folder, "val", 21)


TINY = {
    "encoder.name": "vit_tiny_patch16_224",
    "encoder.args": "{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
    "data.img_size": "16",
    "data.crop_pct": "1",
    "precision": "no",
    "num_workers": "0",
}
TINY_PRETRAIN = TINY | {
    "decoder": "{embed_dim: 16, depth: 1, num_heads: 2}",
    "optim.base_lr": "1e-2",
    "optim.warmup_steps": "2",
    "batch_size": "8",
    "steps": "12",
    "save_every_steps": "4",
    "log_every_steps": "2",
    "picture_every_steps": "0",
}


def arguments(options: dict[str, str]) -> list[str]:
    """Returns command-line arguments."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def command(script: str, options: dict[str, str], *, processes: int = 1) -> list[str]:
    """Returns the command line of a launch script, alone or as several CPU processes under accelerate's launcher."""
    run = [sys.executable]
    if processes > 1:
        config = ROOT / "configs" / "accelerate" / "cpu2.yaml"
        run += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), "--main_process_port", "0"]
        run += ["--num_processes", str(processes)]
    return [*run, str(ROOT / "launch" / script), *arguments(options)]


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function that runs a launch script to its end: launch("pretrain.py", options, processes=2)."""

    def run(script: str, options: dict[str, str], *, processes: int = 1, check: bool = True, **more):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            command(script, options, processes=processes),
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            **more,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{script} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        return done

    return run
