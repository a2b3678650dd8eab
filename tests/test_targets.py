"""What is predicted of hidden units, against plain torch, scikit-learn and slow loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA
from torch import Tensor

from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.errors import InputError
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.patches import patchify
from quarterlight.ssl.targets import HOGTarget, NormPixTarget, PCATarget, PixelTarget, build_target

NAMES = ("pixels", "norm_pix", "pca", "hog")
IDS = torch.tensor([[3, 0, 5], [1, 1, 2], [4, 3, 0]])  # of 2 x 3 units


def images(count: int, height: int, width: int, *, channels: int = 3, seed: int = 0) -> Tensor:
    """Returns float64 images in which neighbors are alike, so that gradients and components are not all the same."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, height + 2, width + 2, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1)
    return smooth + 0.2 * noise[:, :, 1:-1, 1:-1]


def units_of(picture: Tensor, ids: Tensor, unit: int) -> Tensor:
    """Returns the pixels [S, unit, unit, C] of the units `ids` of one image, cut out one by one."""
    wide = picture.shape[2] // unit
    cut = []
    for i in ids.tolist():
        top, left = i // wide * unit, i % wide * unit
        cut.append(picture[:, top : top + unit, left : left + unit].permute(1, 2, 0))
    return torch.stack(cut)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_those_of_the_asked_units_channel_fastest(channels):
    x = images(3, 8, 12, channels=channels)
    found = PixelTarget(4, channels)(x, IDS)
    assert found.shape == (3, 3, 16 * channels)
    for b in range(3):
        assert torch.equal(found[b], units_of(x[b], IDS[b], 4).flatten(1))


