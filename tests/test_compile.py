"""A training step compiles into one graph that serves every batch. In a process of its own: without shape checks."""

import subprocess
import sys

import pytest

STEPS = """
import sys, traceback
import torch
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import build_autoencoder
from quarterlight.ssl.recompute import checkpoint_blocks

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def steps(name, args, decoder, options, recomputed):
    torch.manual_seed(0)
    model = build_autoencoder(name, decoder=DecoderConfig(**SMALL, **decoder), **args, **options)
    if recomputed:
        checkpoint_blocks(model)
    images = torch.randn(3, 3, *model.encoder.img_size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        masking = model.encoder.sample_masking(3, seed=step)
        model.zero_grad()
        wanted = model(images, masking, only_scored=True).loss
        wanted.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        loss = compiled(images, masking, only_scored=True).loss
        loss.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
        torch.compiler.set_stance("fail_on_recompile")


for case, given in eval(sys.argv[1]).items():
    try:
        steps(*given)
        print(f"{case}: one graph", flush=True)
    except Exception:
        print(f"{case}:", file=sys.stderr)
        traceback.print_exc()
    torch.compiler.set_stance("default")
    torch.compiler.reset()
"""
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (1, 2)}
SIMMIM = {"name": "linear"}, {"encode_masked": True, "loss": "l1", "target": "pixels"}
NAMES = {"swin": "swin_tiny_patch4_window7_224", "swin v2": "swinv2_tiny_window8_256"}
CASES: dict[str, tuple[str, dict, dict, dict, bool]] = {  # name, timm's arguments, decoder, options, recomputed
    "vit": ("vit_tiny_patch16_224", VIT, {}, {}, False),
    "vit, cross": ("vit_tiny_patch16_224", VIT, {"name": "cross"}, {"pred_share": 0.34}, True),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}, {}, {}, False),
    "swin": (NAMES["swin"], SWIN, {}, {}, False),
    "swin v2": (NAMES["swin v2"], SWIN, {"name": "cross", "multi_scale": True}, {"pred_share": 0.34}, True),
    "simmim": (NAMES["swin"], SWIN, *SIMMIM, False),
    "simmim v2": (NAMES["swin v2"], SWIN, *SIMMIM, False),
}


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """One process for all: importing takes it longer than a case."""
    words = [sys.executable, "-W", "ignore", "-c", STEPS, repr(CASES)]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("case", CASES)
def test_a_step_compiles_into_one_graph_and_is_never_compiled_again(case, done):
    assert f"{case}: one graph\n" in done.stdout, done.stderr[-5000:]
