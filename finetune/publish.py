"""Writes a release for another library, checks it, and pushes it to the Hub: what launch/export.py does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed
from torch import Tensor, nn

from quarterlight.ssl.encoders import create_timm_model
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import described, export_hub, export_weights
from quarterlight.ssl.export_config import ExportConfig
from quarterlight.ssl.files import replace_file, replace_folder
from quarterlight.ssl.graphs import refuse_onnx, write_onnx, write_torch
from quarterlight.ssl.half import half_error, in_half
from quarterlight.ssl.hub import check_push, push_files
from quarterlight.ssl.model_card import model_card
from quarterlight.ssl.patches import pair
from quarterlight.ssl.plain_vit import mae_tensors
from quarterlight.ssl.write_transformers import hf_autoencoder, hf_model, largest_difference, write_folder

from .release import Release, open_release
from .usage import CHECKERS, usage

SUFFIXES = {"timm": ".safetensors", "transformers": "", "mae": ".pth", "onnx": ".onnx", "torch": ".pt2"}
LARGEST_DIFFERENCE = 1e-4  # of the largest output, between another library and us, both in float32
CHECK_IMAGES = 4
FETCHED_STEM = "_resnet"  # in timm's names of hybrids whose stem is another model, made with its own weights
ONE_FILE = "a single file may do: give a name that ends in .safetensors"


def publish(source: str, out: str, config: ExportConfig) -> dict[str, float | None]:
    """Writes what `source` holds to `out` in the form `config.to`, and pushes it if asked.

    Returns "half_error" (with `config.half`; see there) and "difference": how far the outputs of what was written, run
    by the library it is for, are from ours, in units of the largest one; None where that is not installed. Raises
    InputError, and then has written nothing, for what cannot be read, expressed or checked.
    """
    path = Path(out).expanduser()
    _check_out(path, config.to)
    if config.push is not None:
        check_push(config.push)
    release = open_release(source, config)
    if release.kind == "autoencoder" and config.to not in ("transformers", "mae"):
        raise InputError(f"--to {config.to} takes no decoder: --to transformers and --to mae do, or use --part encoder")
    if config.to == "onnx":
        refuse_onnx(release.model, config.half)
    print(release.report, flush=True)
    measured: dict[str, float | None] = {}
    images = _noise(release)
    if config.half is not None:
        halved = in_half(release.model, config.half)
        moved = half_error(release.model, halved, images, computed_in_half=config.to in ("onnx", "torch"))
        measured["half_error"] = moved
        print(f"{config.half}: outputs move by {100 * moved:.2g} % of their norm", flush=True)
        release = release.with_half(halved, config.half, moved)
    writers = {
        "timm": _to_timm,
        "transformers": _to_transformers,
        "mae": _to_mae,
        "onnx": _to_graph,
        "torch": _to_graph,
    }
    measured["difference"] = difference = writers[config.to](path, release, images, config)
    library = CHECKERS[config.to]
    print(
        f"not checked: {library} is not installed"
        if difference is None
        else f"checked by {library}: outputs differ by at most {difference:.1e} of the largest one",
        flush=True,
    )
    print(f"done: {path} ({_size(path) / 1e6:.1f} MB)", flush=True)
    if config.push is not None:
        print(f"pushed: {_push(path, release, config)}", flush=True)
    return measured


def _check_out(path: Path, to: str) -> None:
    """Raises InputError when `path` is taken, or is a file's name where a folder is written, or the other way round."""
    suffix = SUFFIXES[to]
    if path.exists():
        raise InputError(f"{path} exists: give another name, or delete it")
    one_file = to in ("mae", "onnx", "torch") or (to == "timm" and path.suffix == suffix)
    if one_file and path.suffix != suffix:
        raise InputError(f"{path}: --to {to} writes one file: give a name that ends in {suffix}")
    if not one_file and path.suffix in SUFFIXES.values() and path.suffix:
        raise InputError(f"{path}: --to {to} writes a folder: give a name without {path.suffix}")


