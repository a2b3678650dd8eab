"""The code of docs/downstream.md: our encoders in torchvision's Mask R-CNN and in a segmenter, one step each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.ssl.encoders import build_encoder
from quarterlight.ssl.export import ModelSpec, export_hub

PAGE = Path(__file__).parents[1] / "docs" / "downstream.md"
VIT = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"window_size": 2, "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
MODELS = {
    "SwinPyramid": ModelSpec("swin_tiny_patch4_window7_224", SWIN | {"img_size": [64, 64]}, (0.5,) * 3, (0.25,) * 3),
    "SimplePyramid": ModelSpec("vit_tiny_patch16_224", VIT | {"img_size": [64, 64]}, (0.5,) * 3, (0.25,) * 3),
}
LAST = {"SwinPyramid": 32, "SimplePyramid": 16}  # stride of the encoder's last map


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Returns what the page's snippets define."""
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(snippet, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, nn.Module]]:
    """Returns hub folders as runs leave them, and the encoders in them."""
    found = {}
    for name, spec in MODELS.items():
        torch.manual_seed(0)
        encoder = build_encoder(spec.name, **spec.timm_args()).timm.eval()
        folder = tmp_path_factory.mktemp("hub") / name
        export_hub(folder, encoder, spec, title="t", facts={})
        found[name] = f"local-dir:{folder}", encoder
    return found


def images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def body(pyramid: nn.Module) -> nn.Module:
    return pyramid.body if hasattr(pyramid, "body") else pyramid.vit  # type: ignore[return-value]


def untrained(encoder: nn.Module) -> list[str]:
    """Returns the names of parameters that got no gradient."""
    return [name for name, x in encoder.named_parameters() if x.grad is None or not x.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", MODELS)
def test_the_pyramid_holds_the_encoder_unchanged(page, released, name):
    weights, encoder = released[name]
    pyramid = page[name](weights, out_channels=8).eval()
    ours, theirs = encoder.state_dict(), body(pyramid).state_dict()
    theirs = {re.sub(r"^layers_(\d)", r"layers.\1", key): x for key, x in theirs.items()}  # features_only renames so
    missing = ours.keys() - theirs.keys()
    assert all(key.startswith("norm.") for key in missing), missing  # a Swin's last norm, which its own replace
    assert all(torch.equal(theirs[key], x) for key, x in ours.items() if key not in missing)
    x = images(2, 64, 64)
    with torch.no_grad():
        last = encoder.norm(pyramid.body(x)[-1]) if name == "SwinPyramid" else pyramid.vit.forward_features(x)
        torch.testing.assert_close(last, encoder.forward_features(x))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 160)])
@pytest.mark.parametrize("name", MODELS)
def test_maps_have_strides_4_8_16_32_and_64_at_any_size(page, released, name, size):
    maps = page[name](released[name][0], out_channels=8).eval()(images(1, *size))
    sides = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32, 64)]
    assert {key: tuple(x.shape) for key, x in maps.items()} == {
        key: (1, 8, *side) for key, side in zip(("0", "1", "2", "3", "pool"), sides, strict=True)
    }


def test_a_part_of_a_larger_image_is_seen_where_it_is(page, released):
    """Windows and strides are those of timm at every size: of a Swin, moved by a whole window, the first map moves."""
    pyramid = page["SwinPyramid"](released["SwinPyramid"][0], out_channels=8).eval()
    x = images(1, 128, 128)
    with torch.no_grad():
        large, part = pyramid.body(x)[0], pyramid.body(x[:, :, 64:, 64:])[0]
    torch.testing.assert_close(large[:, 16:, 16:], part, rtol=1e-4, atol=1e-5)  # one block, which does not shift


@pytest.mark.parametrize("name", MODELS)
def test_mask_rcnn_takes_a_training_step_and_detects(page, released, name):
    torch.manual_seed(0)
    weights = released[name][0]
    model = page["mask_rcnn"](page[name](weights, out_channels=16), weights, num_classes=3, min_size=64, max_size=128)
    assert (list(model.transform.image_mean), list(model.transform.image_std)) == ([0.5] * 3, [0.25] * 3)
    pictures = [images(1, 64, 64)[0], images(1, 80, 100)[0]]  # of two sizes: they are resized and padded
    targets = []
    for picture in pictures:
        mask = torch.zeros(1, *picture.shape[1:], dtype=torch.uint8)
        mask[:, 8:40, 16:56] = 1
        targets.append({"boxes": torch.tensor([[16.0, 8.0, 56.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask})
    losses = model.train()(pictures, targets)
    assert {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"} == losses.keys()
    loss = sum(losses.values())
    assert torch.isfinite(loss)
    loss.backward()
    assert untrained(body(model.backbone)) == []
    torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1e-4).step()
    with torch.no_grad():
        found = model.eval()(pictures)
    assert [x["masks"].shape[2:] for x in found] == [picture.shape[1:] for picture in pictures]


@pytest.mark.parametrize("name", MODELS)
def test_a_segmenter_takes_a_training_step_at_another_size(page, released, name):
    torch.manual_seed(0)
    model = page["Segmenter"](page[name](released[name][0], out_channels=16), num_classes=5).train()
    logits = model(images(2, 96, 64))
    assert logits.shape == (2, 5, 96, 64)
    labels = torch.randint(0, 5, (2, 96, 64))
    before = F.cross_entropy(logits, labels)
    before.backward()
    assert untrained(body(model.pyramid)) == []
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert F.cross_entropy(model(images(2, 96, 64)), labels) < before