def test_normalized_pixels_have_zero_mean_and_unit_variance_in_each_unit():
    x = 3 * images(3, 8, 12) + 2
    found = NormPixTarget(4, 3)(x, IDS)
    for b in range(3):
        pixels = units_of(x[b], IDS[b], 4).flatten(1)
        wanted = (pixels - pixels.mean(dim=1, keepdim=True)) / (pixels.var(dim=1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(found[b], wanted, atol=1e-12, rtol=0)
    flat = NormPixTarget(4, 3)(torch.full((1, 3, 4, 4), 7.0), torch.zeros(1, 1, dtype=torch.long))
    assert not flat.any()  # a unit of one color is no division by zero


@pytest.mark.parametrize("name", ["pixels", "norm_pix"])
def test_predicting_the_target_gives_the_pixels_back(name):
    x = images(2, 8, 12)
    target = build_target(name, unit_size=4, in_chans=3)
    everything = torch.arange(6).expand(2, 6)
    pixels = target.to_pixels(target(x, everything), x)
    torch.testing.assert_close(pixels, patchify(x, 4), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_values_is_what_comes_out(name):
    target = build_target(name, unit_size=8, in_chans=3, pca_components=5).double()
    x = images(3, 16, 24)
    assert target(x, IDS).shape == (3, 3, target.num_values)
    assert target.num_values == {"pixels": 192, "norm_pix": 192, "pca": 5, "hog": 27}[name]
    assert target.to_pixels(torch.zeros(3, 6, target.num_values).double(), x).shape == (3, 6, 192)


def test_predictions_in_half_precision_become_pixels_of_the_images_precision():
    x = images(1, 8, 12).float()
    for name in NAMES:
        target = build_target(name, unit_size=4, in_chans=3, pca_components=6)
        prediction = torch.zeros(1, 6, target.num_values, dtype=torch.bfloat16)
        assert target.to_pixels(prediction, x).dtype == torch.float32


# --- principal components


def fitted(unit: int, x: Tensor, components: int, *, batch: int | None = None) -> PCATarget:
    target = PCATarget(unit, x.shape[1], num_components=components).double()
    target.fit(iter(x.split(batch or len(x))))
    return target


def test_components_are_those_of_scikit_learn():
    x = images(40, 12, 16) + 1.5
    patches = patchify(x, 4).flatten(0, 1)
    theirs = PCA(n_components=12, svd_solver="full").fit(patches.numpy())
    assert np.diff(theirs.explained_variance_ratio_[:13]).max() < -1e-4  # so no two components may change places
    ours = fitted(4, x, 12)
    np.testing.assert_allclose(ours.mean.numpy(), theirs.mean_, atol=1e-10)
    cosines = (ours.components.numpy() * theirs.components_).sum(axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-9)
    everything = torch.arange(12).expand(40, 12)
    coefficients = ours(x, everything).flatten(0, 1).numpy()
    np.testing.assert_allclose(coefficients * np.sign(cosines), theirs.transform(patches.numpy()), atol=1e-8)
    np.testing.assert_allclose(coefficients.var(axis=0, ddof=1), theirs.explained_variance_, rtol=1e-9)
    pixels = ours.to_pixels(torch.from_numpy(coefficients).view(40, 12, -1), x).flatten(0, 1).numpy()
    np.testing.assert_allclose(pixels, theirs.inverse_transform(theirs.transform(patches.numpy())), atol=1e-9)


def test_all_components_give_the_pixels_back_and_fewer_the_nearest_ones():
    x, everything = images(40, 8, 12), torch.arange(6).expand(40, 6)
    patches, errors = patchify(x, 4), []
    for components in (1, 8, 24, 48):
        target = fitted(4, x, components)
        pixels = target.to_pixels(target(x, everything), x)
        errors.append(float((pixels - patches).square().mean()))
        again = (pixels.flatten(0, 1) - target.mean) @ target.components.t()
        torch.testing.assert_close(again, target(x, everything).flatten(0, 1), atol=1e-10, rtol=0)
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 * float(patches.var()) and errors[-1] < 1e-18


def test_coefficients_are_of_the_asked_units_and_largest_first():
    x = images(3, 8, 12)
    target = fitted(4, images(50, 8, 12, seed=1), 10)
    found = target(x, IDS)
    for b in range(3):
        wanted = (units_of(x[b], IDS[b], 4).flatten(1) - target.mean) @ target.components.t()
        torch.testing.assert_close(found[b], wanted, atol=1e-12, rtol=0)
    spread = target(images(50, 8, 12, seed=1), torch.arange(6).expand(50, 6)).flatten(0, 1).var(dim=0)
    assert spread.tolist() == sorted(spread.tolist(), reverse=True)


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_fitting_over_several_batches_is_fitting_over_one(batch):
    x = images(30, 8, 12)
    whole, parts = fitted(4, x, 10), fitted(4, x, 10, batch=batch)
    torch.testing.assert_close(parts.mean, whole.mean, atol=1e-12, rtol=0)
    signs = (parts.components * whole.components).sum(dim=1).sign()
    torch.testing.assert_close(parts.components * signs[:, None], whole.components, atol=1e-9, rtol=0)


def test_a_target_in_single_precision_is_fitted_in_double():
    x = images(30, 8, 12) + 100  # a mean far from zero: in single precision the products would hold little else
    single = PCATarget(4, 3, num_components=6)
    single.fit([x.float()])
    double = fitted(4, x, 6)
    assert single.mean.dtype == single.components.dtype == torch.float32
    cosines = (single.components.double() * double.components).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-5, rtol=0)


def test_saved_components_come_back_bit_for_bit(tmp_path: Path):
    target = fitted(4, images(20, 8, 12), 7).float()
    target.save(tmp_path / "pca.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"pca.safetensors"}
    other = PCATarget(4, 3, num_components=7)
    assert other.components.isnan().all()  # until fitted or loaded
    other.load(tmp_path / "pca.safetensors")
    assert torch.equal(other.mean, target.mean) and torch.equal(other.components, target.components)


@pytest.mark.parametrize(
    ("unit", "channels", "components"), [(8, 3, 7), (4, 1, 7), (4, 3, 6), (4, 3, 8)], ids=lambda x: str(x)
)
def test_saved_components_of_another_shape_are_refused(tmp_path: Path, unit, channels, components):
    path = tmp_path / "pca.safetensors"
    fitted(4, images(20, 8, 12), 7).save(path)
    with pytest.raises(InputError, match="pca.safetensors does not hold the components of this run .*remove it"):
        PCATarget(unit, channels, num_components=components).load(path)


def test_a_single_saved_component_does_not_serve_for_several(tmp_path: Path):
    path = tmp_path / "pca.safetensors"
    fitted(4, images(20, 8, 12), 1).save(path)  # [1, 48], which a plain copy would repeat seven times
    with pytest.raises(InputError, match="remove it"):
        PCATarget(4, 3, num_components=7).load(path)


def test_files_that_hold_no_components_are_refused(tmp_path: Path):
    path = tmp_path / "pca.safetensors"
    target = PCATarget(4, 3, num_components=7)
    save_file({"mean": torch.zeros(48)}, path)
    with pytest.raises(InputError, match="remove it"):
        target.load(path)
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 nothing")
    with pytest.raises(InputError, match="remove it"):
        target.load(path)
    target.save(path)
    assert load_file(path).keys() == {"mean", "components"}


def test_more_components_than_values_are_refused():
    with pytest.raises(InputError, match="pca_components is 49, and a unit has 48 values: give at most those"):
        build_target("pca", unit_size=4, in_chans=3, pca_components=49)
    assert build_target("pca", unit_size=4, in_chans=3, pca_components=48).num_values == 48
    with pytest.raises(InputError, match="a unit has 16 values"):
        build_target("pca", unit_size=4, in_chans=1)


# --- histograms of oriented gradients


def slow_hog(picture: np.ndarray, ids: list[int], unit: int, cell: int) -> np.ndarray:
    """Returns [S, cells * cells * C * 9]: gradients, votes and norms pixel by pixel.

    An orientation is the angle between the gradient and the vertical axis (so 0 is an edge that runs left to right),
    turning towards the right, and opposite directions are one.
    """
    channels, height, width = picture.shape

    def reflected(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    wide, cells, rows = width // unit, unit // cell, []
    for number in ids:
        histograms = np.zeros((cells, cells, channels, 9))
        for y in range(unit):
            for x in range(unit):
                row, column = number // wide * unit + y, number % wide * unit + x
                for c in range(channels):
                    left, right = (picture[c, row, reflected(column + d, width)] for d in (-1, 1))
                    above, below = (picture[c, reflected(row + d, height), column] for d in (-1, 1))
                    dx, dy = right - left, below - above
                    angle = math.atan2(dx, dy) % math.pi
                    bin_ = min(int(angle / math.pi * 9), 8)
                    histograms[y // cell, x // cell, c, bin_] += math.sqrt(dx * dx + dy * dy)
        norm = np.sqrt((histograms**2).sum(axis=3, keepdims=True))
        rows.append((histograms / np.maximum(norm, 1e-300)).ravel())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("unit", "cell", "channels"),
    [(8, 8, 3), (16, 8, 1), (4, 4, 3), (2, 2, 3), (6, 6, 1)],
    ids=lambda x: str(x),
)
def test_histograms_are_those_of_slow_loops(unit, cell, channels):
    x = images(2, 2 * unit, 3 * unit, channels=channels)
    ids = torch.tensor([[0, 5, 4], [2, 3, 0]])
    target = HOGTarget(unit, channels)
    assert target.num_values == (unit // cell) ** 2 * channels * 9
    found = target(x, ids)
    for b in range(2):
        wanted = torch.from_numpy(slow_hog(x[b].numpy(), ids[b].tolist(), unit, cell))
        torch.testing.assert_close(found[b], wanted, atol=1e-10, rtol=0)


def test_edges_fall_into_the_bins_of_their_orientation_whichever_side_is_bright():
    ramp = torch.linspace(-1, 1, 24, dtype=torch.float64)
    across, down = ramp.expand(24, 24), ramp[:, None].expand(24, 24)
    middle = torch.tensor([[4]])  # of 3 x 3 units of 8, so far from the reflected border
    target = HOGTarget(8, 1)
    for picture, bin_ in ((across, 4), (down, 0), (across + down, 2), (across - down, 6)):
        for sign in (1, -1):
            histogram = target((sign * picture)[None, None], middle)[0, 0]
            assert histogram.argmax() == bin_ and float(histogram[bin_]) == pytest.approx(1.0)


def test_histograms_do_not_depend_on_brightness_or_contrast_and_a_flat_image_has_none():
    x, ids = images(2, 16, 24), torch.tensor([[0, 4], [5, 3]])
    target = HOGTarget(8, 3)
    torch.testing.assert_close(target(5 * x - 3, ids), target(x, ids), atol=1e-9, rtol=0)
    assert not target(torch.full((2, 3, 16, 24), 0.3).double(), ids).any()
    norms = target(x, ids).unflatten(2, (-1, 9)).norm(dim=3)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("unit", [12, 20, 28])
def test_units_that_cells_do_not_tile_are_refused(unit):
    with pytest.raises(InputError, match=f"up to 8 pixels or of a multiple of them, not {unit}: take another"):
        HOGTarget(unit, 3)


def test_a_picture_of_histograms_is_gray():
    x = images(1, 16, 24)
    assert not HOGTarget(8, 3).to_pixels(torch.randn(1, 6, 27), x).any()


# --- in the autoencoder


def autoencoder(name: str, **more) -> MaskedAutoencoder:
    return build_autoencoder(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=8, embed_dim=24, depth=1, num_heads=2,
        decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2), target=name, pca_components=9, **more,
    )  # fmt: skip


@pytest.mark.parametrize("error", ["mse", "l1"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_error_against_the_target_of_the_masked_units(name, error):
    model = autoencoder(name, loss=error).double()
    x = images(4, 16, 24)
    if name == "pca":
        model.target.fit([x])
    masking = model.encoder.sample_masking(4, 0.5)
    result = model(x, masking)
    everything = model.target(x, torch.arange(6).expand(4, 6))
    difference = (result.prediction - everything)[masking.is_masked]
    wanted = difference.square().mean() if error == "mse" else difference.abs().mean()
    torch.testing.assert_close(result.loss, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x, masking, only_scored=True).loss, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_target_is_trained(name):
    model = autoencoder(name)
    x = images(4, 16, 24).float()
    if name == "pca":
        model.target.fit([x])
    assert not list(model.target.parameters())
    assert not model.target(x, torch.zeros(4, 1, dtype=torch.long)).requires_grad
    before = {key: value.clone() for key, value in model.target.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    result = model(x, model.encoder.sample_masking(4, 0.5), only_scored=True)
    result.loss.backward()
    optimizer.step()
    after = model.target.state_dict()
    assert before.keys() == after.keys() == ({"mean", "components"} if name == "pca" else set())
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(buffer.requires_grad for buffer in model.target.buffers())


@pytest.mark.parametrize("name", ["pixels", "norm_pix", "pca", "hog"])
def test_in_autocast_the_loss_is_of_full_precision_targets(name):
    model = build_autoencoder("vit_tiny_patch16_224", img_size=32, depth=1, target=name)
    images, masking = torch.randn(2, 3, 32, 32), model.encoder.sample_masking(2, 0.5)
    if name == "pca":
        model.target.fit([images])
    prediction = torch.randn(2, 2, model.target.num_values)
    plain = model.loss(images, prediction, masking.ids_masked)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, prediction, masking.ids_masked)
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
