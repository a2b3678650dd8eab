"""Bytes of an image file to pixels. Strict: damage that the format lets one see raises instead of giving wrong pixels.

PNG has checksums, and they are compared. Other formats have none: in a JPEG a few changed bytes mostly pass for other
pixels, and in WebP, TIFF and BMP nearly everything does but a file that is cut short.
"""

import io
import warnings
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # where PIL refuses too: beyond it a file of kilobytes fills the memory
FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # PIL's others start programs or are no images
ORIENTATION = 0x0112  # EXIF's tag
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every one
APP1, SCAN = 0xE1, 0xDA  # JPEG segments: where EXIF lies, and where the pixels begin
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # segments that say that the pixels come in scans, coarse ones first
SNAP = 8  # pixels: the side of a JPEG block, of which a smaller decoding keeps a whole number of pixels
OVERSAMPLING = 1.5  # a smaller decoding still has this many times the pixels that are asked for, per side


class UnreadableImage(ValueError):
    """These bytes are not a whole image; the message says why."""


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class ImageFile:
    """An image whose size is known before it is decoded, so that little of a large photo need be.

    It stands upright, as its EXIF orientation says. Differs from MAE: torchvision's ImageFolder leaves photos lying.
    """

    def __init__(self, data: bytes, in_chans: Literal[1, 3] = 3) -> None:
        """Reads the header (of formats other than JPEG, the pixels). Raises UnreadableImage."""
        self.data = data
        self.in_chans: Literal[1, 3] = in_chans
        self.orientation = 1
        self._scalable = False  # not by what was decoded before: crops must not depend on each other
        self._decoded: dict[int, np.ndarray] = {}  # by eighths: several crops of one image decode it once
        if data[:2] == b"\xff\xd8":
            try:
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=True)
            except (ValueError, KeyError) as error:  # the latter for colors that it does not know
                raise UnreadableImage(f"not a JPEG's header ({error})") from error
            self.height, self.width = int(height), int(width)
            _refuse_bomb(self.height, self.width)
            self.orientation = _orientation(data)
            if self.orientation >= 5:
                self.height, self.width = self.width, self.height
            if colorspace in ("CMYK", "YCCK"):  # inverted by some writers, which PIL knows; checked by simplejpeg
                _decode_jpeg(data, in_chans, 0, 0)
                self._decoded[8] = _decode_by_pil(data, in_chans)
            self._scalable = self.orientation == 1 and not self._decoded
        else:
            self._decoded[8] = _decode_by_pil(data, in_chans)
            self.height, self.width, _ = self._decoded[8].shape

    @classmethod
    def of_pixels(cls, pixels: UInt8[np.ndarray, "H W C"]) -> "ImageFile":
        """Returns an image that is decoded already."""
        image = cls.__new__(cls)
        image.data, image.orientation, image._scalable, image._decoded = b"", 1, False, {8: pixels}
        image.height, image.width, channels = pixels.shape
        image.in_chans = 3 if channels == 3 else 1
        return image

    def pixels(self) -> UInt8[np.ndarray, "H W C"]:
        """Returns the whole image in color (3 channels) or grey (1). Raises UnreadableImage.

        JPEGs go through simplejpeg, bit-identical to PIL and faster, and strict: PIL keeps silent about zeroed blocks.
        """
        return self._scaled(8)

    def crop(self, box: Box, size: tuple[int, int]) -> UInt8[np.ndarray, "h w C"]:
        """Returns the part in `box`, as many pixels as it has or, where it is far larger than `size`, fewer.

        Which part exactly, says `scaled_box`. Raises UnreadableImage.
        """
        box, eighths = self.scaled_box(box, size)
        top, left, height, width = (x * eighths // 8 for x in box)
        return self._scaled(eighths)[top : top + height, left : left + width]

    def scaled_box(self, box: Box, size: tuple[int, int]) -> tuple[Box, int]:
        """Returns the box that `crop` cuts out, and at which scale the image is decoded for it, in eighths.

        A JPEG is decoded at a half, a quarter or an eighth where that leaves OVERSAMPLING times `size` (height, width)
        at least; the box is then widened to whole blocks of SNAP pixels, or else its edges would fall between pixels.
        """
        eighths = 8
        if self._scalable:
            while eighths > 1 and all(x * eighths >= 16 * OVERSAMPLING * s for x, s in zip(box[2:], size, strict=True)):
                eighths //= 2
        return (box if eighths == 8 else _snapped(box, self.height, self.width)), eighths

    def _scaled(self, eighths: int) -> np.ndarray:
        if eighths not in self._decoded:
            height, width = (-(-x * eighths // 8) if eighths < 8 else 0 for x in (self.height, self.width))
            pixels = _decode_jpeg(self.data, self.in_chans, height, width)
            self._decoded[eighths] = _upright(pixels, self.orientation)
        return self._decoded[eighths]


def decode_image(data: bytes, in_chans: Literal[1, 3] = 3) -> UInt8[np.ndarray, "H W C"]:
    """Returns the pixels of an image file, upright, in color (3 channels) or grey (1). Raises UnreadableImage."""
    return ImageFile(data, in_chans).pixels()


def _snapped(box: Box, height: int, width: int) -> Box:
    """Returns the box widened to whole blocks of SNAP pixels, as far as the image has whole ones."""
    top, left = box.top // SNAP * SNAP, box.left // SNAP * SNAP
    bottom = min(-(-(box.top + box.height) // SNAP), height // SNAP) * SNAP
    right = min(-(-(box.left + box.width) // SNAP), width // SNAP) * SNAP
    return Box(top, left, bottom - top, right - left)


def _decode_jpeg(data: bytes, in_chans: int, min_height: int, min_width: int) -> np.ndarray:
    """Returns the pixels at the smallest scale that gives at least these sizes; 0: at full size."""
    options = {"colorspace": "RGB" if in_chans == 3 else "GRAY", "min_height": min_height, "min_width": min_width}
    try:
        return simplejpeg.decode_jpeg(data, **options, strict=True)
    except ValueError as error:
        if _is_progressive(data):  # it may lack whole scans, which only shows in the picture
            raise UnreadableImage(str(error)) from error
        try:  # a file that lacks nothing but its end marker is whole; one that lacks more still raises
            return simplejpeg.decode_jpeg(data + b"\xff\xd9", **options, strict=True)
        except ValueError:
            raise UnreadableImage(str(error)) from error


def _decode_by_pil(data: bytes, in_chans: int) -> np.ndarray:
    if data.startswith(PNG):
        _check_png(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, of odd metadata: the pixels are what counts
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _refuse_bomb(opened.height, opened.width)
                image = ImageOps.exif_transpose(opened)
                is_wide = image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PPM")
                if image.mode in ("I", "F") and not is_wide:  # convert() would make it white or black
                    raise UnreadableImage(f"its numbers are no pixel values from 0 to 255 or 65535 ({image.mode})")
                if is_wide:  # convert() would clip 16 bits at 255; keep the upper eight
                    image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
                elif image.mode == "P":  # convert() warns where single palette entries are transparent
                    image = image.convert("RGBA")
                pixels = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # its own words hold a memory address, another in every run
        raise UnreadableImage(f"not an image in a known format ({len(data)} bytes)") from error
    except Exception as error:  # on damaged files PIL's readers raise whatever their parsing meets
        raise UnreadableImage(" ".join(str(error).split()) or repr(error)) from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _check_png(data: bytes) -> None:
    """Raises UnreadableImage when a checksum is wrong: PIL compares none of the pixels', and decodes what it can.

    The chunks that hold no pixels, with a small first letter, are left to PIL.
    """
    at, view = len(PNG), memoryview(data)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data):
            return  # PIL tells what is missing
        if not kind[0] & 32 and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise UnreadableImage(f"a wrong checksum in its {kind.decode('latin-1')} chunk (byte {at})")
        if kind == b"IEND":
            return  # some writers leave other things behind it
        at = end + 4


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels are more than {MAX_PIXELS}: a decompression bomb?")


def _orientation(jpeg: bytes) -> int:
    """Returns EXIF's orientation 1-8; 1 where there is none. PIL needs 60 us for it, so only files with EXIF ask."""
    start = _exif(jpeg)
    if start is None:
        return 1
    exif = Image.Exif()
    try:
        exif.load(start)
        found = exif.get(ORIENTATION, 1)
    except Exception:  # as above; a photo with broken metadata is still a photo
        return 1
    return found if found in range(1, 9) else 1


def _exif(jpeg: bytes) -> bytes | None:
    """Returns the first EXIF segment of a JPEG, beginning with "Exif"; None where there is none."""
    for marker, segment in _segments(jpeg):
        if marker == APP1 and segment.startswith(b"Exif\0\0"):
            return segment
    return None


def _is_progressive(jpeg: bytes) -> bool:
    return any(marker in PROGRESSIVE for marker, _ in _segments(jpeg))


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and contents of the segments of a JPEG before its pixels."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != SCAN:
        if jpeg[at + 1] == 0xFF:  # a segment may be preceded by any number of these
            at += 1
            continue
        length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield jpeg[at + 1], jpeg[at + 4 : at + 2 + length]
        at += 2 + length


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the pixels mirrored and turned as PIL.ImageOps.exif_transpose does."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)  # [W, H, C] -> [H, W, C]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
