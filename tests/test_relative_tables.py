"""Tables of relative positions in other windows, against the reference's formula with scipy's splines, in float64."""

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch.nn import functional as F

from quarterlight.ssl.config import DataConfig, EncoderConfig
from quarterlight.ssl.encoders import create_timm_model
from quarterlight.ssl.export import ModelSpec
from quarterlight.ssl.relative_tables import geometric_places, resize_table
from quarterlight.ssl.released import Weights, encoder_spec

PUBLISHED_Q = {(6, 7): 1.091281, (12, 14): 1.032893}  # what SimMIM's two changes of windows find


def bisected(old: int, new: int) -> tuple[list[float], float]:
    """BEiT's search for a geometric progression, restated (run_class_finetuning.py); with the q that it found."""
    left, right, count = 1.01, 1.5, old - 1
    while right - left > 1e-6:
        q = (left + right) / 2
        left, right = (left, q) if (1 - q**count) / (1 - q) > new - 1 else (q, right)
    far, place = [], 1.0
    for i in range(count):
        far.append(place)
        place += q ** (i + 1)
    return [-x for x in reversed(far)] + [0.0] + far, q


def by_scipy(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """SimMIM's remap_pretrained_keys_swin; RectBivariateSpline stands for interp2d(kind="cubic"), which is gone."""
    (rows, _), (columns, _) = bisected(old[0], new[0]), bisected(old[1], new[1])
    down, across = np.arange(-(new[0] - 1.0), new[0]), np.arange(-(new[1] - 1.0), new[1])
    rows, down = (rows, down) if old[0] != new[0] else (down, down)
    columns, across = (columns, across) if old[1] != new[1] else (across, across)
    heads = table.T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)
    return np.stack([RectBivariateSpline(rows, columns, x, s=0)(down, across).ravel() for x in heads], axis=1)


@pytest.mark.parametrize(
    ("old", "new"),
    [((6, 6), (7, 7)), ((12, 12), (14, 14)), ((7, 7), (12, 12)), ((8, 8), (16, 16)), ((14, 14), (7, 7)),
     ((7, 7), (6, 6)), ((6, 12), (7, 14)), ((7, 6), (7, 8))],
)  # fmt: skip
def test_the_geometric_rule_is_simmims(old: tuple[int, int], new: tuple[int, int]):
    table = np.random.default_rng(0).normal(size=((2 * old[0] - 1) * (2 * old[1] - 1), 3))
    found = resize_table(torch.from_numpy(table), old, new, "geometric")
    np.testing.assert_allclose(found.numpy(), by_scipy(table, old, new), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("windows", "q"), PUBLISHED_Q.items())
def test_the_places_are_those_that_simmims_changes_of_windows_find(windows: tuple[int, int], q: float):
    places = geometric_places(*windows)
    assert places[windows[0] + 1] - places[windows[0]] == pytest.approx(q, abs=2e-6)
    assert places[-1] == pytest.approx(windows[1] - 1, abs=1e-4)


def test_windows_many_times_as_large_are_filled_to_their_ends():  # Differs from BEiT
    assert geometric_places(4, 16)[-1] == pytest.approx(15, abs=1e-4)
    assert bisected(4, 16)[0][-1] == pytest.approx(4.75, abs=1e-4)


def test_bicubic_is_that_of_swins_own_code():
    table = torch.randn(13 * 13, 4)
    wanted = F.interpolate(table.T.reshape(1, 4, 13, 13), size=(23, 23), mode="bicubic").reshape(4, -1).T
    torch.testing.assert_close(resize_table(table, (7, 7), (12, 12), "bicubic"), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["geometric", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [((1, 1), (2, 2)), ((2, 2), (8, 8)), ((3, 3), (2, 2)), ((2, 3), (4, 4))])
def test_the_smallest_windows_work(rule: str, old: tuple[int, int], new: tuple[int, int]):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 2, dtype=torch.float32)
    found = resize_table(table, old, new, rule)
    assert found.shape == ((2 * new[0] - 1) * (2 * new[1] - 1), 2) and found.dtype == torch.float32
    assert found.isfinite().all() and found.is_contiguous()
    middle = table[len(table) // 2]  # a token to itself
    torch.testing.assert_close(found[len(found) // 2], middle)


def v2_spec(img_size: int, window: int, **more) -> ModelSpec:
    args = {"img_size": [img_size, img_size], "window_size": window, "embed_dim": 24, "depths": [2, 2]}
    return ModelSpec(
        "swinv2_tiny_window8_256", args | {"num_heads": [1, 2], "in_chans": 3} | more, (0.5,) * 3, (0.5,) * 3
    )


def encoder_for(spec: ModelSpec, img_size: int, **args) -> tuple[ModelSpec, SwinTransformerV2]:
    config = EncoderConfig(args=args)
    found = encoder_spec(config, DataConfig(train="t", img_size=img_size), Weights("x", {}, spec))
    model = create_timm_model(found.name, **found.timm_args())
    assert isinstance(model, SwinTransformerV2)
    return found, model


def test_a_swinv2_in_other_windows_measures_offsets_by_those_it_was_trained_in():
    old = v2_spec(64, 8)
    spec, model = encoder_for(old, 128, window_size=16)
    assert spec.args["pretrained_window_sizes"] == [[8, 8], [8, 8]]
    trained = create_timm_model(old.name, **old.timm_args())
    for now, before in zip(model.layers, trained.layers, strict=True):
        wide, narrow = now.blocks[0].attn.relative_coords_table[0], before.blocks[0].attn.relative_coords_table[0]
        torch.testing.assert_close(wide[8:-8, 8:-8], narrow)  # the offsets that both have: [31, 31] and [15, 15]
    # ... and so do the weights of that one again, in a third size.
    assert encoder_for(spec, 64, window_size=8)[0].args["pretrained_window_sizes"] == [[8, 8], [8, 8]]


def test_a_swinv2_in_its_own_windows_or_told_otherwise_is_left_alone():
    assert "pretrained_window_sizes" not in encoder_for(v2_spec(64, 8), 128)[0].args
    told = encoder_for(v2_spec(64, 8), 128, window_size=16, pretrained_window_sizes=[4, 4])[0]
    assert told.args["pretrained_window_sizes"] == [4, 4]
