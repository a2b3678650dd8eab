"""The masked autoencoder (He et al. 2022, arXiv:2111.06377, figure 1): encode what is visible, predict what is not."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .config import DecoderConfig
from .decoder import build_decoder
from .encoder import Encoder
from .encoders import build_encoder
from .errors import InputError
from .masking import Masking, gather_units
from .targets import PixelTarget, TargetName, build_target


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of a batch."""

    loss: Float[Tensor, ""]  # over masked units only
    prediction: Float[Tensor, "B S V"]  # the target's values, of all N units in grid order; or of some
    is_masked: Bool[Tensor, "B N"]  # True = hidden, so predicted and scored


class MaskedAutoencoder(nn.Module):
    """An encoder on visible units, a decoder, and the loss on masked ones.

    With `encode_masked` the encoder sees mask tokens in the hidden places instead (MAE's ablation, SimMIM's way).
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        target: PixelTarget,
        *,
        loss: Literal["mse", "l1"] = "mse",
        pred_share: float = 1.0,
        encode_masked: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.target = target
        self.error = {"mse": F.mse_loss, "l1": F.l1_loss}[loss]
        self.pred_share = pred_share
        self.mask_token = nn.Parameter(torch.zeros(encoder.mask_token_dim)) if encode_masked else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    @property
    def sharded_blocks(self) -> set[type[nn.Module]]:
        """Classes of blocks, of encoder and decoder, that are always called as modules."""
        return self.encoder.sharded_blocks | {type(block) for block in getattr(self.decoder, "blocks", ())}

    def forward(
        self, images: Float[Tensor, "B C H W"], masking: Masking, *, only_scored: bool = False
    ) -> Reconstruction:
        """Returns loss and predictions for normalized images (MAE's `forward`, with the masks given).

        `only_scored` is a training step's way: it predicts nothing but the share `pred_share` of the masked units that
        the loss is of (the first in shuffle order, so a random part), and returns those predictions.
        """
        if masking.ids_restore.shape != (len(images), self.encoder.num_units):
            raise InputError(
                f"masks are for {tuple(masking.ids_restore.shape)} (images, units) and there are "
                f"{(len(images), self.encoder.num_units)}: draw them by encoder.sample_masking"
            )
        if self.decoder.multi_scale:
            tokens: Tensor | list[Tensor] = self.encoder.stages(images, masking)
        elif self.mask_token is not None:
            tokens = self.encoder(images, masking, self.mask_token)
        else:
            tokens = self.encoder(images, masking)
        ids = masking.ids_masked
        if only_scored:
            ids = ids[:, : max(1, round(self.pred_share * ids.shape[1]))]
            prediction = scored = self.decoder(tokens, masking, ids)
        else:
            prediction = self.decoder(tokens, masking)
            scored = gather_units(prediction, ids)
        return Reconstruction(self.loss(images, scored, ids), prediction, masking.is_masked)

    def loss(
        self, images: Float[Tensor, "B C H W"], prediction: Float[Tensor, "B S V"], ids: Int[Tensor, "B S"]
    ) -> Float[Tensor, ""]:
        """Returns the mean squared (or absolute) error of the predictions for the units `ids`, in images' precision."""
        with torch.autocast(images.device.type, enabled=False):  # a product with principal components would be bf16
            target = self.target(images, ids)
        return self.error(prediction.to(target.dtype), target)


def attach_decoder(
    encoder: Encoder,
    *,
    in_chans: int,
    decoder: DecoderConfig,
    target: TargetName,
    pca_components: int = 96,
    loss: Literal["mse", "l1"] = "mse",
    pred_share: float = 1.0,
    encode_masked: bool = False,
) -> MaskedAutoencoder:
    """Returns a masked autoencoder around `encoder`, whose weights stay as they are.

    Raises InputError for combinations of options that make no sense.
    """
    what = build_target(target, unit_size=encoder.unit_size, in_chans=in_chans, pca_components=pca_components)
    head = build_decoder(decoder, encoder, num_values=what.num_values, encode_masked=encode_masked)
    return MaskedAutoencoder(encoder, head, what, loss=loss, pred_share=pred_share, encode_masked=encode_masked)


def build_autoencoder(
    encoder_name: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    decoder: DecoderConfig | None = None,
    target: TargetName = "norm_pix",
    pca_components: int = 96,
    loss: Literal["mse", "l1"] = "mse",
    pred_share: float = 1.0,
    encode_masked: bool = False,
    **encoder_args: Any,
) -> MaskedAutoencoder:
    """Returns a masked autoencoder with initial weights around the timm model `encoder_name`.

    The decoder and a ViT start as MAE's, with fixed sine-cosine positions; a Swin as timm makes it.

    `encoder_args` go to `timm.create_model`. Raises InputError for a model that cannot encode visible units only.
    """
    encoder = build_encoder(encoder_name, img_size=img_size, **encoder_args)
    encoder.init_weights()
    encoder.train_positions(False)
    return attach_decoder(
        encoder,
        in_chans=encoder_args.get("in_chans", 3),
        decoder=decoder or DecoderConfig(),
        target=target,
        pca_components=pca_components,
        loss=loss,
        pred_share=pred_share,
        encode_masked=encode_masked,
    )
