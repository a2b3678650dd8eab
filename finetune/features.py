"""Features of a frozen encoder, computed once and kept in the run folder."""

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from quarterlight.ssl.batches import BadSample, Samples, refuse_bad
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.fetching import Fetching
from quarterlight.ssl.files import replace_file, write_tensors
from quarterlight.ssl.loader import build_loader
from quarterlight.ssl.spans import EvalSpans

Features = dict[str, Tensor]  # float32 [images, D] by pooling: "avg" of the patch tokens, "token" the class token


def pooled(tokens: Float[Tensor, "B PN D"], encoder: Encoder) -> Features:
    """Returns the average of the patch tokens and, where there is one, the class token, in float32."""
    features = {"avg": tokens[:, encoder.num_prefix_tokens :].float().mean(dim=1)}
    if getattr(encoder.timm, "cls_token", None) is not None:
        features["token"] = tokens[:, 0].to(torch.float32, copy=True)  # a view would keep all tokens in memory
    return features


@torch.no_grad()
def extract(
    encoder: Encoder,
    normalize: nn.Module,
    samples: Samples,
    accelerator: Accelerator,
    cache: Path,
    *,
    fetching: Fetching | None = None,
    **loading: int,
) -> tuple[Features, Int[Tensor, " n"]]:
    """Returns features and labels of all samples in file order, on the CPU; each process computes its own part.

    `loading` is batch_size (of one process) and num_workers. The parts are kept below `cache` under a hash of weights,
    samples and crop, and read from there the next time. Raises InputError when an image cannot be read.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    name = _hash(encoder, normalize, samples)
    part = cache / f"{name}-{rank}-of-{world_size}.safetensors"
    bad: list[BadSample] = []
    if not part.is_file():
        spans = EvalSpans(len(samples.order), batch_size=loading["batch_size"], rank=rank, world_size=world_size)
        collected: dict[str, list[Tensor]] = {"labels": []}
        for batch in build_loader(samples, spans, num_workers=loading["num_workers"], fetching=fetching):
            bad += batch.bad
            with accelerator.autocast():
                tokens = encoder(normalize(batch.images.to(accelerator.device)))
            for pool, values in pooled(tokens, encoder).items():
                collected.setdefault(pool, []).append(values.cpu())
            collected["labels"].append(batch.labels)
        if not bad and len(spans):
            tensors = {key: torch.cat(values) for key, values in collected.items()}
            replace_file(part, lambda partial: write_tensors(partial, tensors))
    refuse_bad(gather_object(bad))
    accelerator.wait_for_everyone()
    parts = [
        load_file(path)
        for r in range(world_size)
        if (path := cache / f"{name}-{r}-of-{world_size}.safetensors").exists()
    ]
    whole = {key: torch.cat([tensors[key] for tensors in parts]) for key in parts[0]}
    labels = whole.pop("labels")
    if len(labels) != len(samples.order):
        raise InputError(
            f"{cache}: holds features of {len(labels)} of {len(samples.order)} images: all machines must see "
            "the same run_dir"
        )
    return whole, labels


def _hash(encoder: Encoder, normalize: nn.Module, samples: Samples) -> str:
    digest = hashlib.sha256()
    for name, x in [*encoder.timm.state_dict().items(), *normalize.named_buffers()]:
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    digest.update(f"{samples.index.fingerprint()} {samples.transform} {samples.in_chans}".encode())
    digest.update(samples.order.samples.tobytes())
    return digest.hexdigest()[:16]
