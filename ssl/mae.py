"""The masked autoencoder (He et al. 2022, arXiv:2111.06377, figure 1): encode what is visible, predict what is not."""

from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from .config import DecoderConfig
from .decoder import TransformerDecoder
from .encoders import Encoder, build_encoder
from .masking import Masking
from .patches import pixel_target


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of a batch."""

    loss: Float[Tensor, ""]  # mean squared error over masked patches only
    prediction: Float[Tensor, "B N P2C"]  # grid order, each patch as (row, column, channel)
    is_masked: Bool[Tensor, "B N"]  # True = hidden, so predicted and scored


class MaskedAutoencoder(nn.Module):
    """An encoder on visible patches, a decoder, and the loss on masked ones."""

    def __init__(self, encoder: Encoder, decoder: TransformerDecoder, *, target: Literal["norm_pix", "pixels"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.target = target

    def forward(self, images: Float[Tensor, "B C H W"], masking: Masking) -> Reconstruction:
        """Returns loss and predictions for normalized images (MAE's `forward`, with the masks given)."""
        tokens = self.encoder(images, masking)
        prediction = self.decoder(tokens, masking)
        loss = self.loss(images, prediction, masking)
        return Reconstruction(loss, prediction, masking.is_masked)

    def loss(
        self, images: Float[Tensor, "B C H W"], prediction: Float[Tensor, "B N P2C"], masking: Masking
    ) -> Float[Tensor, ""]:
        """Returns the mean over masked patches of the mean squared error of their pixels, in the images' precision."""
        target = pixel_target(images, self.encoder.unit_size, norm_pix=self.target == "norm_pix")
        errors = (prediction.to(target.dtype) - target).square().mean(dim=-1)  # [B, N]
        masked = masking.is_masked.to(errors.dtype)
        return (errors * masked).sum() / masked.sum()


def attach_decoder(
    encoder: Encoder, *, decoder: DecoderConfig, target: Literal["norm_pix", "pixels"], in_chans: int
) -> MaskedAutoencoder:
    """Returns a masked autoencoder around `encoder`, whose weights and positions stay as they are."""
    head = TransformerDecoder(
        decoder,
        encoder_dim=encoder.embed_dim,
        grid=encoder.grid,
        num_prefix_tokens=encoder.num_prefix_tokens,
        out_dim=encoder.unit_size**2 * in_chans,
    )
    encoder.fix_positions()  # as MAE's; fine-tuning trains them
    return MaskedAutoencoder(encoder, head, target=target)


def build_autoencoder(
    encoder_name: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    decoder: DecoderConfig | None = None,
    target: Literal["norm_pix", "pixels"] = "norm_pix",
    **encoder_args: Any,
) -> MaskedAutoencoder:
    """Returns a masked autoencoder with MAE's initial weights around the timm model `encoder_name`.

    `encoder_args` go to `timm.create_model`. Raises InputError for a model that cannot encode visible patches only.
    """
    encoder = build_encoder(encoder_name, img_size=img_size, **encoder_args)
    encoder.init_weights()
    in_chans = encoder_args.get("in_chans", 3)
    return attach_decoder(encoder, decoder=decoder or DecoderConfig(), target=target, in_chans=in_chans)
