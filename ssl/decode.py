"""Bytes of an image file to pixels. Strict: a damaged file raises instead of giving grey areas."""

import io
from typing import Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError


class UnreadableImage(ValueError):
    """These bytes are not a whole image; the message says why."""


def decode_image(data: bytes, in_chans: Literal[1, 3] = 3) -> UInt8[np.ndarray, "H W C"]:
    """Returns the pixels, in color (3 channels) or grey (1).

    JPEGs go through simplejpeg, bit-identical to PIL and faster, and strict: PIL keeps silent about zeroed blocks.
    PIL reads the rest. Raises UnreadableImage.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, "RGB" if in_chans == 3 else "GRAY", strict=True)
        except ValueError as error:
            raise UnreadableImage(str(error)) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits at 255; keep the upper eight
                image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
            elif image.mode == "P":  # convert() warns where single palette entries are transparent
                image = image.convert("RGBA")
            pixels = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    except UnidentifiedImageError as error:  # its own words hold a memory address, another in every run
        raise UnreadableImage(f"not an image in a known format ({len(data)} bytes)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise UnreadableImage(" ".join(str(error).split())) from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
