"""Photos for benchmarks where nothing can be fetched: JPEGs cut from the two that scikit-learn brings."""

import io

import numpy as np
from PIL import Image

SIDES = 500, 375  # pixels, as many of ImageNet's are
QUALITY = 97  # about 100 kB a file


def sample_photos(count: int) -> list[tuple[str, bytes]]:
    """Returns suffix and content of so many JPEGs, each another part of a photo, mirrored or not."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(array) for array in load_sample_images().images]
    random, found = np.random.default_rng(0), []
    for i in range(count):
        photo, share = photos[i % len(photos)], random.uniform(0.6, 1.0)
        width = share * min(photo.width, photo.height * SIDES[0] / SIDES[1])
        height = width * SIDES[1] / SIDES[0]
        left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
        part = photo.resize(SIDES, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        part.save(buffer, format="JPEG", quality=QUALITY)
        found.append(("jpg", buffer.getvalue()))
    return found
