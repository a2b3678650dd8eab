"""Encoders and classifiers as graphs that run without our code and timm's: ONNX and torch.export."""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import InputError
from .export import ModelSpec
from .files import replace_file

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX_LARGEST = 2**31 - 2**20  # bytes: protobuf's bound, and something for the graph
FACTS = "quarterlight.json"  # in a .pt2 file


class Features(nn.Module):
    """What a graph of an encoder computes: all tokens, and timm's pooled features."""

    outputs = ("tokens", "features")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B PN D"], Float[Tensor, "B D"]]:
        """Returns prefix tokens and then those of the units, row by row; and what timm's model returns."""
        tokens = self.model.forward_features(images)
        features = self.model.forward_head(tokens)
        return (tokens.flatten(1, 2) if tokens.ndim == 4 else tokens), features


class Logits(nn.Module):
    """What a graph of a classifier computes."""

    outputs = ("logits",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B L"]]:
        """Returns the logits."""
        return (self.model(images),)


def graph_module(model: Any) -> Features | Logits:
    """Returns what is traced of a timm model, in evaluation mode."""
    return (Logits(model) if model.num_classes else Features(model)).eval()


def refuse_onnx(model: nn.Module, half: str | None) -> None:
    """Raises InputError, before anything is computed, where no ONNX file can be made of a model."""
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"--to onnx needs {', '.join(missing)}: pip install 'quarterlight[onnx]'")
    if half == "bf16":
        raise InputError("--to onnx --half bf16: onnxruntime has no such operators on a CPU: use fp16")
    size = sum(x.numel() for x in model.state_dict().values()) * (2 if half else 4)
    if size > ONNX_LARGEST:
        raise InputError(f"an ONNX file holds 2 GB at most, and these weights are {size / 1e9:.1f} GB: use --to torch")


def write_torch(
    path: Path, model: Any, spec: ModelSpec, facts: dict[str, Any], images: Float[Tensor, "B C H W"]
) -> float:
    """Writes a timm model as torch.export's program with a free number of images, and returns `difference` to it.

    `images` have the type of the weights. Raises InputError where the model cannot be traced.
    """
    module = graph_module(model)
    program = _traced(module, images)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(_told(spec, facts))})
    buffer.seek(0)
    with torch.no_grad():
        loaded = torch.export.load(buffer).module()
        found = [loaded(batch) for batch in _batches(images)]
    _check(difference := _difference(module, images, found), images.dtype, "torch.export's program", 1e-5)
    replace_file(path, lambda partial: partial.write_bytes(buffer.getbuffer()))
    return difference


def write_onnx(
    path: Path, model: Any, spec: ModelSpec, facts: dict[str, Any], images: Float[Tensor, "B C H W"]
) -> float:
    """Writes a timm model as ONNX with a free number of images, and returns `difference` to what onnxruntime computes.

    `images` have the type of the weights. Raises InputError where the model cannot be traced.
    """
    import onnxruntime

    module = graph_module(model)
    program = _traced(module, images)
    with _quiet():
        made: Any = torch.onnx.export(
            program,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=list(module.outputs),
            external_data=False,
            verbose=False,
        )
    for key, value in _told(spec, facts).items():
        made.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    proto = made.model_proto
    for value in [*proto.graph.input, *proto.graph.output]:  # traced names such as s27 tell nothing
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [[torch.from_numpy(x) for x in session.run(None, {"images": batch.numpy()})] for batch in _batches(images)]
    _check(difference := _difference(module, images, found), images.dtype, "onnxruntime", 1e-4)
    replace_file(path, lambda partial: partial.write_bytes(content))
    return difference


def _told(spec: ModelSpec, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns what the file says of itself: how its images are to be normalized, too."""
    return {
        "architecture": spec.name,
        "timm_args": spec.args,
        "mean": list(spec.mean),
        "std": list(spec.std),
        **facts,
    }


def _traced(module: nn.Module, images: Float[Tensor, "B C H W"]) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                module, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=False
            )
    except Exception as error:  # of many kinds, from whatever the model does
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(f"torch.export cannot trace this model ({first_line}): use --to timm") from error


def _batches(images: Float[Tensor, "B C H W"]) -> Iterator[Float[Tensor, "_ C H W"]]:
    """Yields the images as batches of other sizes than the one that is traced: one, and the rest."""
    yield images[:1]
    yield images[1:]
    yield torch.cat([images, images])


@torch.no_grad()
def _difference(module: nn.Module, images: Float[Tensor, "B C H W"], found: list[Any]) -> float:
    """Returns the largest difference to the model itself, in units of its largest output."""
    worst = 0.0
    for batch, outputs in zip(_batches(images), found, strict=True):
        for ours, theirs in zip(module(batch), outputs, strict=True):
            difference = (ours.float() - theirs.float()).abs().max() / ours.float().abs().max().clamp_min(1e-6)
            worst = max(worst, float(difference)) if difference == difference else float("nan")
    return worst


def _check(difference: float, dtype: torch.dtype, what: str, most: float) -> None:
    """Raises InputError when outputs differ by more than arithmetic of this type does."""
    most = {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, most)
    if not difference <= most:
        raise InputError(
            f"{what} differs from the model by {difference:.1e} of its largest output, more than {most}: nothing is "
            "written; use --to timm" + (", or leave --half away" if dtype != torch.float32 else "")
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what exporters say of their own insides to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
