"""The README's section on using weights, run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT, TINY_PRETRAIN
from PIL import Image
from safetensors.torch import load_file
from test_kinds import in_maes_layout, mae, saved


def snippets(section: str) -> list[tuple[str, str]]:
    """Returns (language, text) of the code in a section of the README."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


def test_the_snippets_on_weights_run_as_they_stand(tmp_path, shards, launch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch("pretrain.py", TINY_PRETRAIN | {"data.train": shards[0], "run_dir": "runs/base"})
    saved(Path("mae_pretrain_vit_base_full.pth"), {"model": in_maes_layout(mae(img_size=16, patch_size=4))})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save("photo.jpg")
    Path("launch").symlink_to(ROOT / "launch")
    found = snippets("Use the weights")
    assert [language for language, _ in found] == ["python", "python", "sh"]
    for language, code in found:
        if language == "python":
            names: dict = {}
            exec(code, names)
            if "tokens" in names:
                assert names["tokens"].shape == (1, 17, 24) and names["is_masked"].sum() == 12
        else:
            environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            subprocess.run(code, shell=True, check=True, env=environment, capture_output=True, timeout=240)
    assert len(load_file("mae_base.safetensors")) == 30
