"""Released weights to a file of this project, which timm loads strictly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from .config import DataConfig
from .convert_config import ConvertConfig
from .encoders import create_timm_model
from .errors import InputError
from .export import ModelSpec, export_weights
from .files import replace_file
from .released import encoder_with_weights, load_weights
from .runs import environment
from .spec import encoder_spec
from .weights import HEAD, Weights, read_safetensors, read_weights


def convert(init: str, out: str, config: ConvertConfig) -> None:
    """Writes what `init` holds, encoder or classifier, to the safetensors file `out`, and says what matched.

    The file is there only after timm has loaded it strictly. Raises InputError when the weights do not load whole, or
    `out` cannot be written.
    """
    path = Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"out {out} does not end in .safetensors: give the name of such a file")
    if path.exists():
        raise InputError(f"out {out} exists: give another name, or remove it")
    weights = read_weights(init, merge_order=config.merge_order)
    weights = replace(weights, allow_partial=config.allow_partial)
    known = weights.spec.args if weights.spec is not None else {}
    data = DataConfig(train="", mean=config.mean, std=config.std)
    in_chans: Any = config.in_chans or config.encoder.args.get("in_chans") or known.get("in_chans", 3)
    data = replace(data, in_chans=in_chans)
    spec = encoder_spec(config.encoder, data, weights)
    encoder, report = encoder_with_weights(spec, weights)
    model, written = encoder.timm, spec
    if weights.head and config.head:
        model, written = _classifier(spec, weights)
        report = f"{report}, and a head of {model.num_classes} classes"
    facts: dict[str, Any] = {"source_kind": weights.origin or weights.kind or "unknown", "source": Path(init).name}
    facts["made_by"] = f"quarterlight {environment()['packages']['quarterlight']}"
    if weights.class_names and model.num_classes == len(weights.class_names):
        facts["class_names"] = weights.class_names
    replace_file(path, lambda partial: _write_checked(partial, model, written, facts))
    print(f"{report}\n{written.name} with {written.args}, mean {list(written.mean)} and std {list(written.std)}")
    print(f"done: {path}", flush=True)


def _classifier(spec: ModelSpec, weights: Weights) -> tuple[Any, ModelSpec]:
    """Returns the timm classifier with these weights and their head, and what builds it again."""
    outputs = [x for name, x in weights.head.items() if name in ("head.weight", "head.fc.weight")]
    if not outputs:
        raise InputError(f"init {weights.source}: its head holds no linear layer: leave it away by --head false")
    built = replace(spec, args=spec.args | {"num_classes": len(outputs[0])})
    model: Any = create_timm_model(built.name, **built.timm_args())
    load_weights(model, weights)
    wanted = {name: x.shape for name, x in model.state_dict().items() if name.startswith(HEAD)}
    found = {name: x.shape for name, x in weights.head.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise InputError(
            f"init {weights.source}: its head does not fit {spec.name} ({', '.join(odd)}): leave it away by --head "
            "false"
        )
    model.load_state_dict(weights.head, strict=False)
    return model, built


def _write_checked(partial: Path, model: Any, spec: ModelSpec, facts: dict[str, Any]) -> None:
    """Writes the file, loads it into timm's own model without any help, and reads it as `--init` does.

    Raises InputError if that fails.
    """
    export_weights(partial, model, spec, facts)
    try:
        args: dict[str, Any] = {"num_classes": 0, **spec.timm_args()}
        plain = timm.create_model(spec.name, **args)
        plain.load_state_dict(load_file(partial), strict=True)
    except (RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"{spec.name} does not take what was converted ({why}): this is a defect, please report it"
        ) from error
    state = model.state_dict()
    assert all(torch.equal(x, state[name].cpu()) for name, x in plain.state_dict().items())
    read = read_safetensors(partial)
    assert read.spec is not None and read.tensors.keys() | read.head.keys() == state.keys()
