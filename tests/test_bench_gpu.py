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
import bench_gpu  # noqa: E402
import gpu_rows  # noqa: E402
from bench_gpu import completed, filed, kept, parse, start_on, time_limit  # noqa: E402
from contestants import builder  # noqa: E402
from flops import forward_flops, nominal_tflops  # noqa: E402
from gpu_report import shards_verdict, text  # noqa: E402
from gpu_rows import VARIANTS, Row, covered, is_out_of_memory, kind_of, search  # noqa: E402
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
        (["--device", "cpu", "--threads", "0"], "error: --threads 0 must be above 0"),
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
        ("swin_tiny", "hf", 1.001),
        ("swin_tiny", "dense", 1.001),
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
    assert nominal_tflops("NVIDIA H200 MIG 1g.18gb") is None and nominal_tflops("NVIDIA H200", "no") is None


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
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>": "norms, softmax, sums",
        "void at::native::(anonymous namespace)::cuComputePartGradGammaBeta<float>": "norms, softmax, sums",
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


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_does_not_suffice_has_many_errors(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(RuntimeError("an illegal memory access"))


EAGER_VIT, SHARDS_VIT = "steps vit_base ours eager", "shards vit_base ours"
STEPS = {"batch_size": 64, "step_s": 0.5, "images_per_s": 128.0, "first_step_s": 1.0, "search": "largest tried"}
PROFILE = {"step_s": 0.5, "launches": 3, "kernel_s": 0.4, "gap_share": 0.2, "kinds": {}, "kernels": {}}
FED = {"batch_size": 64, "images_per_s": 128.0, "file_kb": 9.0, "variant": "eager"}
WORKER = {"workers": 16, "images_per_s": 100.0, "alone": 200.0}
BROKEN = {"error": "not done within 180 s"}
WHOLE = {
    EAGER_VIT: STEPS,
    f"profile of {EAGER_VIT}": PROFILE,
    SHARDS_VIT: FED,
    f"{SHARDS_VIT} 8": WORKER | {"workers": 8},
    f"{SHARDS_VIT} 16": WORKER,
    "steps vit_large ours eager": BROKEN,  # no row of this call
}


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({}, ""),
        ({f"rest of {SHARDS_VIT}": BROKEN}, SHARDS_VIT),
        ({f"{SHARDS_VIT} 8": None}, SHARDS_VIT),
        ({SHARDS_VIT: BROKEN}, SHARDS_VIT),
        ({f"rest of {EAGER_VIT}": BROKEN}, EAGER_VIT),
        ({f"profile of {EAGER_VIT}": BROKEN}, EAGER_VIT),
        ({f"profile of {EAGER_VIT}": None}, EAGER_VIT),
        ({EAGER_VIT: BROKEN}, EAGER_VIT),
    ],
)
def test_of_a_row_that_was_not_finished_nothing_is_kept(changed, gone, tmp_path):
    rows = [Row("steps", "vit_base", "ours", "eager", profiled=True), Row("shards", "vit_base", "ours")]
    earlier = {name: x for name, x in (WHOLE | changed | {"device": {}}).items() if x is not None}
    (tmp_path / "results.md").write_text(text(rows, earlier, "heading", None, 32))
    found = kept(tmp_path / "results.md", rows, [8, 16])
    assert found == {name: x for name, x in WHOLE.items() if not gone or gone not in name}


def test_what_fails_behind_its_figures_is_told_beside_them():
    rows = [Row("steps", "vit_base", "ours", "eager", profiled=True), Row("shards", "vit_base", "ours")]
    found = {SHARDS_VIT: FED, f"{SHARDS_VIT} 16": WORKER}
    assert filed(f"{SHARDS_VIT} 16", WORKER, found) == f"{SHARDS_VIT} 16"  # measured again, and no failure
    assert filed(EAGER_VIT, BROKEN, found) == EAGER_VIT
    found[filed(SHARDS_VIT, BROKEN, found)] = BROKEN
    told = text(rows, found, "heading", None, 32)
    assert f"Broken off: {SHARDS_VIT}: not done within 180 s" in told and "| by 16 workers | 100 |" in told


def test_without_an_eager_row_others_take_a_fixed_size_and_the_results_say_so():
    row = Row("steps", "vit_base", "ours", "compiled")
    with_eager = completed(row, {EAGER_VIT: STEPS})
    assert (with_eager.sizes, with_eager.sized_by) == ((64,), "eager")
    for found in ({}, {EAGER_VIT: BROKEN}):
        assert (completed(row, found).sizes, completed(row, found).sized_by) == ((256,), "fixed")
    assert completed(Row("steps", "vit_base", "ours", "compiled", (512, 1024)), {}).sizes == (512,)
    told = [text([row], {row.name: STEPS | {"search": by}}, "heading", None, 32) for by in ("eager", "fixed")]
    assert "| compiled | 64 | " in told[0] and "| compiled | 64 (not searched) | " in told[1]


def test_compiled_rows_have_more_time():
    given = Namespace(row_timeout_s=180.0)
    rows = [Row("device"), *(Row("steps", "vit_base", "ours", variant) for variant in VARIANTS)]
    assert [time_limit(row, given) for row in rows] == [180, 180, 360, 360]


def test_a_device_whose_process_dies_behind_its_figures_is_measured(monkeypatch):
    monkeypatch.setattr(bench_gpu, "measured", lambda *args: iter([{"matmul_tflops": 1.0}, BROKEN]))
    assert start_on(Row("device"), Namespace(row_timeout_s=1.0, device="cpu")) == {"matmul_tflops": 1.0}


def test_the_rate_of_the_device_is_timed_for_as_long_as_it_takes():
    given = Namespace(device="cpu", rounds=None)
    assert len(gpu_rows.step_times(lambda i: None, 0.05, given)) == gpu_rows.MOST
    assert len(gpu_rows.step_times(lambda i: None, 0.05, given, most=None)) > gpu_rows.MOST


def test_masks_are_laid_out_in_windows_where_the_trainer_does_it():
    packed = {what: builder("swin_toy", what)().draw(2, 0).packing is not None for what in ("ours", "simmim")}
    assert packed == {"ours": True, "simmim": False}


def test_losses_of_several_gpus_must_agree(tmp_path):
    compare = re.search(r"define COMPARE_LOSSES\n(.*?)\nendef", (ROOT / "Makefile").read_text(), re.DOTALL)[1]

    def compared(*losses: float | None) -> int:
        paths = [tmp_path / f"{i}.jsonl" for i in range(len(losses))]
        for path, loss in zip(paths, losses, strict=True):
            path.write_text("".join(json.dumps(line) + "\n" for line in ({"step": 20, "loss": loss}, {"step": 20})))
        return subprocess.run([sys.executable, "-c", compare, *paths], capture_output=True).returncode

    assert compared(0.5, 0.5004, 0.4996) == 0
    assert compared(0.5, 0.5, 0.502) != 0 and compared(0.5, 0.5, None) != 0
