"""From an encoder to a timm classifier with the same weights and a new head."""

from typing import Any, Literal

from timm.optim import param_groups_layer_decay
from torch import nn

from quarterlight.ssl.encoders import create_timm_model
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.released import HEAD, Weights, encoder_with_weights, load_weights

from .config import FinetuneOptimConfig


def build_classifier(
    spec: ModelSpec, weights: Weights | None, *, num_classes: int, pool: Literal["avg", "token"], drop_path: float
) -> tuple[Any, ModelSpec, str]:
    """Returns the timm classifier, the spec that builds it again, and a sentence on the weights loaded.

    With `pool` "avg" a ViT's final norm moves behind the pooling and starts afresh (`fc_norm`); with "token", and in a
    Swin, it stays. The head starts at 2e-5 times a normal, as MAE's, so that first steps do not disturb the encoder.
    All parameters are trained, positions included. `weights` None starts from the encoder's initial weights.

    Raises InputError when the weights do not fit or timm cannot pool the model this way.
    """
    encoder, report = encoder_with_weights(spec, weights)
    if pool == "token" and getattr(encoder.timm, "cls_token", None) is None:
        raise InputError(f"pool token: {spec.name} has no class token; use pool avg")
    args = spec.args | {"num_classes": num_classes, "global_pool": pool}
    built = ModelSpec(spec.name, args, spec.mean, spec.std)
    classifier = create_timm_model(spec.name, **built.timm_args(), drop_path_rate=drop_path)
    load_weights(classifier, Weights("encoder", dict(encoder.timm.state_dict()), spec))
    head: Any = classifier.get_classifier()  # type: ignore[operator]
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return classifier, built, report


def load_classifier(spec: ModelSpec, weights: Weights) -> tuple[Any, ModelSpec, str]:
    """Returns the timm classifier that `weights` hold, head included, the spec that builds it again, and a sentence.

    `spec` is the encoder's; another image size than the weights were trained at resizes positions, as for an encoder.
    Raises InputError when the weights hold no head, or one of another pooling than the model has.
    """
    outputs = [x for name, x in weights.head.items() if name in ("head.weight", "head.fc.weight")]
    if not outputs:
        raise InputError(
            f"init {weights.source}: holds no classification head; give a fine-tuning run or its "
            "classifier.safetensors (launch/finetune.py makes one of this encoder)"
        )
    args = spec.args | {"num_classes": len(outputs[0])}
    if "fc_norm.weight" in weights.head:
        args["global_pool"] = "avg"  # a norm behind the pooling, as MAE's classifiers have
    built = ModelSpec(spec.name, args, spec.mean, spec.std)
    classifier: Any = create_timm_model(spec.name, **built.timm_args())
    report = load_weights(classifier, weights)
    wanted = {name: x.shape for name, x in classifier.state_dict().items() if name.startswith(HEAD)}
    if wanted != (found := {name: x.shape for name, x in weights.head.items()}):
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise InputError(
            f"init {weights.source}: its classification head does not fit {spec.name} ({', '.join(odd)}): give the "
            "encoder.args it was made with"
        )
    classifier.load_state_dict(weights.head, strict=False)
    return classifier, built, f"{report}, and a head of {classifier.num_classes} classes"


def layer_decay_groups(classifier: nn.Module, config: FinetuneOptimConfig) -> list[dict[str, Any]]:
    """Returns parameter groups with `lr_scale` = layer_decay ** (layers above), and weight decay as in fine-tuning.

    Layers are timm's, a block each (a Swin-B's 24 count through all stages); positions, class token, biases, norms and
    tables of relative positions are not decayed. Two corrections make the scales those of MAE (`lr_decay.py`) and
    SimMIM (`optimizer.py`): the final norm learns at the rate of the head, and the merging of patches at that of the
    last block before it; timm counts them to the last block, and to the block that follows. Learned rotations, which
    timm counts to the head, learn with the positions.
    """
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    by_layer = param_groups_layer_decay(
        classifier,
        config.weight_decay,
        no_weight_decay_list=classifier.no_weight_decay(),  # type: ignore[operator]
        layer_decay=config.layer_decay,
    )
    lowest = min(float(group["lr_scale"]) for group in by_layer)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in by_layer:
        for parameter in group["params"]:
            scale = float(group["lr_scale"])
            if names[parameter].startswith("norm."):
                scale = 1.0
            elif ".downsample." in names[parameter]:
                scale *= config.layer_decay
            elif names[parameter].startswith("rope."):
                scale = lowest
            groups.setdefault((scale, float(group["weight_decay"])), []).append(parameter)
    return [{"params": params, "lr_scale": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
