"""From an encoder to a timm classifier with the same weights and a new head."""

from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from quarterlight.ssl.encoders import create_timm_model
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.released import Weights, load_encoder, load_weights

from .config import FinetuneOptimConfig


def build_classifier(
    spec: ModelSpec, weights: Weights | None, *, num_classes: int, pool: Literal["avg", "token"], drop_path: float
) -> tuple[VisionTransformer, ModelSpec, str]:
    """Returns the timm classifier, the spec that builds it again, and a sentence on the weights loaded.

    With `pool` "avg" the final norm moves behind the pooling and starts afresh (`fc_norm`); with "token" it stays. The
    head starts at 2e-5 times a normal, as MAE's, so that the first steps do not disturb the encoder. All parameters are
    trained, positions included. `weights` None starts from the encoder's initial weights.

    Raises InputError when the weights do not fit or timm cannot pool the model this way.
    """
    encoder, report = load_encoder(spec, weights)
    args = spec.args | {"num_classes": num_classes, "global_pool": pool}
    built = ModelSpec(spec.name, args, spec.mean, spec.std)
    classifier = create_timm_model(spec.name, **built.timm_args(), drop_path_rate=drop_path)
    assert isinstance(classifier, VisionTransformer) and isinstance(classifier.head, nn.Linear)
    load_weights(classifier, Weights("encoder", dict(encoder.timm.state_dict()), spec))
    nn.init.trunc_normal_(classifier.head.weight, std=2e-5)
    nn.init.zeros_(classifier.head.bias)
    return classifier, built, report


def layer_decay_groups(classifier: VisionTransformer, config: FinetuneOptimConfig) -> list[dict[str, Any]]:
    """Returns parameter groups with `lr_scale` = layer_decay ** (layers above), and weight decay as MAE fine-tunes.

    Positions, class token, biases and norms are not decayed. Differs from MAE: with `pool` "token" the final norm
    learns at the rate of the last block, since timm counts it there; in MAE at the head's. "avg" is MAE's.
    """
    return param_groups_layer_decay(
        classifier,
        config.weight_decay,
        no_weight_decay_list=classifier.no_weight_decay(),
        layer_decay=config.layer_decay,
    )
