"""An image as it will lie in a shard: checked, and made smaller where asked."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from .decode import UnreadableImage, decode_image
from .shard_config import ShardsConfig
from .sources import InShard, SourceImage

MAGIC = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


class Encoded(NamedTuple):
    """An image as it will lie in the shard, or the reason why it will not."""

    image: SourceImage
    extension: str
    data: bytes
    reason: str | None


@dataclass
class ImageEncoder(Dataset):
    """Reads, checks and resizes images in worker processes, in order."""

    images: list[SourceImage]
    config: ShardsConfig

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Encoded:
        image = self.images[i]
        try:
            if isinstance(image.content, Path):
                return Encoded(image, *self._encode_file(image.content.read_bytes()), None)
            if isinstance(image.content, InShard):
                return Encoded(image, *self._encode_file(image.content.read()), None)
            return Encoded(image, "png", _png(Image.fromarray(image.content)), None)
        except (UnreadableImage, OSError) as error:
            return Encoded(image, "", b"", str(error))

    def _encode_file(self, data: bytes) -> tuple[str, bytes]:
        pixels = decode_image(data)  # the check: all of it must decode
        extension = next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)
        height, width, _ = pixels.shape
        if self.config.resize is not None and min(height, width) > self.config.resize:
            scale = self.config.resize / min(height, width)
            size = max(1, round(width * scale)), max(1, round(height * scale))
            buffer = io.BytesIO()
            resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            resized.save(buffer, format="JPEG", quality=self.config.quality)
            return "jpg", buffer.getvalue()
        return (extension, data) if extension else ("png", _png(Image.fromarray(pixels)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
