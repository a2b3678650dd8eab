"""The models that benchmarks take, by the names that their commands give them."""

from typing import Any, NamedTuple

from quarterlight.ssl.config import DecoderConfig

MASK_RATIO, SIMMIM_MASK_RATIO = 0.75, 0.6


class Vit(NamedTuple):
    """A ViT under MAE's decoder."""

    timm_name: str
    width: int
    depth: int
    heads: int
    patch: int = 16
    side: int = 224  # of an image in pixels
    decoder: tuple[int, int, int] = (512, 8, 16)  # width, depth, heads

    @property
    def unit(self) -> int:
        """Side in pixels of what is masked as a whole."""
        return self.patch

    @property
    def timm_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` besides the size of an image."""
        return {"patch_size": self.patch, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}


class Swin(NamedTuple):
    """A Swin with patches of 4 pixels under a decoder of one block."""

    timm_name: str
    width: int  # of the first stage
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    side: int = 224
    decoder: tuple[int, int, int] = (512, 1, 16)

    @property
    def unit(self) -> int:
        """Side in pixels of what is masked as a whole: what ends as one token."""
        return 4 << (len(self.depths) - 1)

    @property
    def timm_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model` besides the size of an image."""
        return {
            "window_size": self.window,
            "embed_dim": self.width,
            "depths": self.depths,
            "num_heads": self.heads,
        }


Model = Vit | Swin

TOYS = ("vit_toy", "swin_toy")  # to try the commands with
MODELS: dict[str, Model] = {
    "vit_small": Vit("vit_small_patch16_224", 384, 12, 6),
    "vit_base": Vit("vit_base_patch16_224", 768, 12, 12),
    "vit_large": Vit("vit_large_patch16_224", 1024, 24, 16),
    "vit_huge": Vit("vit_huge_patch14_224", 1280, 32, 16, patch=14),
    "swin_tiny": Swin("swin_tiny_patch4_window7_224", 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_base": Swin("swin_base_patch4_window7_224", 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "vit_toy": Vit("vit_tiny_patch16_224", 64, 2, 2, patch=8, side=32, decoder=(32, 1, 2)),
    "swin_toy": Swin("swin_tiny_patch4_window7_224", 32, (2, 2), (2, 4), window=4, side=32, decoder=(32, 1, 2)),
}


def num_units(model: Model) -> int:
    """Returns how many units an image has."""
    return (model.side // model.unit) ** 2


def decoder_config(model: Model, name: str = "transformer") -> DecoderConfig:
    """Returns the model's decoder, or a cross decoder of its size."""
    width, depth, heads = model.decoder
    return DecoderConfig(name=name, embed_dim=width, depth=depth, num_heads=heads)  # type: ignore[arg-type]
