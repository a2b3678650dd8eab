import io
import math
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from quarterlight.ssl.augment import random_crop_box, resize
from quarterlight.ssl.decode import MAX_PIXELS, OVERSAMPLING, SNAP, Box, ImageFile, UnreadableImage, decode_image
from quarterlight.ssl.randoms import uniforms


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


def smooth_photo() -> Image.Image:
    """A smooth picture with a little noise, as cameras make."""
    y, x = np.mgrid[:256, :256]
    pixels = np.stack([128 + 100 * np.sin(x / 17), 128 + 90 * np.cos(y / 23), (x + y) / 2], -1)
    return Image.fromarray((pixels + np.random.default_rng(0).normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("compress_level", [0, 6])
@pytest.mark.parametrize("change", ["zeros", "a bit"])
def test_no_damage_to_the_pixels_of_a_png_is_missed(compress_level, change):
    data, random = encoded(smooth_photo(), "PNG", compress_level=compress_level), np.random.default_rng(1)
    for at in random.integers(64, len(data) - 600, 60).tolist():
        damaged = bytearray(data)
        damaged[at : at + 512] = bytes(512)
        if change == "a bit":
            damaged = bytearray(data)
            damaged[at] ^= 4
        if damaged != data:
            with pytest.raises(UnreadableImage):
                decode_image(bytes(damaged))


def test_a_wrong_checksum_is_named_with_its_place():
    data = bytearray(FILES["png"])
    at = data.index(b"IDAT") - 4
    data[at + 20] ^= 1
    with pytest.raises(UnreadableImage, match=rf"a wrong checksum in its IDAT chunk \(byte {at}\)"):
        decode_image(bytes(data))


def test_what_stands_behind_a_png_or_beside_its_pixels_is_left_alone():
    data = FILES["png"]
    end = data.index(b"IEND") - 4
    wrong_date = b"\0\0\0\7tIME" + bytes(7) + b"oops"  # after the pixels
    for odd in (data + b"more", data + bytes(100), data[:end] + wrong_date + data[end:]):
        assert np.array_equal(decode_image(odd), decode_image(data))


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


# EXIF's orientation.


def turned(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def orientation_of(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """The JPEG with segments put before all others."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif_segment(number: int) -> bytes:
    return segment(0xE1, orientation_of(number).tobytes())


WITH_EXIF = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("format", WITH_EXIF)
def test_photos_stand_upright_in_every_orientation(format, number, in_chans):
    options = {"lossless": True} if format == "WEBP" else {}
    image = photo() if format == "AVIF" or in_chans == 3 else photo().convert("L")
    data = encoded(image, format, exif=orientation_of(number), **options)
    expected = turned(data, "RGB" if in_chans == 3 else "L")
    assert np.array_equal(decode_image(data, in_chans), expected)
    assert expected.shape[:2] == ((37, 53) if number < 5 else (53, 37))
    file = ImageFile(data, in_chans)
    assert (file.height, file.width) == expected.shape[:2]
    assert np.array_equal(file.crop(Box(3, 5, 20, 11), (8, 8)), expected[3:23, 5:16])


def test_an_orientation_is_found_behind_a_large_color_profile():
    data = encoded(photo(), "JPEG", exif=orientation_of(6))
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000))
    for jpeg in (
        with_segments(data, profile),
        with_segments(data, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")),
    ):
        assert np.array_equal(decode_image(jpeg), turned(jpeg)) and len(decode_image(jpeg)) == 53


def test_exif_in_a_comment_is_no_exif():
    plain, comment = encoded(photo(), "JPEG"), segment(0xFE, b"hello Exif\0\0" + orientation_of(6).tobytes()[6:])
    at_its_start = segment(0xFE, orientation_of(6).tobytes())
    for text in (comment, at_its_start):
        assert np.array_equal(decode_image(with_segments(plain, text)), decode_image(plain))
        real = with_segments(plain, text, exif_segment(3))
        assert np.array_equal(decode_image(real), turned(real)) and len(decode_image(real)) == 37
        assert not np.array_equal(decode_image(real), decode_image(plain))


def test_exif_within_the_pixels_or_behind_them_is_no_exif():
    plain = encoded(photo(), "JPEG")
    assert np.array_equal(decode_image(plain + exif_segment(6)), decode_image(plain))


def test_an_orientation_is_found_behind_fill_bytes():
    """Any number of FF may stand before a marker (ISO 10918-1, B.1.1.2); PIL and libjpeg go past them."""
    data = with_segments(encoded(photo(), "JPEG"), b"\xff\xff", exif_segment(6))
    assert len(turned(data)) == 53
    assert np.array_equal(decode_image(data), turned(data))


BROKEN_EXIF = {
    "empty": b"",
    "no header": b"Exif\0\0",
    "garbage": b"Exif\0\0" + bytes(range(200)),
    "cut": orientation_of(6).tobytes()[:14],
    "offset beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\xff",
    "zero": orientation_of(0).tobytes(),
    "nine": orientation_of(9).tobytes(),
    "text": b"Exif\0\0MM\0*" + struct.pack(">IHHHI", 8, 1, 0x0112, 2, 2) + b"6\0\0\0" + bytes(4),
}


@pytest.mark.parametrize("what", BROKEN_EXIF)
def test_broken_exif_leaves_a_photo_as_it_is(what):
    plain = encoded(photo(), "JPEG")
    data = with_segments(plain, segment(0xE1, BROKEN_EXIF[what]))
    assert np.array_equal(decode_image(data), decode_image(plain))


# Colors.


def cmyk_jpeg(transform: int | None) -> bytes:
    """Four colors: CMYK (0) or YCCK (2) by Adobe's marker, or without one (None)."""
    data = encoded(photo().convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"Adobe")
    if transform is None:
        return data[: at - 4] + data[at - 2 + struct.unpack(">H", data[at - 2 : at])[0] :]
    return data[: at + 11] + bytes([transform]) + data[at + 12 :]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("transform", [0, 2, None])
def test_four_colors_are_read_as_pil_reads_them(transform, in_chans):
    data = cmyk_jpeg(transform)
    assert np.array_equal(decode_image(data, in_chans), by_pil(data, "RGB" if in_chans == 3 else "L"))
    whole = ImageFile(data, in_chans)
    assert np.array_equal(whole.crop(Box(2, 3, 30, 40), (4, 4)), decode_image(data, in_chans)[2:32, 3:43])


def test_four_colors_that_are_damaged_are_unreadable():
    data = cmyk_jpeg(0)
    with pytest.raises(UnreadableImage):
        ImageFile(data[: len(data) // 2])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_of_any_kind_keeps_its_upper_8(color, channels):
    levels = np.random.default_rng(0).integers(0, 65536, (8, 9 * channels)).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in levels))
    data = png_header(9, 8, 16, color) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    upper = (levels.astype(int) >> 8).reshape(8, 9, channels)
    expected = upper[:, :, :3] if channels >= 3 else np.repeat(upper[:, :, :1], 3, 2)
    assert np.abs(decode_image(data, 3) - expected).max() <= 1


def test_a_png_of_16_bits_stands_upright_too():
    levels = np.random.default_rng(0).integers(0, 65536, (8, 9)).astype(np.uint16)
    data = encoded(Image.fromarray(levels), "PNG", exif=orientation_of(6))
    assert decode_image(data, 1).shape == (9, 8, 1)


ODD = {
    "grey jpeg": encoded(photo().convert("L"), "JPEG"),
    "progressive grey jpeg": encoded(photo().convert("L"), "JPEG", progressive=True),
    "progressive 4:4:4 jpeg": encoded(photo(), "JPEG", progressive=True, subsampling=0),
    "palette with transparency": encoded(photo().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "palette with one transparent color": encoded(photo().quantize(16), "PNG", transparency=3),
    "color with one transparent color": encoded(photo(), "PNG", transparency=(0, 0, 0)),
    "grey with alpha": encoded(photo().convert("LA"), "PNG"),
    "one bit": encoded(photo().convert("1"), "PNG"),
    "one-bit tiff": encoded(photo().convert("1"), "TIFF", compression="group4"),
    "deflated tiff": encoded(photo(), "TIFF", compression="tiff_adobe_deflate"),
    "webp with alpha": encoded(photo().convert("RGBA"), "WEBP", lossless=True),
    **({"avif": encoded(photo(), "AVIF")} if features.check("avif") else {}),
}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ODD)
def test_rare_kinds_are_read_as_pil_reads_them(name, in_chans):
    with Image.open(io.BytesIO(ODD[name])) as image:
        mode = "RGB" if in_chans == 3 else "L"
        image.draft(mode, image.size)
        image = image.convert("RGBA") if image.mode == "P" else image
        expected = np.array(image.convert(mode)).reshape(37, 53, in_chans)
    assert np.array_equal(decode_image(ODD[name], in_chans), expected)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_picture_of_an_animation_is_taken(format, options):
    frames = [photo(), *(Image.new("RGB", (53, 37), color) for color in ("red", "blue"))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(decode_image(data), expected)
    assert np.abs(decode_image(data).astype(int) - np.array(photo())).mean() < 12, "and not red or blue"


# What is refused at once.


def huge_png() -> bytes:
    """A small file that says it holds 40,000 x 40,000 pixels, the first rows of which are there."""
    rows = zlib.compress(bytes(40_001 * 50), 9)
    return png_header(40_000, 40_000) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    data = bytearray(FILES["jpeg 4:2:0"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


@pytest.mark.parametrize("make", [huge_png, huge_jpeg])
def test_an_image_of_billions_of_pixels_is_refused_before_it_is_decoded(make, monkeypatch):
    data = make()

    def decoded(*args, **options):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    with pytest.raises(UnreadableImage, match=f"{MAX_PIXELS}.*decompression bomb"):
        ImageFile(data)


REFUSED = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "gzip": b"\x1f\x8b\x08" + bytes(50),
    "zip": b"PK\x03\x04" + bytes(50),
    "icon": encoded(photo(), "ICO"),
    "targa": encoded(photo(), "TGA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_documents_and_drawings_are_no_images(name):
    with pytest.raises(UnreadableImage, match="not an image in a known format") as caught:
        decode_image(REFUSED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0, "quality": 98}])
def test_a_jpeg_that_lacks_its_end_marker_only_is_read_whole(options):
    noise = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(decode_image(data[:-2]), decode_image(data))
    for cut in (len(data) // 2, len(data) - 40, len(data) - 12):
        with pytest.raises(UnreadableImage):
            decode_image(data[:cut])


def test_a_progressive_jpeg_without_its_end_marker_is_unreadable():
    """It may lack whole scans: cut between two of them it is a picture all the same, but a coarse one."""
    data = encoded(photo(), "JPEG", progressive=True)
    scans = [i for i in range(len(data)) if data.startswith(b"\xff\xda", i)]
    assert len(scans) > 4
    for cut in (len(data) - 2, *scans[1:]):
        with pytest.raises(UnreadableImage, match="Premature end"):
            decode_image(data[:cut])
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_pgm_of_16_bits_keeps_its_upper_8(in_chans):
    values = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    data = b"P5\n32 32\n65535\n" + values.astype(">u2").tobytes()
    assert np.array_equal(decode_image(data, in_chans), np.repeat((values >> 8)[..., None], in_chans, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_numbers_that_are_no_pixel_values_are_unreadable(dtype, in_chans):
    data = encoded(Image.fromarray(np.linspace(0, 90_000, 64).reshape(8, 8).astype(dtype)), "TIFF")
    with pytest.raises(UnreadableImage, match="no pixel values") as caught:
        decode_image(data, in_chans)
    assert "\n" not in str(caught.value)


def test_bytes_behind_a_jpegs_end_do_no_harm():
    data = FILES["jpeg 4:2:0"]
    assert np.array_equal(decode_image(data + b"\0" * 100), decode_image(data))


# Decoding at a smaller scale.


def large_photo(height: int, width: int, seed: int) -> np.ndarray:
    """Structure at all scales, less of it the finer it is, as in photographs."""
    rng, picture = np.random.default_rng(seed), np.zeros((height, width, 3))
    for level in range(2, 10):
        shape = (max(2, height >> (10 - level)), max(2, width >> (10 - level)), 3)
        coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        picture += (np.array(coarse, np.float32) - 128) * 0.62 ** (level - 2)
    return np.clip(picture * 0.7 + 128, 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(scope="module")
def large() -> list[tuple[bytes, np.ndarray]]:
    """JPEGs of photos of several odd sizes, and their pixels."""
    sizes = [(1500, 2003), (2249, 1501), (2990, 2100)]
    files = [encoded(Image.fromarray(large_photo(*size, i)), "JPEG", quality=90) for i, size in enumerate(sizes)]
    return [(data, decode_image(data)) for data in files]


@pytest.mark.parametrize("size", [224, 96])
def test_a_crop_of_a_photo_decoded_at_a_smaller_scale_is_that_of_the_whole(large, size):
    found, scales = [], set()
    for number, (data, pixels) in enumerate(large):
        file, (height, width) = ImageFile(data), pixels.shape[:2]
        for u in uniforms(number, "augment", np.arange(8), 24):
            asked = random_crop_box(height, width, u[2:], (0.2, 1.0), (3 / 4, 4 / 3))
            box, eighths = file.scaled_box(asked, (size, size))
            ours = resize(file.crop(asked, (size, size)), (size, size)).numpy()
            part = Image.fromarray(pixels[box.top : box.top + box.height, box.left : box.left + box.width])
            found.append(psnr(ours, np.array(part.resize((size, size), Image.Resampling.BICUBIC))))
            scales.add(eighths)
    assert min(found) >= 40 and np.median(found) >= 50
    assert len(scales) >= 2 and min(scales) < 8


def jpeg_of(height: int, width: int, **options) -> ImageFile:
    return ImageFile(encoded(Image.fromarray(np.zeros((height, width, 3), np.uint8)), "JPEG", **options))


@pytest.mark.parametrize(("height", "width"), [(801, 1007), (800, 1000), (807, 993), (1600, 801)])
def test_boxes_at_all_edges_and_corners_stay_inside_and_hold_what_was_asked_for(height, width):
    file, size = jpeg_of(height, width), (50, 40)
    pixels = file.pixels()
    tops = [(0, 400), (1, 399), (height - 400, 400), (height - 401, 400), (0, height), (3, height - 3), (5, 333)]
    lefts = [(0, 400), (7, 400), (width - 400, 400), (width - 399, 398), (0, width), (1, width - 1), (9, 401)]
    for top, h in tops:
        for left, w in lefts:
            box, eighths = file.scaled_box(Box(top, left, h, w), size)
            assert eighths < 8
            assert 0 <= box.top <= top and box.top + box.height <= height
            assert 0 <= box.left <= left and box.left + box.width <= width
            assert all(x % SNAP == 0 for x in box)
            assert top - box.top < SNAP and abs(top + h - box.top - box.height) < SNAP
            assert left - box.left < SNAP and abs(left + w - box.left - box.width) < SNAP
            crop = file.crop(Box(top, left, h, w), size)
            assert crop.shape == (box.height * eighths // 8, box.width * eighths // 8, 3)
            assert crop.shape[0] >= size[0] and crop.shape[1] >= size[1]
    assert pixels.shape == (height, width, 3)


def test_nothing_is_scaled_below_what_is_asked_for():
    file = jpeg_of(1200, 1200)
    least = int(2 * OVERSAMPLING * 224)  # of the box, for half the scale
    for side, eighths in ((224, 8), (least - 1, 8), (least, 4), (1200, 4)):
        assert file.scaled_box(Box(0, 0, side, side), (224, 224))[1] == eighths
    assert file.scaled_box(Box(0, 0, 1200, least - 1), (224, 224))[1] == 8, "both sides count"
    assert file.scaled_box(Box(0, 0, 1200, 1200), (200, 200))[1] == 2
    assert (
        file.scaled_box(Box(0, 0, 1200, 1200), (100, 100))[1] == file.scaled_box(Box(0, 0, 1200, 1200), (9, 9))[1] == 1
    )
    box = Box(3, 5, 500, 301)
    assert file.scaled_box(box, (224, 224)) == (box, 8), "unscaled, the box is exact"


def test_what_is_turned_or_no_jpeg_is_not_scaled():
    for number in range(1, 9):
        file = jpeg_of(1200, 900, exif=orientation_of(number))
        assert file.scaled_box(Box(1, 2, 800, 800), (100, 100))[1] == (2 if number == 1 else 8)
    whole = Image.fromarray(np.zeros((1200, 900, 3), np.uint8))
    for data in (encoded(whole, "PNG"), encoded(whole.convert("CMYK"), "JPEG")):
        assert ImageFile(data).scaled_box(Box(1, 2, 800, 800), (100, 100)) == (Box(1, 2, 800, 800), 8)
    pixels = ImageFile.of_pixels(np.zeros((1200, 900, 3), np.uint8))
    assert pixels.scaled_box(Box(1, 2, 800, 800), (100, 100)) == (Box(1, 2, 800, 800), 8)


def test_crops_do_not_depend_on_those_before_them(large):
    data, _ = large[0]
    boxes = [Box(0, 0, 1500, 2003), Box(100, 200, 300, 300), Box(7, 9, 900, 1000), Box(0, 0, 1500, 2003)]
    together = ImageFile(data)
    for box in boxes:
        assert np.array_equal(together.crop(box, (100, 100)), ImageFile(data).crop(box, (100, 100)))


def test_grey_crops_are_scaled_too(large):
    data, _ = large[0]
    file, box = ImageFile(data, 1), Box(0, 0, 1500, 2003)
    crop = file.crop(box, (150, 150))
    assert crop.shape[2] == 1 and file.scaled_box(box, (150, 150))[1] == 2


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_damaged_photo_is_unreadable_at_every_scale(large, share):
    data = large[0][0]
    at = int(len(data) * share)
    for damaged in (data[:at], data[:at] + bytes(4096) + data[at + 4096 :]):
        for size in (100, 400):
            with pytest.raises(UnreadableImage):
                ImageFile(damaged).crop(Box(0, 0, 1400, 1400), (size, size))
