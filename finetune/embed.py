"""The features of every image of a folder or of shards, in one file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.index import ShardIndex
from quarterlight.ssl.processes import build_accelerator, on_all
from quarterlight.ssl.released import Weights, encoder_with_weights
from quarterlight.ssl.runs import environment

from .embeddings import write_embeddings
from .network import crop_of, open_weights
from .parts import Part, Parts
from .rows import ROW_NAMES, Network, row_names, write_rows
from .tables import PARQUET, Rows, check_out, write_table
from .use_config import EmbedConfig


class Embedder(nn.Module):
    """Images to features: the average of the patch tokens or the class token, of one layer or of several side by side.

    A norm that a classifier has behind its pooling (`fc_norm`) is applied to the average of the last layer, as timm's
    `forward_head(..., pre_logits=True)` does.
    """

    def __init__(self, encoder: Encoder, pool: str, layers: Sequence[int] | None, *, normed: bool = False) -> None:
        """`normed` says that the weights have a norm behind the pooling. Raises InputError for what is not there."""
        super().__init__()
        self.encoder, self.pool, self.layers, self.normed = encoder, pool, layers, normed
        if pool == "token" and getattr(self.timm, "cls_token", None) is None:
            raise InputError(f"pool token: a {type(self.timm).__name__} without a class token; use pool avg")
        if layers is not None and (odd := [i for i in layers if not -self.depth <= i < self.depth]):
            what = "blocks" if hasattr(self.timm, "blocks") else "stages"
            raise InputError(
                f"layers {odd[0]}: there are {self.depth} {what}, 0 to {self.depth - 1}, or -1 to -{self.depth}"
            )

    @property
    def timm(self) -> Any:
        """The model; no module of this one as well, or its weights would be there twice."""
        return self.encoder.timm

    @property
    def depth(self) -> int:
        """Blocks of a ViT, or stages of a Swin."""
        return len(self.timm.blocks if hasattr(self.timm, "blocks") else self.timm.layers)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Returns float32 features of normalized images."""
        wanted = [i % self.depth for i in ([-1] if self.layers is None else self.layers)]
        if wanted == [self.depth - 1]:
            return self._pooled(self.encoder(images), last=True)
        indices = sorted(set(wanted))
        found = [
            self._pooled(x, last=i == self.depth - 1)
            for i, x in zip(indices, self._tokens(images, indices), strict=True)
        ]
        return torch.cat([found[indices.index(i)] for i in wanted], dim=1)

    def _tokens(self, images: Float[Tensor, "B C H W"], indices: list[int]) -> list[Tensor]:
        """Returns the tokens of these layers; a ViT's all behind its final norm, a Swin's only those of the last."""
        if hasattr(self.timm, "blocks"):
            given = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True}
            found = self.timm.forward_intermediates(images, indices, intermediates_only=True, **given)
            return [torch.cat([x[1], x[0]], dim=1) if isinstance(x, tuple) else x for x in found]
        found = self.timm.forward_intermediates(images, indices, norm=True, intermediates_only=True)
        return [x.flatten(2).transpose(1, 2) for x in found]  # [B, C, h, w] to tokens

    def _pooled(self, tokens: Float[Tensor, "B PN D"], *, last: bool) -> Float[Tensor, "B D"]:
        if self.pool == "token":
            return tokens[:, 0].float()
        mean = tokens[:, self.encoder.num_prefix_tokens :].float().mean(dim=1)
        return self.timm.fc_norm(mean).float() if last and self.normed else mean


def open_embedder(config: Any) -> Network:
    """Returns the network that `config` (an EmbedConfig) names. Raises InputError."""
    weights, spec = open_weights(config.init, config.encoder, config.data)
    encoder, said = encoder_with_weights(spec, weights)
    embedder = Embedder(encoder, config.pool, config.layers, normed=_load_norm(encoder, weights))
    return Network(embedder, spec, crop_of(encoder.timm, config.init, config.data), said)


def _load_norm(encoder: Encoder, weights: Weights) -> bool:
    """Loads the norm that a classifier has behind its pooling; returns whether there is one."""
    names = [f"fc_norm.{name}" for name in getattr(encoder.timm, "fc_norm", nn.Identity()).state_dict()]
    if not names or any(name not in weights.head for name in names):
        return False
    encoder.timm.load_state_dict({name: weights.head[name] for name in names}, strict=False)
    return True


def embed(images: Sequence[str], config: EmbedConfig) -> int:
    """Writes config.out, a row for each image in the order of the input; `Embeddings` reads it.

    Returns the exit status: 1 when an image could not be read and `strict` asks for it. Raises InputError.
    """
    accelerator = build_accelerator(config.precision)
    out = on_all(lambda: check_out(config.out, (".safetensors", PARQUET)))
    network = on_all(lambda: open_embedder(config))

    def compute(x: Tensor) -> dict[str, Tensor]:
        return {"features": network.model(x).to(getattr(torch, config.dtype))}

    def write(index: ShardIndex, parts: Parts, partial: Path) -> None:
        if out.suffix == PARQUET:
            columns = {**ROW_NAMES, "features": "floats", "error": "text"}
            write_table(partial, PARQUET, columns, (_rows(index, part) for part in parts))
        else:
            write_embeddings(index, parts, partial, _metadata(config, network), config.dtype)

    options = {"command": "embed", "pool": config.pool, "layers": config.layers, "dtype": config.dtype}
    return write_rows(images, config, out, accelerator, network, options, compute, write)


def _metadata(config: EmbedConfig, network: Network) -> dict[str, str]:
    """Returns what is needed to embed other images in the same way."""
    path = Path(config.init).expanduser()
    spec = network.spec
    facts = network.facts() | {"pool": config.pool, "layers": config.layers, "precision": config.precision}
    return {
        "made_by": f"quarterlight {environment()['packages']['quarterlight']}",
        "init": str(path.resolve()) if path.exists() else config.init,
        "architecture": spec.name,
        "timm_args": json.dumps(spec.args),
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()},
    }


def _rows(index: ShardIndex, part: Part) -> Rows:
    rows: Rows = []
    for sample, features in enumerate(part.tensors["features"].float().numpy(), part.start):
        error = part.unreadable.get(sample)
        rows.append({**row_names(index, sample), "features": features if error is None else None, "error": error})
    return rows
