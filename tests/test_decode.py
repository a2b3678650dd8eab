import io

import numpy as np
import pytest
from PIL import Image

from quarterlight.ssl.decode import UnreadableImage, decode_image


def photo(height: int = 37, width: int = 53) -> Image.Image:
    """A smooth picture with an edge, of odd size."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)
    pixels[5:20, 7:30, 1] = 250
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def by_pil(data: bytes, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft(mode, image.size)  # for a grey JPEG: its own luma, not that of clipped colors
        pixels = np.array(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


FILES = {
    "jpeg 4:4:4": encoded(photo(), "JPEG", quality=90, subsampling=0),
    "jpeg 4:2:2": encoded(photo(), "JPEG", quality=90, subsampling=1),
    "jpeg 4:2:0": encoded(photo(), "JPEG", quality=75, subsampling=2),
    "progressive jpeg": encoded(photo(), "JPEG", progressive=True),
    "grey jpeg": encoded(photo().convert("L"), "JPEG"),
    "one-pixel jpeg": encoded(photo(1, 1), "JPEG"),
    "png": encoded(photo(), "PNG"),
    "grey png": encoded(photo().convert("L"), "PNG"),
    "palette png": encoded(photo().quantize(16), "PNG"),
    "black-and-white png": encoded(photo().convert("1"), "PNG"),
    "png with alpha": encoded(photo().convert("RGBA"), "PNG"),
    "grey png with alpha": encoded(photo().convert("LA"), "PNG"),
    "webp": encoded(photo(), "WEBP", quality=80),
    "lossless webp": encoded(photo(), "WEBP", lossless=True),
    "gif": encoded(photo(), "GIF"),
    "bmp": encoded(photo(), "BMP"),
    "tiff": encoded(photo(), "TIFF"),
    "ppm": encoded(photo(), "PPM"),
}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_those_of_pil_bit_for_bit(name, in_chans):
    pixels = decode_image(FILES[name], in_chans)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pil(FILES[name], "RGB" if in_chans == 3 else "L"))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_cmyk_jpeg_is_read_as_pil_reads_it(in_chans):
    data = encoded(photo().convert("CMYK"), "JPEG", quality=95)
    expected = by_pil(data, "RGB" if in_chans == 3 else "L").astype(int)
    assert np.abs(decode_image(data, in_chans) - expected).max() <= 2


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_png_of_16_bits_keeps_its_upper_8(in_chans):
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decode_image(encoded(Image.fromarray(levels), "PNG"), in_chans)
    assert np.abs(pixels.astype(int) - (levels >> 8)[:, :, None]).max() <= 1


def test_a_palette_with_transparency_is_read_without_a_warning():
    data = encoded(photo().quantize(16), "PNG", transparency=bytes(range(16)))
    assert decode_image(data).shape == (37, 53, 3)


@pytest.mark.parametrize("name", FILES)
def test_pixels_may_be_written_to(name):
    assert decode_image(FILES[name]).flags.writeable


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image_is_unreadable(data):
    with pytest.raises(UnreadableImage, match="."):
        decode_image(data)


def test_the_reason_holds_no_address_and_is_the_same_every_time():
    for data in (b"<html>404</html>", FILES["png"][:60], FILES["jpeg 4:4:4"][:300]):
        reasons = []
        for _ in range(2):
            with pytest.raises(UnreadableImage) as caught:
                decode_image(data)
            reasons.append(str(caught.value))
        assert reasons[0] == reasons[1]
        assert "0x" not in reasons[0]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_truncated_file_is_unreadable(format, options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), format, **options)
    for share in (0.01, 0.1, 0.5, 0.9, 0.98):
        with pytest.raises(UnreadableImage):
            decode_image(data[: int(len(data) * share)])


def test_a_jpeg_with_zeroed_blocks_is_unreadable_although_pil_reads_it():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = bytearray(encoded(image, "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 512] = bytes(512)
    assert by_pil(bytes(data), "RGB").shape == (64, 64, 3)
    with pytest.raises(UnreadableImage):
        decode_image(bytes(data))


@pytest.mark.parametrize("name", ["jpeg 4:2:0", "progressive jpeg", "png", "palette png", "webp", "gif"])
def test_damage_of_any_kind_raises_nothing_but_unreadable_image(name):
    rng, good = np.random.default_rng(0), FILES[name]
    for i in range(300):
        data = bytearray(good[: rng.integers(len(good))] if i % 3 == 0 else good)
        for _ in range(3 if i % 3 else 0):
            data[rng.integers(len(data) if i % 3 == 1 else 60)] = rng.integers(256)
        try:
            pixels = decode_image(bytes(data))
        except UnreadableImage as error:
            assert "\n" not in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_a_header_that_promises_a_gigantic_image_is_unreadable():
    data = bytearray(FILES["bmp"])
    data[18:26] = (100_000).to_bytes(4, "little") * 2
    with pytest.raises(UnreadableImage):
        decode_image(bytes(data))
