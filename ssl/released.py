"""From weights to models: an encoder or a masked autoencoder with them, and a report of what matched."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_transform
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor
from torchvision import transforms

from .config import DataConfig, EncoderConfig
from .encoder import Encoder
from .encoders import build_encoder, create_timm_model
from .errors import InputError
from .export import ModelSpec
from .kinds import MergeOrder
from .mae import MaskedAutoencoder, attach_decoder
from .patches import pair
from .relative_tables import resize_table
from .renaming import BUFFERS
from .spec import RGB, encoder_spec
from .weights import HEAD, DecoderWeights, Weights, read_weights

__all__ = ["HEAD", "DecoderWeights", "Weights", "encoder_spec", "read_weights"]  # of others, for who loads by this file

PATCHES = "patch_embed.proj.weight"
# What no token passes on its way: the final norm, where the model has it behind its pooling, and what comes after it.
HARMLESS = ("norm.", "attn_pool.", "mask_token", *HEAD)
# Kinds of files, and a stage, whose weights were trained without labels; so were a run's that do not say more.
WITHOUT_LABELS = ("", "quarterlight", "pretraining", "simmim", "greenmim", "hf-simmim")
CROP_PCT = 0.875  # of an evaluation that nothing else is known of, as `data.crop_pct`
Transform = Callable[[Image.Image], Tensor]


def load_encoder(
    source: str, *, img_size: int | tuple[int, int] | None = None, name: str | None = None, **timm_args: Any
) -> tuple[Encoder, Transform]:
    """Returns the encoder that `source` holds, in evaluation mode, and the transform that makes its input of an image.

    `source` is whatever `--init` takes. The encoder gives tokens [B, prefix + N, D] (`encoder.timm` is timm's model);
    the transform makes a PIL image a normalized tensor [C, H, W], resized and center-cropped as in evaluation. Another
    `img_size` (side, or height and width, in pixels) resizes positions. Files that do not say which model they are of
    need timm's `name` and, where it differs from timm's model of that name, `timm_args`.

    Raises InputError unless the encoder loads whole.
    """
    weights = read_weights(source)
    spec = _spec_for(weights, img_size, name, timm_args)
    encoder, _ = encoder_with_weights(spec, weights)
    return encoder.eval(), eval_transform(spec, encoder.img_size, weights.crop_pct or CROP_PCT)


def load_autoencoder(
    source: str, *, img_size: int | tuple[int, int] | None = None, merge_order: MergeOrder | None = None, **options: Any
) -> MaskedAutoencoder:
    """Returns the masked autoencoder that `source` holds, encoder and decoder, in evaluation mode.

    `source` is whatever `--init` takes and holds a decoder: a full MAE or SimMIM file, a Hugging Face folder of either,
    a run with its states. `options` are those of `attach_decoder` (decoder, target, loss ...) where the file does not
    say: MAE's files for pictures want target="pixels". Raises InputError when either part does not load whole.
    """
    weights = read_weights(source, with_decoder=True, merge_order=merge_order)
    if weights.decoder is None:
        raise InputError(
            f"init {source}: holds an encoder without a decoder; give a full file (mae_pretrain_vit_base_full.pth), or "
            "a run with its states"
        )
    spec = _spec_for(weights, img_size, None, {})
    encoder, _ = encoder_with_weights(spec, weights)
    encoder.train_positions(False)
    said = weights.decoder.options() | options
    autoencoder = attach_decoder(encoder, in_chans=spec.args.get("in_chans", 3), **said)
    load_decoder(autoencoder, weights)
    return autoencoder.eval()


def _spec_for(
    weights: Weights, img_size: int | tuple[int, int] | None, name: str | None, timm_args: dict[str, Any]
) -> ModelSpec:
    args = dict(timm_args) if img_size is None else {**timm_args, "img_size": list(pair(img_size))}
    known = weights.spec.args if weights.spec is not None and name in (None, weights.spec.name) else {}
    in_chans = args.get("in_chans", known.get("in_chans", 3))
    data = DataConfig(train="", in_chans=in_chans)
    return encoder_spec(EncoderConfig(name=name, args=args), data, weights)


class Mode:
    """Turns a PIL image into color or grey."""

    def __init__(self, in_chans: int) -> None:
        self.mode = "L" if in_chans == 1 else "RGB"

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the image in the mode."""
        return image.convert(self.mode)


def eval_transform(spec: ModelSpec, img_size: tuple[int, int], crop_pct: float) -> Transform:
    """Returns timm's evaluation transform of a PIL image in any mode: resize, center crop, normalize ([C, H, W])."""
    in_chans = len(spec.mean)
    plain: Any = create_transform(
        (in_chans, *img_size), interpolation="bicubic", mean=spec.mean, std=spec.std, crop_pct=crop_pct
    )
    return transforms.Compose([Mode(in_chans), *plain.transforms])


def encoder_with_weights(spec: ModelSpec, weights: Weights | None) -> tuple[Encoder, str]:
    """Returns the encoder with these weights, or with MAE's initial ones, and a sentence on what was loaded.

    That of a classifier which averages patches keeps the norm behind the mean (`fc_norm`), which no token passes.
    Raises InputError when a tensor of the encoder is missing or has another shape.
    """
    encoder = build_encoder(spec.name, **spec.timm_args())
    if weights is None or weights.allow_partial:
        encoder.init_weights()
    if weights is None:
        return encoder, f"encoder {spec.name}: initial weights"
    report = load_weights(encoder.timm, weights)
    shapes = {name: x.shape for name, x in encoder.timm.state_dict().items()}
    behind = {name: x for name, x in weights.head.items() if x.shape == shapes.get(name)}
    encoder.timm.load_state_dict(behind, strict=False)
    return encoder, report


def load_weights(model: Any, weights: Weights) -> str:
    """Loads an encoder's weights into a timm model, resizing to it. Returns a sentence on what they are and matched.

    Absolute positions follow the grid of patches (bicubic), the patch embedding the patch (`resample_patch_embed`)
    and, where it is of colors, the channels: of grey images it has the sum (`adapt_input_conv`).
    Tables of relative positions follow the windows: by SimMIM's geometric rule where the weights were trained without
    labels, else bicubic, as in Swin's code.

    A classifier's own layers (`head`, `fc_norm`) keep their values; a final norm that moved behind the pooling (`norm`)
    is left out, as MAE does. Raises InputError when anything else is missing, has another shape, or is there and not in
    the model; where `weights` allow that, such tensors keep their values, but for all of them, or are left out.
    """
    wanted = {name: x for name, x in model.state_dict().items() if not name.startswith(HEAD)}
    given, notes = _resized(model, weights, wanted)
    unused = sorted([*(name for name in given.keys() - wanted.keys()), *weights.unused])
    matched = {name: x for name, x in given.items() if name in wanted and x.shape == wanted[name].shape}
    missing = [
        f"{name} {'is missing' if name not in given else f'is {list(given[name].shape)}, not {list(x.shape)}'}"
        for name, x in wanted.items()
        if name not in matched
    ]
    foreign = [
        x for x in sorted(given.keys() - wanted.keys()) if not x.startswith(HARMLESS) and not x.endswith(BUFFERS)
    ]
    if missing and not (weights.allow_partial and matched):
        what = f"{weights.kind}, " if weights.kind else ""
        raise InputError(
            f"init {weights.source}: {what}{len(missing)} of the encoder's {len(wanted)} tensors did not load "
            f"({'; '.join(missing[:3])}{'; ...' if len(missing) > 3 else ''}): these weights are of another model; "
            "give the encoder.name and encoder.args they were made with, or --allow_partial true to start such tensors "
            "afresh"
        )
    if foreign and not weights.allow_partial:
        raise InputError(
            f"init {weights.source}: has {len(foreign)} tensor{'s' * (len(foreign) > 1)} that the encoder lacks "
            f"({foreign[0]}{', ...' * (len(foreign) > 1)}): give the encoder.args it was made with, or --allow_partial "
            "true to leave them out"
        )
    model.load_state_dict(matched, strict=False)
    if missing:
        notes.append(
            f"{len(missing)} keep their initial values: {'; '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    if weights.decoder is not None:
        notes.append(f"a decoder of {len(weights.decoder.tensors)} tensors beside it")
    if unused:
        notes.append(f"not used: {', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''} ({len(unused)})")
    said = "".join(f"; {note}" for note in [*weights.notes, *notes])
    return f"{weights.described()}: {len(matched)} of {len(wanted)} encoder tensors loaded{said}"


def _resized(model: Any, weights: Weights, wanted: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights' tensors, in the sizes of the model where these can follow, and what was resized."""
    given, notes = dict(weights.tensors), []
    patches, new_patches = given.get(PATCHES), wanted.get(PATCHES)
    if patches is not None and new_patches is not None and patches.ndim == new_patches.ndim == 4:
        channels = new_patches.shape[1]
        if patches.shape[1] == RGB != channels and isinstance(model.patch_embed, PatchEmbed):
            patches = given[PATCHES] = adapt_input_conv(channels, patches)
            notes.append(f"patch embedding of {RGB} channels made one of {channels} (timm's adapt_input_conv)")
        old, new = tuple(patches.shape[2:]), tuple(new_patches.shape[2:])
        if old != new and patches.shape[:2] == new_patches.shape[:2]:
            given[PATCHES] = resample_patch_embed(patches, list(new))
            notes.append(f"patch embedding resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} pixels")
    if "pos_embed" in given and "pos_embed" in wanted:
        new, old = tuple(model.patch_embed.grid_size), _old_grid(weights, model)
        if old != new:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            given["pos_embed"] = resample_abs_pos_embed(
                given["pos_embed"], list(new), list(old), num_prefix_tokens=prefix
            )
            notes.append(f"positions resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
    tables = _resized_tables(model, weights, wanted)
    if tables:
        notes.append(f"{len(tables)} tables of relative positions resized ({_rule(weights)})")
    return given | tables, notes


def load_decoder(autoencoder: MaskedAutoencoder, weights: Weights) -> str:
    """Loads the decoder of `weights` into an autoencoder, and the mask token that an encoder sees. Returns a sentence.

    Positions are the file's, at its own grid; for another grid they are made anew, as waves. Raises InputError when
    there is no decoder, or one of another shape, with the options that build it.
    """
    if weights.decoder is None:
        raise InputError(f"init {weights.source}: holds no decoder; give a full file, or leave init_decoder false")
    given = dict(weights.decoder.tensors)
    positions = given.pop("decoder.pos_embed", None)
    wanted = autoencoder.state_dict()
    names = [name for name in wanted if not name.startswith("encoder.")]
    wrong = [name for name in names if name not in given or given[name].shape != wanted[name].shape]
    wrong += [name for name in given if name not in names]
    if wrong:
        config, pred = weights.decoder.config, given.get("decoder.pred.bias", ())
        sizes = (
            f"decoder.embed_dim {config.embed_dim}, decoder.depth {config.depth}, " if config.name != "linear" else ""
        )
        raise InputError(
            f"init {weights.source}: its decoder does not fit ({', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}): it "
            f"is of decoder.name {config.name}, {sizes}encode_masked {str(weights.decoder.encode_masked).lower()} and "
            f"units of {len(pred)} values"
        )
    autoencoder.load_state_dict({**wanted, **given})
    note = "".join(f"; {note}" for note in weights.decoder.notes)
    own = getattr(autoencoder.decoder, "pos_embed", None)
    if positions is not None and own is not None:
        if positions.shape == own.shape:
            own.copy_(positions)
        else:
            note += f"; its positions made anew for {own.shape[1]} tokens, it had {positions.shape[1]}"
    return f"{len(given)} of {len(names)} decoder tensors loaded{note}"


def _resized_tables(model: Any, weights: Weights, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tables of relative positions (Swin) that were made for other windows, fitted to the model's.

    Raises InputError for a table of windows that are not square, from weights that do not say which model they are of.
    """
    suffix = ".relative_position_bias_table"
    names = [name for name in wanted.keys() & weights.tensors.keys() if name.endswith(suffix)]
    old: Any = None
    if names and weights.spec is not None:
        with torch.device("meta"):  # for its windows only
            old = create_timm_model(weights.spec.name, **weights.spec.timm_args())
    found = {}
    for name in names:
        table, new = weights.tensors[name], model.get_submodule(name.removesuffix(suffix)).window_size
        if old is None and table.shape == wanted[name].shape:
            continue
        side = (math.isqrt(len(table)) + 1) // 2
        window = pair(side) if old is None else old.get_submodule(name.removesuffix(suffix)).window_size
        if (2 * window[0] - 1) * (2 * window[1] - 1) != len(table):
            raise InputError(
                f"init {weights.source}: {name} has {len(table)} rows, which is no square window, and the weights do "
                "not say which it is: give encoder.args.window_size as they were trained"
            )
        if pair(window) != pair(new):
            found[name] = resize_table(table, pair(window), pair(new), _rule(weights))
    return found


def _rule(weights: Weights) -> Literal["geometric", "bicubic"]:
    """Returns how tables of relative positions are resized: those trained without labels by SimMIM's rule."""
    origin = weights.origin or weights.kind
    return "bicubic" if weights.head or origin not in WITHOUT_LABELS else "geometric"


def _old_grid(weights: Weights, model: Any) -> tuple[int, int]:
    """Returns the grid (high, wide) that the weights' positions were made for.

    Where they do not say, it is the model's own if the number fits, else a square one. Raises InputError when it is
    neither.
    """
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    count, new = weights.tensors["pos_embed"].shape[1] - prefix, model.patch_embed.grid_size
    fits = new[0] * new[1] == count
    known = None if weights.spec is None else weights.spec.args.get("img_size")
    if known is not None and not (weights.guessed_size and fits):
        patch = model.patch_embed.feat_ratio(as_scalar=False)  # of patches, or of a stem and patches of its map
        patches = weights.tensors.get(PATCHES)
        if patches is not None and patches.ndim == 4 and not hasattr(model.patch_embed, "backbone"):
            patch = tuple(patches.shape[2:])  # its own, where the model's is another
            if (known_count := math.prod(side // p for side, p in zip(pair(known), patch, strict=True))) != count:
                raise InputError(
                    f"init {weights.source}: holds positions of {count} patches beside {prefix} other tokens, and "
                    f"images of {pair(known)} pixels have {known_count}: give encoder.img_size and "
                    "encoder.args.no_embed_class as the weights were trained"
                )
        height, width = (side // p for side, p in zip(pair(known), patch, strict=True))
        return height, width
    if fits:
        return new[0], new[1]
    side = math.isqrt(max(0, count))
    if side * side != count:
        raise InputError(
            f"init {weights.source}: holds positions of {count} patches, which is no square grid, and does not say "
            f"which grid it is (the model has {new[0]} x {new[1]}): give encoder.img_size as the weights were trained"
        )
    return side, side
