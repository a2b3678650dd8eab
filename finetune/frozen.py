"""A head on a frozen encoder, and the timm classifier that the two make."""

from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.encoders import create_timm_model
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.pooling import pooled

from .probe_config import TrainProbeConfig


class FrozenClassifier(nn.Module):
    """Logits of images [B, C, H, W], normalized: only the head is a part of this module.

    The encoder is none, so states hold the head alone and nothing moves, averages or shards the rest. Instead they hold
    the encoder's digest, and loading one refuses another encoder.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, pool: Literal["token", "avg"] | None, digest: bytes) -> None:
        """Takes an encoder in eval mode on its device; `pool` None gives the head the tokens themselves."""
        super().__init__()
        self._frozen = (encoder,)  # in a tuple, which nn.Module does not look into
        self.head, self.pool, self.digest = head, pool, digest

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder."""
        return self._frozen[0]

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Returns the logits."""
        encoder = self.encoder
        with torch.no_grad():
            tokens = encoder(images)
            if self.pool is not None:
                given = pooled(tokens, encoder)[self.pool]
            else:  # as timm's own attention pooling gets them
                given = tokens if isinstance(encoder.timm, Eva) else tokens[:, encoder.num_prefix_tokens :]
        return self.head(given)

    def get_extra_state(self) -> UInt8[Tensor, " bytes"]:
        """Returns the encoder's digest, for the state."""
        return torch.frombuffer(bytearray(self.digest), dtype=torch.uint8)

    def set_extra_state(self, state: UInt8[Tensor, " bytes"]) -> None:
        """Raises InputError when a state was trained on another encoder."""
        if bytes(state.cpu().numpy().tobytes()) != self.digest:
            raise InputError(
                "init: these are not the weights that the run in run_dir began with (they, or data.mean and data.std, "
                "have changed since): give the same --init, or another run_dir"
            )


def build_head(
    config: TrainProbeConfig, encoder: Encoder, spec: ModelSpec, num_classes: int
) -> tuple[nn.Module, Literal["token", "avg"] | None, ModelSpec]:
    """Returns a new head, what it looks at, and the spec of the timm classifier that `fold` makes of the two.

    A linear head is MAE's: batch norm without scale and shift (eps 1e-6), then a linear layer that starts at 0.01 times
    a normal. An attentive one is timm's attention pooling (`global_pool="map"`): one learned query attends to the patch
    tokens (in timm's Eva class to all), an MLP follows, then the linear layer; so AIM, V-JEPA and CAPI probe.

    Raises InputError for a pooling that the encoder does not have.
    """
    has_token = getattr(encoder.timm, "cls_token", None) is not None
    is_swin = not isinstance(encoder.timm, VisionTransformer | Eva)
    if config.head == "attentive":
        if config.pool is not None:
            raise InputError(f"pool {config.pool}: an attentive head pools by attention; leave pool null")
        if is_swin:
            raise InputError(f"head attentive: timm has no attention pooling for {spec.name}; use head linear")
        pool, args = None, {"global_pool": "map"} | _norms_of(encoder)
    else:
        pool = config.pool or ("token" if has_token else "avg")
        if pool == "token" and not has_token:
            raise InputError(f"pool token: {spec.name} has no class token; use pool avg")
        args = {"global_pool": pool} | ({} if is_swin else _norms_of(encoder))
    built = ModelSpec(spec.name, spec.args | args | {"num_classes": num_classes}, spec.mean, spec.std)
    linear = nn.Linear(encoder.embed_dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    if pool is None:
        attention: Any = create_timm_model(built.name, **built.timm_args()).attn_pool
        return nn.Sequential(attention, linear), pool, built
    return nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6), linear), pool, built


def _norms_of(encoder: Encoder) -> dict[str, Any]:
    """Returns timm's arguments for a classifier whose norm stays where the encoder has it, if anywhere: before pooling.

    By default timm moves it behind an average, and some of its models come so.
    """
    has_norm = not isinstance(encoder.timm.norm, nn.Identity)
    if isinstance(encoder.timm, Eva):
        return {"use_fc_norm": False, "use_post_transformer_norm": has_norm}
    return {"fc_norm": False} if has_norm else {"final_norm": False}


@torch.no_grad()
def fold(classifier: FrozenClassifier, spec: ModelSpec) -> Any:
    """Returns the timm classifier of `spec` that computes the same in eval mode, on the CPU.

    Batch norm without scale and shift divides by what it has measured; the linear layer behind it takes that over.
    """
    model: Any = create_timm_model(spec.name, **spec.timm_args())
    weights = {name: x.cpu() for name, x in classifier.encoder.timm.state_dict().items()}
    loaded = model.load_state_dict(weights, strict=False)
    assert all(name.startswith(("head.", "fc_norm.", "attn_pool.")) for names in loaded for name in names), loaded
    first, linear = classifier.head[0], classifier.head[1]  # type: ignore[index]
    weight, bias = linear.weight.detach().cpu().double(), linear.bias.detach().cpu().double()
    if isinstance(first, nn.BatchNorm1d):
        scale = (first.running_var.cpu().double() + first.eps).rsqrt()  # type: ignore[union-attr]
        weight = weight * scale
        bias = bias - weight @ first.running_mean.cpu().double()  # type: ignore[union-attr]
    else:
        model.attn_pool.load_state_dict({name: x.cpu() for name, x in first.state_dict().items()})
    head = model.get_classifier()
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return model.eval()
