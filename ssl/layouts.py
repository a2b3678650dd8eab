"""The same tensors under others' names: Hugging Face's transformers and facebookresearch/mae, and back.

A layout is a table of pairs, ours and theirs; both ways of renaming follow from it. A name stands for itself and for
what ends in `.weight` or `.bias` behind it, `{}` for a number, `{-1}` for the number before it. Where theirs are
several names, ours is cut into as many equal parts along the first axis (queries, keys and values); a part that they
do without is None: left out on the way there, zeros on the way back.

Hugging Face's names are those of its published files, which every version of transformers reads; in memory version 5
has others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import InputError

Theirs = str | tuple[str | None, ...]
Rules = tuple[tuple[str, Theirs], ...]


@dataclass(frozen=True)
class Layout:
    """A table of names, `rules`, and what it is called in messages."""

    title: str
    rules: Rules

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under their names. Raises InputError for one that has no name there."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            theirs, numbers, suffix = self._place(name, self._ours)
            names = theirs if isinstance(theirs, tuple) else (theirs,)
            for part, value in zip(names, tensor.chunk(len(names)), strict=True):
                if part is not None:
                    found[_filled(part, numbers) + suffix] = value.clone() if len(names) > 1 else value
        return found

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under our names. Raises InputError for a strange one, and where a part is missing."""
        found: dict[str, Tensor] = {}
        parts: dict[str, tuple[Theirs, dict[int, Tensor]]] = {}
        for name, tensor in tensors.items():
            (ours, theirs, position), numbers, suffix = self._place(name, self._theirs)
            target = _filled(ours, numbers) + suffix
            if isinstance(theirs, tuple):
                parts.setdefault(target, (theirs, {}))[1][position] = tensor
            else:
                found[target] = tensor
        for target, (theirs, given) in parts.items():
            some = next(iter(given.values()))
            wanted = {i for i, part in enumerate(theirs) if part is not None}
            if wanted != given.keys():
                raise InputError(
                    f"{target} is not whole in {self.title}: {len(given)} of {len(wanted)} parts are there"
                )
            found[target] = torch.cat([given.get(i, torch.zeros_like(some)) for i in range(len(theirs))])
        return found

    def _place(self, name, patterns):  # type: ignore[no-untyped-def]  # a rule's other side, whichever it is
        for pattern, other in patterns:
            if match := pattern.fullmatch(name):
                *numbers, suffix = match.groups()
                return other, [int(number) for number in numbers], suffix
        raise InputError(f"{name} has no place in {self.title}")

    @cached_property
    def _ours(self) -> list[tuple[re.Pattern[str], Theirs]]:
        return [(_pattern(ours), theirs) for ours, theirs in self.rules]

    @cached_property
    def _theirs(self) -> list[tuple[re.Pattern[str], tuple[str, Theirs, int]]]:
        found = []
        for ours, theirs in self.rules:
            for position, part in enumerate(theirs if isinstance(theirs, tuple) else (theirs,)):
                if part is not None:
                    # the number before theirs is the number behind ours
                    back = ours.replace("{}", "{+1}", 1) if "{-1}" in part else ours
                    found.append((_pattern(part), (back, theirs, position)))
        return found


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\{\}", r"(\d+)").replace(r"\{\-1\}", r"(\d+)")
    return re.compile(text + r"(|\.weight|\.bias)")


def _filled(name: str, numbers: list[int]) -> str:
    """Returns the name with its places for numbers filled in, in order."""
    given = iter(numbers)
    return re.sub(r"\{(|[+-]1)\}", lambda place: str(next(given) + int(place[1] or 0)), name)


def _below(ours: str, theirs: str, rules: Rules) -> Rules:
    """Returns rules for the same names behind prefixes."""
    return tuple(
        (ours + a, tuple(None if part is None else theirs + part for part in b) if isinstance(b, tuple) else theirs + b)
        for a, b in rules
    )


_QKV = ("query", "key", "value")


def _qkv(attention: str, kind: str = "") -> tuple[str, ...]:
    return tuple(f"{attention}.{part}{kind}" for part in _QKV)


