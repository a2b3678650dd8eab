"""Classifiers with random weights, in files as fine-tuning writes them, and small images to show them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from quarterlight.ssl.export import ModelSpec, export_weights

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "in_chans": 3}
SWIN = {
    "img_size": 64,
    "patch_size": 4,
    "window_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 1, 2],
    "num_heads": [1, 1, 2, 2],
}
SWIN |= {"in_chans": 3}


def classifier(
    folder: Path, name: str = "vit_tiny_patch16_224", args: dict[str, Any] = VIT, *, classes: int = 4, **facts: Any
) -> tuple[Path, Any]:
    """Returns a file with a classifier, and the timm model in it. `classes` 0: an encoder."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=classes, **args)
    with torch.no_grad():
        for parameter in model.parameters():  # initial ones give features and logits that are nearly the same
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.3))
    file = folder / ("classifier.safetensors" if classes else "encoder.safetensors")
    export_weights(file, model, ModelSpec(name, args | {"num_classes": classes}, MEAN, STD), facts)
    return file, model.eval()


def images(folder: Path, count: int = 7, *, side: int = 16) -> list[Path]:
    """Writes PNGs of `side` pixels, some in a folder below, and returns their paths in the order of the walk."""
    random = np.random.default_rng(0)
    paths = [folder / (f"sub/{i}.png" if i % 3 == 2 else f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = random.integers(0, 120, (side, side, 3), np.uint8)
        values[:, :, i % 3] += np.uint8(10 * (i % 13))
        Image.fromarray(values).save(path)
    return sorted(paths, key=lambda path: (len(path.parts), path.name))


def pixels(path: Path) -> Image.Image:
    """Returns an image, with its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")


def prepared(paths: list[Path]) -> torch.Tensor:
    """Returns the images as PIL decodes them, normalized as torchvision does."""
    transform = Compose([ToTensor(), Normalize(MEAN, STD)])
    return torch.stack([transform(pixels(path)) for path in paths])


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