def _noise(release: Release) -> Tensor:
    """Returns images on which outputs are compared."""
    size = pair(release.timm.patch_embed.img_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(CHECK_IMAGES, len(release.spec.mean), *size, generator=generator)


def _to_timm(path: Path, release: Release, images: Tensor, config: ExportConfig) -> float:
    """Writes timm's folder, or a single file, and returns how far timm's outputs are from ours.

    Raises InputError, and leaves nothing, where timm cannot load it or computes something else.
    """
    spec, model = release.spec, release.model
    found: list[float] = []

    def file(partial: Path) -> None:
        named = {} if release.labels is None else {"class_names": release.labels}
        export_weights(partial, model, spec, release.facts | named)
        found.append(_checked(lambda: _from_file(partial, release), model, images, ""))

    def folder(partial: Path) -> None:
        where = f"hf-hub:{config.push}" if config.push else "local-dir:."
        texts: Any = {"title": release.title, "facts": release.facts, "labels": release.labels, "story": release.story}
        export_hub(partial, model, spec, **texts, crop_pct=release.crop_pct, where=where)
        read = lambda: timm.create_model(f"local-dir:{partial}", pretrained=True)  # noqa: E731
        found.append(_checked(read, model, images, f"; {ONE_FILE}"))

    if path.suffix == SUFFIXES["timm"]:
        replace_file(path, file)
        return found[0]
    if isinstance(release.timm.patch_embed, HybridEmbed) and FETCHED_STEM in spec.name:
        raise InputError(f"timm fetches the stem of {spec.name} whenever it loads a folder: {ONE_FILE}")
    replace_folder(path, folder)
    return found[0]


def _from_file(path: Path, release: Release) -> Any:
    """Returns timm's model with the weights of a single file, loaded strictly."""
    args = _without_classes(release.spec.timm_args())
    loaded: Any = create_timm_model(release.spec.name, num_classes=release.model.num_classes, **args)
    loaded.load_state_dict(load_file(path), strict=True)
    return loaded


def _checked(read: Callable[[], Any], model: Any, images: Tensor, way_out: str) -> float:
    """Returns how far the outputs of what `read` returns are from the model's. Raises InputError where that is far."""
    try:
        loaded = read()
    except Exception as error:  # timm and the network raise many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"timm cannot load what was written ({reason}): nothing stays{way_out}") from error
    difference = _difference(loaded.eval(), copy.deepcopy(model).float(), images)
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"timm's {type(loaded).__name__} differs by {difference:.1e} of the largest output: nothing is written"
        )
    return difference


def _without_classes(args: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if key != "num_classes"}


@torch.no_grad()
def _difference(theirs: nn.Module, ours: nn.Module, images: Tensor) -> float:
    wanted = ours(images)
    return float((theirs(images) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


def _to_transformers(path: Path, release: Release, images: Tensor, config: ExportConfig) -> float | None:
    """Writes transformers' folder and returns how far its outputs are from ours; nothing stays where that is far."""
    model = release.model
    made = (
        hf_autoencoder(model, release.mask_ratio)
        if release.kind == "autoencoder"
        else hf_model(model, labels=release.labels)
    )
    kind = made.config["architectures"][0]
    found: list[float | None] = []

    def fill(partial: Path) -> None:
        write_folder(partial, made, release.spec, release.crop_pct)
        text = _card(release, "transformers", config.push or ".", kind)
        (partial / "README.md").write_text(text, encoding="utf-8")
        difference = largest_difference(partial, copy.deepcopy(model).float(), images)
        if difference is not None and not difference <= LARGEST_DIFFERENCE:
            raise InputError(
                f"transformers' {kind} differs by {difference:.1e} of the largest output: nothing is written; "
                "use --to timm"
            )
        found.append(difference)

    replace_folder(path, fill)
    return found[0]


def _to_mae(path: Path, release: Release, images: Tensor, config: ExportConfig) -> float:
    """Writes MAE's file and returns how far what is read from it is from ours: 0, or it is not written."""
    del images, config
    tensors = {name: x.detach().clone() for name, x in mae_tensors(release.model).items()}

    def write(partial: Path) -> None:
        torch.save({"model": tensors}, partial)
        found = torch.load(partial, weights_only=True)["model"]
        assert all(torch.equal(found[name], x) for name, x in tensors.items())

    replace_file(path, write)
    return 0.0


def _to_graph(path: Path, release: Release, images: Tensor, config: ExportConfig) -> float:
    """Writes an ONNX or .pt2 file and returns how far its outputs are from ours."""
    write = write_onnx if config.to == "onnx" else write_torch
    facts = release.facts | ({} if release.labels is None else {"class_names": release.labels})
    dtype = next(release.model.parameters()).dtype
    return write(path, release.model, release.spec, facts, images.to(dtype))


def _card(release: Release, to: str, where: str, what: str) -> str:
    """Returns the model card; `what` is the file's name, or the class in transformers."""
    return model_card(
        release.title,
        described(release.spec),
        usage=usage(to, release, where, what),
        library={"transformers": "transformers", "timm": "timm", "onnx": "onnx"}.get(to, "pytorch"),
        tags=["image-classification" if release.kind == "classifier" else "image-feature-extraction"],
        facts=release.facts,
        story=release.story,
    )


def _push(path: Path, release: Release, config: ExportConfig) -> str:
    """Puts what was written onto the Hub and returns its address there."""
    assert config.push is not None
    if path.is_dir():
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(path.iterdir())}
    else:
        files = {path.name: path, "README.md": _card(release, config.to, config.push, path.name).encode()}
    return push_files(config.push, files, private=config.private, message=f"{release.title} (--to {config.to})")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