# What the blocks of all of transformers' ViTs and Swins have in common.
_BLOCK: Rules = (
    ("norm1", "layernorm_before"),
    ("attn.proj", "attention.output.dense"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
_VIT_BLOCK: Rules = (("attn.qkv", _qkv("attention.attention")), *_BLOCK)
_VIT_EMBEDDINGS: Rules = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
)
_VIT_BODY: Rules = (*_VIT_EMBEDDINGS, *_below("blocks.{}.", "encoder.layer.{}.", _VIT_BLOCK))
_VIT: Rules = (*_VIT_BODY, ("norm", "layernorm"))

# BEiT's keys have no bias. It adds the same to all of a query's scores, so that their softmax is the same without it.
_BEIT_BLOCK: Rules = (
    ("attn.qkv.weight", _qkv("attention.attention", ".weight")),
    ("attn.qkv.bias", ("attention.attention.query.bias", None, "attention.attention.value.bias")),
    *_BLOCK,
)
_BEIT: Rules = (*_VIT_EMBEDDINGS, *_below("blocks.{}.", "encoder.layer.{}.", _BEIT_BLOCK))

_SWIN_REST: Rules = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "embeddings.norm"),
    ("norm", "layernorm"),
    ("layers.{}.downsample.norm", "encoder.layers.{-1}.downsample.norm"),  # theirs ends a stage, timm's begins the next
    ("layers.{}.downsample.reduction", "encoder.layers.{-1}.downsample.reduction"),
)
_SWIN_BLOCK: Rules = (
    ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("attn.qkv", _qkv("attention.self")),
    *_BLOCK,
)
_SWIN_V2_BLOCK: Rules = (
    ("attn.qkv.weight", _qkv("attention.self", ".weight")),
    ("attn.q_bias", "attention.self.query.bias"),
    ("attn.v_bias", "attention.self.value.bias"),
    ("attn.logit_scale", "attention.self.logit_scale"),
    ("attn.cpb_mlp.{}", "attention.self.continuous_position_bias_mlp.{}"),
    *_BLOCK,
)
_SWIN: Rules = (*_SWIN_REST, *_below("layers.{}.blocks.{}.", "encoder.layers.{}.blocks.{}.", _SWIN_BLOCK))
_SWIN_V2: Rules = (*_SWIN_REST, *_below("layers.{}.blocks.{}.", "encoder.layers.{}.blocks.{}.", _SWIN_V2_BLOCK))

# Encoders; ours are timm's names.
HF_VIT = Layout("transformers' ViTModel", _VIT)
HF_SWIN = Layout("transformers' SwinModel", _SWIN)
HF_SWIN_V2 = Layout("transformers' Swinv2Model", _SWIN_V2)

# Classifiers; ours are timm's names.
HF_VIT_CLASSIFIER = Layout(
    "transformers' ViTForImageClassification", (*_below("", "vit.", _VIT), ("head", "classifier"))
)
HF_BEIT_CLASSIFIER = Layout(
    "transformers' BeitForImageClassification",
    (*_below("", "beit.", _BEIT), ("fc_norm", "beit.pooler.layernorm"), ("head", "classifier")),
)
HF_SWIN_CLASSIFIER = Layout(
    "transformers' SwinForImageClassification", (*_below("", "swin.", _SWIN), ("head.fc", "classifier"))
)
HF_SWIN_V2_CLASSIFIER = Layout(
    "transformers' Swinv2ForImageClassification", (*_below("", "swinv2.", _SWIN_V2), ("head.fc", "classifier"))
)

# Autoencoders; ours are the names of a MaskedAutoencoder, and its decoder's positions, which it does not save.
HF_VIT_MAE = Layout(
    "transformers' ViTMAEForPreTraining",
    (
        *_below("encoder.timm.", "vit.", _VIT),
        ("decoder.mask_token", "decoder.mask_token"),
        ("decoder.pos_embed", "decoder.decoder_pos_embed"),
        ("decoder.embed", "decoder.decoder_embed"),
        ("decoder.norm", "decoder.decoder_norm"),
        ("decoder.pred", "decoder.decoder_pred"),
        *_below("decoder.blocks.{}.", "decoder.decoder_layers.{}.", _VIT_BLOCK),
    ),
)
_SAME = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
MAE = Layout(
    "facebookresearch/mae's layout",
    (
        *(_below("encoder.timm.", "", tuple((x, x) for x in ("cls_token", "pos_embed", "patch_embed.proj", "norm")))),
        *_below("encoder.timm.blocks.{}.", "blocks.{}.", tuple((x, x) for x in _SAME)),
        ("decoder.mask_token", "mask_token"),
        ("decoder.pos_embed", "decoder_pos_embed"),
        ("decoder.embed", "decoder_embed"),
        ("decoder.norm", "decoder_norm"),
        ("decoder.pred", "decoder_pred"),
        *_below("decoder.blocks.{}.", "decoder_blocks.{}.", tuple((x, x) for x in _SAME)),
    ),
)
