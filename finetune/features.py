"""Features of a frozen encoder, computed once and kept in the run folder, chunk by chunk.

A stopped or killed extraction keeps the chunks that it has finished, and any number of processes goes on from there.
Row i of a table belongs to the sample at position i: `samples.index.key(samples.order.samples[i])` is its key.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quarterlight.ssl.attention import choose_attention
from quarterlight.ssl.augment import Normalize
from quarterlight.ssl.batches import BadSample, Samples, refuse_bad
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetching import Fetching
from quarterlight.ssl.files import remove_leftovers, replace_file, write_tensors
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.pooling import LAST, Features, pooled, pooled_layers
from quarterlight.ssl.processes import from_main, until_stopped
from quarterlight.ssl.released import encoder_with_weights
from quarterlight.ssl.signals import StopSignals
from quarterlight.ssl.spans import ChunkSpans
from quarterlight.ssl.stage import Opened

LEAST_CHUNK, MOST_CHUNK, CHUNKS = 256, 8192, 64  # images in a chunk, and how many chunks there are if that allows it
FeatureType = Literal["float32", "float16"]


@dataclass(frozen=True)
class FeatureTable:
    """Features and labels of all samples in their order, on disk."""

    folder: Path
    paths: list[Path]
    count: int

    def load(self, names: Sequence[str] | None = None) -> Features:
        """Returns features in host memory, as they are stored: [images, D] by name; only `names` where given."""
        names = self.names if names is None else names
        return {name: self._column(name) for name in names}

    def labels(self) -> Int[Tensor, " n"]:
        """Returns the class numbers; -1: none."""
        return self._column("labels")

    @property
    def names(self) -> list[str]:
        """What features there are."""
        with _opened(self.paths[0]) as file:
            return sorted(name for name in file.keys() if name != "labels")  # noqa: SIM118  # not a dictionary

    def _column(self, name: str) -> Tensor:
        """Reads one column, chunk after chunk, so that it is in memory once."""
        column, filled = torch.empty(0), 0
        for path in self.paths:
            with _opened(path) as file:
                part = file.get_tensor(name)
            if not filled:
                column = torch.empty(self.count, *part.shape[1:], dtype=part.dtype)
            column[filled : filled + len(part)] = part
            filled += len(part)
        return column


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it, to compute it again") from error


class FrozenEncoder(NamedTuple):
    """An encoder that is only looked at, in eval mode on the device of the run."""

    encoder: Encoder
    normalize: Normalize
    report: str  # a sentence on its weights


def open_encoder(opened: Opened) -> FrozenEncoder:
    """Returns the encoder that a stage was opened with."""
    device = opened.accelerator.device
    torch.manual_seed(opened.config.seed)
    encoder, report = encoder_with_weights(opened.spec, opened.weights)
    encoder.requires_grad_(False).eval().to(device)
    choose_attention(encoder, device, opened.config.precision)
    return FrozenEncoder(encoder, Normalize(opened.spec.mean, opened.spec.std).to(device), report)


def feature_names(encoder: Encoder, *, layers: bool = True) -> list[str]:
    """Returns the names of the features that `extract_table` will find, before anything is computed."""
    model: Any = encoder.timm
    names = ["avg"] if getattr(model, "cls_token", None) is None else ["avg", "token"]
    depth = len(model.blocks if hasattr(model, "blocks") else model.layers)
    return names + [f"last{i}" for i in range(2, min(LAST, depth) + 1) if layers]


@torch.no_grad()
def extract_table(
    encoder: Encoder,
    normalize: nn.Module,
    samples: Samples,
    accelerator: Accelerator,
    cache: Path,
    *,
    batch_size: int,
    num_workers: int,
    layers: bool = False,
    dtype: FeatureType = "float32",
    fetching: Fetching | None = None,
    signals: StopSignals | None = None,
) -> FeatureTable:
    """Returns the features of all samples in their order; each process computes some chunks of what is not there yet.

    With `layers` earlier layers too (`pooled_layers`). They are kept below `cache` under a hash of weights, samples and
    crop, and read from there the next time. `batch_size` is that of one process.

    Raises InputError when an image cannot be read or a feature is not finite, and Stopped, on all processes, when one
    of them got a signal; the chunks that are finished stay.
    """
    folder = cache / _hash(encoder, normalize, samples, f"{layers} {dtype}")
    chunks = _chunks(len(samples.order))
    paths = [folder / _chunk_name(*chunk) for chunk in chunks]
    if accelerator.is_main_process and folder.is_dir():
        remove_leftovers(folder)  # of killed processes: none writes yet
    missing = from_main([chunk for chunk, path in zip(chunks, paths, strict=True) if not path.is_file()])
    rank, world_size = accelerator.process_index, accelerator.num_processes
    spans = ChunkSpans(missing, batch_size=batch_size, rank=rank, world_size=world_size)
    loader = build_loader(samples, spans, num_workers=num_workers, fetching=fetching)
    writer = _ChunkWriter(folder, spans.mine)
    bad: list[BadSample] = []
    signals = StopSignals() if signals is None else signals
    batches = until_stopped(loader, signals, accelerator, failed=lambda: bool(bad or writer.not_finite))
    for batch in batches if missing else ():
        bad += batch.bad
        with accelerator.autocast():
            images = normalize(batch.images.to(accelerator.device, non_blocking=True))
            found = pooled_layers(encoder, images) if layers else pooled(encoder(images), encoder)
        tensors = {name: x.to(getattr(torch, dtype)).cpu() for name, x in found.items()}
        writer.add(tensors | {"labels": batch.labels}, keep=not bad)
    refuse_bad(gather_object(bad))
    if wrong := gather_object(writer.not_finite):
        if dtype == "float16" and not any(is_nan for _, is_nan in wrong):
            raise InputError(f"feature_dtype float16: {wrong[0][0]} goes beyond its range (65504): use float32")
        raise InputError(
            f"{wrong[0][0]} is not finite: these weights have diverged, or precision fp16 overflows: use --precision "
            "bf16 or no"
        )
    accelerator.wait_for_everyone()
    if absent := [path for path in paths if not path.is_file()]:
        raise InputError(f"{absent[0]}: is not there, though it was written: all machines must see the same run_dir")
    return FeatureTable(folder, paths, len(samples.order))


class _ChunkWriter:
    """Writes a chunk as soon as all of it is there."""

    def __init__(self, folder: Path, chunks: list[tuple[int, int]]) -> None:
        self.folder, self.chunks = folder, iter(chunks)
        self.not_finite: list[tuple[str, bool]] = []  # features with such values, and whether there are NaNs
        self._begin()

    def _begin(self) -> None:
        self.chunk, self.parts = next(self.chunks, (0, 0)), []

    def add(self, tensors: dict[str, Tensor], *, keep: bool) -> None:
        """Takes the next batch; without `keep`, nothing is written any more."""
        self.parts.append(tensors)
        first, last = self.chunk
        if sum(len(part["labels"]) for part in self.parts) < last - first:
            return
        whole = {name: torch.cat([part[name] for part in self.parts]) for name in tensors}
        wrong = [(name, x) for name, x in whole.items() if not torch.isfinite(x).all()]
        self.not_finite += [(name, bool(x.isnan().any())) for name, x in wrong]
        if keep and not self.not_finite:
            path = self.folder / _chunk_name(first, last)
            replace_file(path, lambda partial: write_tensors(partial, whole))
        self._begin()


def _chunks(count: int) -> list[tuple[int, int]]:
    """Returns the chunks of `count` images: on nothing else does their size depend, so any processes share them."""
    size = min(MOST_CHUNK, max(LEAST_CHUNK, -(-count // CHUNKS)))
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _chunk_name(first: int, last: int) -> str:
    return f"{first:09d}-{last:09d}.safetensors"


def digest_of(encoder: Encoder, normalize: nn.Module) -> bytes:
    """Returns a SHA-256 of an encoder's weights and of how its images are normalized."""
    digest = hashlib.sha256()
    for name, x in [*encoder.timm.state_dict().items(), *normalize.named_buffers()]:
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


def _hash(encoder: Encoder, normalize: nn.Module, samples: Samples, kind: str) -> str:
    digest = hashlib.sha256(kind.encode() + digest_of(encoder, normalize))
    digest.update(f"{samples.index.fingerprint()} {samples.transform} {samples.in_chans}".encode())
    digest.update(samples.order.samples.tobytes())
    return digest.hexdigest()[:16]
