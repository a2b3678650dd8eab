"""Which sizes and windows are refused: exactly those for which timm would pad."""

import itertools

import pytest
import timm

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.tiling import check_windows

SIZES = [(32, 32), (64, 128), (96, 96), (128, 64), (144, 144), (160, 96), (192, 192), (224, 112), (256, 96)]
WINDOWS = [2, 4, 6, 7, (4, 8), (3, 6)]


def tiny(name: str = "swin_tiny_patch4_window7_224", **args):
    return timm.create_model(name, num_classes=0, embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), **args)


def pads(swin) -> bool:
    """Returns whether timm adds tokens to fill a window or a merge, for it rounds up."""
    sizes = [(stage.blocks[0].input_resolution, stage.blocks[0].window_size) for stage in swin.layers]
    unfilled = any(tokens[axis] % window[axis] for tokens, window in sizes for axis in (0, 1))
    return unfilled or any(side % 32 for side in swin.patch_embed.img_size)


@pytest.mark.parametrize("always_partition", [False, True])
def test_what_timm_would_pad_is_refused_and_nothing_else(always_partition):
    refused = set()
    for size, window in itertools.product(SIZES, WINDOWS):
        swin = tiny(img_size=size, window_size=window, always_partition=always_partition)
        if pads(swin):
            with pytest.raises(InputError, match="image (height|width) "):
                check_windows(swin)
        else:
            check_windows(swin)
        refused.add(pads(swin))
    assert refused == {True, False}


def test_windows_of_every_stage_count():
    stages = (7, 7, 14, 7)
    check_windows(tiny(img_size=224, window_size=stages))
    check_windows(tiny(img_size=448, window_size=stages))
    with pytest.raises(InputError, match="672 makes 42 tokens in stage 3, which windows of 12 do not tile: use"):
        check_windows(tiny(img_size=672, window_size=(7, 7, 12, 7)))


@pytest.mark.parametrize("size", [2, 20])
def test_an_image_smaller_than_a_unit_is_refused(size):
    with pytest.raises(InputError, match=f"image height {size} is not a multiple of the 32 pixels"):
        check_windows(tiny(img_size=size))
