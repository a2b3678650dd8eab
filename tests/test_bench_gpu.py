"""benchmarks/bench_gpu.py on the CPU with toy models, and the formulas behind its MFU."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.ssl.attention import choose_attention

sys.path.append(str(ROOT / "benchmarks"))
import gpu_rows  # noqa: E402
from bench_gpu import parse  # noqa: E402
from contestants import builder  # noqa: E402
from flops import forward_flops, nominal_tflops  # noqa: E402
from gpu_report import shards_verdict  # noqa: E402
from gpu_rows import Row, covered, kind_of, search  # noqa: E402
from models import MODELS  # noqa: E402
from step import Step  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
QUICK = [
    "--device",
    "cpu",
    "--batch_sizes",
    "2,4",
    "--rounds",
    "2",
    "--photos",
    "8",
    "--workers",
    "1",
    "--threads",
    "1",
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, env=environment)


def figures(text: str) -> dict:
    return json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])


def test_all_rows_are_written_with_verdicts_and_more_of_them_later(tmp_path):
    out = tmp_path / "results.md"
    done = run(*QUICK, "--models", "vit_toy,swin_toy", "--variants", "eager", "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    found = figures(text)
    wanted = [f"steps {model} {what} eager" for model in ("vit_toy", "swin_toy") for what in ("ours", "hf")]
    wanted += ["profile of steps vit_toy ours eager", "profile of steps swin_toy ours eager", "device"]
    wanted += [
        "steps vit_toy cross eager",
        "steps swin_toy simmim eager",
        "shards vit_toy ours",
        "shards vit_toy ours 1",
    ]
    assert sorted(found) == sorted(wanted)
    assert {name: x["error"] for name, x in found.items() if "error" in x} == {}
    assert "nan" not in text.lower() and "| inf" not in text and "Not reached" not in text
    assert "| vit_base: 5500 images/s |  | not measured |" in text
    assert "| by 1 workers |" in text and "## What is left of swin_toy, eager" in text
    assert f"--models vit_toy,swin_toy --variants eager --out {out}" in text

    words = [*QUICK, "--models", "vit_toy", "--contestants", "ours", "--out", str(out), "--resume"]
    again = run(*words, "--variants", "eager,compiled", "--backend", "aot_eager")
    assert again.returncode == 0, again.stderr[-3000:]
    compiled = "steps vit_toy ours compiled"
    measured = [line.split(": ")[0] for line in again.stdout.splitlines()[:-2]]
    assert measured == ["device", compiled, f"profile of {compiled}"]
    text = out.read_text()
    assert figures(text).items() >= {name: x for name, x in found.items() if name != "device"}.items()
    assert re.search(r"\| vit_toy \| ours \| compiled \| [24] \| ", text) and "| swin_toy | ours | eager | " in text

    failed = run(*words, "--variants", "cuda_graphs", "--backend", "nope")
    assert failed.returncode == 0, failed.stderr[-3000:]
    text = out.read_text()
    assert re.search(r"\| vit_toy \| ours \| cuda_graphs \| not measured: \w+: .*nope", text)
    assert re.search(r"\| vit_toy \| ours \| compiled \| [24] \| ", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "nope"], "error: --models nope is unknown: use some of vit_small,vit_base,"),
        (["--device", "cpu", "--batch_sizes", "a"], "error: --batch_sizes a is no list of numbers: give it as 4,8,16"),
        (["--device", "cpu", "--images", "/none"], "error: --images /none does not exist: give a tar of JPEGs or a"),
        (["--device", "cpu", "--resume", "--out", "/none"], "error: --resume finds no /none: leave it away, or name"),
        (["--device", "cuda"], "error: --device cuda finds no GPU: run it where nvidia-smi lists one, or try it with"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as told:
        parse()
    assert str(told.value).startswith(message) and "\n" not in str(told.value)


def test_a_mistake_ends_the_command():
    done = run("--models", "nope")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --models nope") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "contestant", "slack"),
    [
        ("vit_small", "ours", 1.001),
        ("vit_small", "cross", 1.001),
        ("vit_toy", "hf", 1.001),
        ("swin_tiny", "ours", 1.06),  # keys of other windows in a group, and empty slots
        ("swin_tiny", "simmim", 1.001),
    ],
)
def test_formulas_count_what_torch_counts(name, contestant, slack):
    torch.manual_seed(0)
    given = builder(name, contestant, **({"attention": "eager"} if contestant == "hf" else {}))()
    choose_attention(given.model, torch.device("cpu"), "bf16")  # products that torch counts, where it has no kernel's
    images, masks = torch.randn(1, 3, MODELS[name].side, MODELS[name].side), given.draw(1, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        given.loss(images, masks)
    formula = forward_flops(MODELS[name], contestant)
    assert formula * 0.999 <= counter.get_total_flops() <= formula * slack


def test_peaks_are_those_of_the_device():
    names = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L4": 121}
    assert {name: nominal_tflops(name) for name in names} == names
    assert nominal_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert nominal_tflops("NVIDIA L40S") is None and nominal_tflops("") is None


def test_the_search_ends_where_memory_or_gain_does():
    def timed(seconds: dict[int, float]):
        return lambda size: ([seconds[size]], []) if size in seconds else None

    assert search((32, 64, 128, 256), timed({32: 1.0, 64: 1.5, 128: 2.99})) == (
        {32: 32.0, 64: 64 / 1.5, 128: 128 / 2.99},
        "no faster at 128",
    )
    assert search((32, 64), timed({32: 1.0}))[1] == "out of memory at 64"
    assert search((32, 64), timed({})) == ({}, "out of memory at 32")


def test_time_without_kernels_counts_overlaps_once():
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4
    kinds = {
        "triton_red_fused_native_layer_norm_3": "fused by the compiler",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "matrix products",
        "pytorch_flash::flash_fwd_kernel<...>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(AttentionKernel)": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer, gradient norm",
        "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>": "elementwise",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_a_slow_loader_is_named_as_the_limit():
    name = "shards vit_base ours"
    found = {name: {"images_per_s": 5000.0}, f"{name} 16": {"workers": 16, "images_per_s": 2900.0, "alone": 3000.0}}
    assert shards_verdict(found)[1] == "58.0 % (16 workers)"
    assert "limited by the loader: the loader alone makes 3000 images/s" in shards_verdict(found)[2]
    assert "reach 97 % of it" in shards_verdict(found)[2]
    found[f"{name} 8"] = {"workers": 8, "images_per_s": 4900.0, "alone": 9000.0}
    assert shards_verdict(found)[2] == "met"


def test_memory_that_does_not_suffice_ends_the_search_and_halves_other_batches(monkeypatch):
    class Full(Step):
        def __call__(self, batch):
            if len(batch.images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            super().__call__(batch)

    monkeypatch.setattr(gpu_rows, "Step", Full)
    monkeypatch.setattr(gpu_rows, "RISE", 0.0)
    monkeypatch.setattr(gpu_rows, "compile_args", lambda variant, backend: None)
    given = Namespace(device="cpu", precision="no", backend="", seconds=0.1, rounds=1)

    def measured(variant: str, *sizes: int) -> dict:
        (piece,) = gpu_rows.measure_steps(Row("steps", "vit_toy", "ours", variant, sizes), given)
        return piece

    found = measured("eager", 1, 2, 4)
    assert set(found["tried"]) == {1, 2} and found["search"] == "out of memory at 4"
    assert measured("compiled", 8)["batch_size"] == 2
    assert measured("compiled", 16) == {"error": "out of memory at 16 images"}
    assert measured("eager", 4, 8) == {"error": "out of memory at 4 images"}
