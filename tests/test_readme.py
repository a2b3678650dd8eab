"""The README's section on using weights, run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, TINY_PRETRAIN
from PIL import Image
from safetensors.torch import load_file
from test_kinds import in_maes_layout, mae, saved

from quarterlight.ssl.released import load_autoencoder


def snippets(section: str) -> list[tuple[str, str]]:
    """Returns (language, text) of the code in a section of the README."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


def test_the_snippets_on_weights_run_as_they_stand(tmp_path, shards, launch, monkeypatch):
    """After a run that goes on from the full file, at a learning rate of 0."""
    monkeypatch.chdir(tmp_path)
    model = mae(img_size=16, patch_size=4)
    saved(Path("mae_pretrain_vit_base_full.pth"), {"model": in_maes_layout(model)})
    options = {key: value for key, value in TINY_PRETRAIN.items() if not key.startswith(("encoder", "decoder"))}
    options |= {
        "init": "mae_pretrain_vit_base_full.pth",
        "init_decoder": "true",
        "optim.base_lr": "0",
        "optim.warmup_steps": "0",
    }
    options |= {"decoder": "{embed_dim: 64, depth: 2, num_heads: 2}", "data.train": shards[0], "run_dir": "runs/base"}
    done = launch("pretrain.py", options)
    assert "30 of 30 encoder tensors loaded" in done.stdout and "31 of 31 decoder tensors loaded" in done.stdout
    masking, x = model.encoder.sample_masking(2), torch.randn(2, 3, 16, 16)
    assert torch.equal(load_autoencoder("runs/base")(x, masking).loss, model(x, masking).loss)

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save("photo.jpg")
    Path("launch").symlink_to(ROOT / "launch")
    found = snippets("Use the weights")
    assert [language for language, _ in found] == ["python", "python", "sh"]
    for language, code in found:
        if language == "python":
            names: dict = {}
            exec(code, names)
            if "tokens" in names:
                assert names["tokens"].shape == (1, 17, 64) and names["is_masked"].sum() == 12
        else:
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            subprocess.run(code, shell=True, check=True, env=environment, capture_output=True, timeout=240)
    assert len(load_file("mae_base.safetensors")) == 30
