"""What is done to images to see what a classifier can do without, and its logits then."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from quarterlight.ssl.config import EncoderConfig
from quarterlight.ssl.encoder import Encoder
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.randoms import uniforms
from quarterlight.ssl.released import encoder_with_weights

from .network import open_weights
from .occlusion import Saliency, drop_patches, drop_ranks, leave_out, on_patches, shuffle_sizes, shuffle_tiles
from .use_config import CropConfig, RobustnessConfig

PIXELS, LEFT_OUT = "pixels", "left_out"


class Condition(NamedTuple):
    """What is done to the images."""

    kind: str  # "whole", "shuffle", or the order in which patches are dropped
    how: str = ""  # PIXELS: they are painted over; LEFT_OUT: the encoder does not get them
    dropped: int = 0  # patches of each image
    tiles: int = 1  # a side, shuffled


class Damage:
    """Gives the logits of a classifier under each condition."""

    def __init__(self, config: RobustnessConfig, classifier: Any, encoder: Encoder, spec: ModelSpec) -> None:
        """Refuses, by InputError, patches and tiles that do not fit the images."""
        self.classifier, self.encoder, self.seed = classifier, encoder, config.seed
        self.patch = encoder.unit_size if config.patch is None else config.patch
        height, width = encoder.img_size
        if height % self.patch or width % self.patch:
            sizes = [u for u in range(1, min(height, width)) if not height % u and not width % u]
            near = ", ".join(map(str, sorted(sorted(sizes, key=lambda u: abs(u - self.patch))[:4])))
            raise InputError(f"patch {self.patch} does not divide the image of {height} x {width} pixels: use {near}")
        if config.leave_out and self.patch % encoder.unit_size:
            raise InputError(
                f"leave_out: the encoder leaves out {encoder.unit_size} pixels a side as a whole, and patch is "
                f"{self.patch}: use a multiple of {encoder.unit_size}"
            )
        self.grid = (height // self.patch, width // self.patch)
        black = [-mean / std for mean, std in zip(spec.mean, spec.std, strict=True)]
        self.fill = torch.tensor(black if config.fill == "black" else [0.0] * len(black))
        self.saliency: Saliency | None = None
        if {"salient", "non_salient"} & set(config.drop_orders):
            self.saliency = _saliency(config, encoder)
        self.conditions = self._conditions(config)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    def _conditions(self, config: RobustnessConfig) -> list[Condition]:
        size, found = self.encoder.img_size, [Condition("whole")]
        counts = [min(self.num_patches - 1, round(share * self.num_patches)) for share in config.drop_shares]
        for how in (PIXELS, LEFT_OUT) if config.leave_out else (PIXELS,):
            for order in config.drop_orders:
                found += [Condition(order, how, count) for count in dict.fromkeys(counts) if count]
        tiles = shuffle_sizes(size, self.patch) if config.shuffle_grids is None else config.shuffle_grids
        if odd := [n for n in tiles if size[0] % n or size[1] % n]:
            fitting = [str(n) for n in range(2, min(size) + 1) if not size[0] % n and not size[1] % n]
            raise InputError(
                f"shuffle_grids {odd[0]}: an image of {size[0]} x {size[1]} pixels has no {odd[0]} x {odd[0]} equal "
                f"tiles: use some of {', '.join(fitting[:10])}"
            )
        return found + [Condition("shuffle", tiles=n) for n in tiles]

    def to(self, device: torch.device) -> "Damage":
        """Moves the networks to a device."""
        self.classifier.eval().to(device)
        self.encoder.eval().to(device)
        self.fill = self.fill.to(device)
        if self.saliency is not None:
            self.saliency.encoder.eval().to(device)
        return self

    def ranks(self, images: Float[Tensor, "B C H W"], positions: Int[np.ndarray, " B"]) -> dict[str, Tensor]:
        """Returns, by order, when each patch is dropped, 0 first: [B, N]."""
        found = {}
        if any(condition.kind == "random" for condition in self.conditions):
            noise = uniforms(self.seed, "occlusion", positions, self.num_patches)
            found["random"] = drop_ranks(torch.from_numpy(noise).to(images.device))
        if self.saliency is not None:
            scores = on_patches(self.saliency(images), self.grid)
            found |= {"salient": drop_ranks(scores), "non_salient": drop_ranks(-scores)}
        return found

    def logits(
        self,
        condition: Condition,
        images: Float[Tensor, "B C H W"],
        positions: Int[np.ndarray, " B"],
        ranks: dict[str, Tensor],
    ) -> Float[Tensor, "B classes"]:
        """Returns the logits of normalized images under a condition; `positions` are their places in the set."""
        if condition.kind == "whole":
            return self.classifier(images)
        if condition.kind == "shuffle":
            return self.classifier(shuffle_tiles(images, condition.tiles, seed=self.seed, positions=positions))
        is_dropped = ranks[condition.kind] < condition.dropped
        if condition.how == LEFT_OUT:
            return leave_out(self.encoder, self.classifier, images, is_dropped, self.patch, condition.dropped)
        return self.classifier(drop_patches(images, is_dropped, self.patch, self.fill))


def _saliency(config: RobustnessConfig, encoder: Encoder) -> Saliency:
    """Returns what says which patches are salient: the evaluated network, or the one that `config.saliency` names."""
    if config.saliency is not None:
        weights, spec = open_weights(config.saliency, EncoderConfig(), CropConfig(img_size=encoder.img_size))
        encoder, _ = encoder_with_weights(spec, weights)
    model = encoder.timm
    by_class_token = getattr(model, "cls_token", None) is not None and model.global_pool == "token"
    return Saliency(encoder, by_class_token=by_class_token)
