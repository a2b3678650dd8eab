"""A training step compiles into one graph that serves every batch. In a process of its own: without shape checks."""

import subprocess
import sys

import pytest

STEPS = """
import sys
import torch
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import build_autoencoder

name, args, decoder, options = eval(sys.argv[1])
torch.manual_seed(0)
model = build_autoencoder(name, decoder=DecoderConfig(embed_dim=32, depth=2, num_heads=2, **decoder), **args, **options)
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
print("one graph")
"""
SWIN = {"img_size": 128, "embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
CASES = {
    "swin": ("swin_tiny_patch4_window7_224", {"window_size": 4, **SWIN}, {}, {}),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, {"name": "cross", "multi_scale": True}, {"pred_share": 0.34}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_compiles_into_one_graph_and_is_never_compiled_again(case):
    words = [sys.executable, "-W", "ignore", "-c", STEPS, repr(CASES[case])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "one graph" in done.stdout, done.stderr[-3000:]
