"""Reconstructions as pixels: what is taken from the original, and the filmstrip of a run's pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from quarterlight.ssl.augment import Normalize
from quarterlight.ssl.config import DecoderConfig
from quarterlight.ssl.mae import MaskedAutoencoder, build_autoencoder
from quarterlight.ssl.pictures import GAP, PER_ROW, filmstrip, panels, reconstruction_picture, save_png, step_picture

NORMALIZE = Normalize((0.5, 0.25, 0.75), (0.25, 0.5, 0.125))
SMALL = DecoderConfig(embed_dim=16, depth=1, num_heads=2)


def built(target: str) -> MaskedAutoencoder:
    torch.manual_seed(0)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    return build_autoencoder("vit_tiny_patch16_224", decoder=SMALL, target=target, **args).eval()  # type: ignore[arg-type]


def drawn(autoencoder: MaskedAutoencoder, pixels: torch.Tensor, **options: bool):
    masking = autoencoder.encoder.sample_masking(len(pixels), 0.75, seed=3)
    images = NORMALIZE(pixels)
    with torch.no_grad():
        result = autoencoder(images, masking)
    hidden = masking.is_masked.view(-1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)  # [B, H, W]
    return panels(autoencoder, images, result, mean=NORMALIZE.mean, std=NORMALIZE.std, **options), hidden


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("target", ["pixels", "norm_pix"])
@pytest.mark.parametrize("contrast_only", [False, True])
def test_visible_patches_of_a_pasted_reconstruction_are_the_originals_pixels(pixels, target, contrast_only):
    shown, hidden = drawn(built(target), pixels, contrast_only=contrast_only)
    pasted = (shown.pasted * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(pasted[~hidden], pixels[~hidden])
    assert torch.equal(shown.pasted.movedim(1, 3)[~hidden], shown.original.movedim(1, 3)[~hidden])
    assert torch.equal(shown.pasted.movedim(1, 3)[hidden], shown.prediction.movedim(1, 3)[hidden])
    assert (shown.masked.movedim(1, 3)[hidden] == 0.5).all()
    assert not torch.equal(pasted[hidden], pixels[hidden])


@pytest.mark.parametrize(
    ("target", "contrast_only", "sees_truth"),
    [("norm_pix", False, True), ("norm_pix", True, False), ("pixels", False, False)],
)
def test_only_normalized_patches_take_mean_and_contrast_from_what_is_hidden(pixels, target, contrast_only, sees_truth):
    """Hidden pixels are changed: what is then drawn differently was taken from them."""
    autoencoder = built(target)
    before, hidden = drawn(autoencoder, pixels, contrast_only=contrast_only)
    other = torch.where(hidden[..., None], pixels // 2, pixels)
    after, _ = drawn(autoencoder, other, contrast_only=contrast_only)
    assert torch.equal(before.pasted, after.pasted) != sees_truth
    assert torch.equal(before.prediction, after.prediction) != sees_truth


def test_contrast_alone_is_the_prediction_around_grey(pixels):
    autoencoder = built("norm_pix")
    images, masking = NORMALIZE(pixels), autoencoder.encoder.sample_masking(3, 0.75, seed=3)
    with torch.no_grad():
        result = autoencoder(images, masking)
    shown = panels(autoencoder, images, result, mean=NORMALIZE.mean, std=NORMALIZE.std, contrast_only=True)
    first = shown.prediction[0, :, :4, :4].permute(1, 2, 0).flatten()  # (row, column, channel) of the first patch
    torch.testing.assert_close(first, (0.5 + 0.15 * result.prediction[0, 0]).clamp(0, 1))


def test_a_picture_stands_masked_filled_in_and_original_side_by_side(pixels):
    autoencoder = built("pixels")
    images, masking = NORMALIZE(pixels), autoencoder.encoder.sample_masking(3, 0.75, seed=3)
    with torch.no_grad():
        result = autoencoder(images, masking)
    picture = reconstruction_picture(autoencoder, images, result, mean=NORMALIZE.mean, std=NORMALIZE.std)
    assert picture.shape == (16 + GAP, 3 * (3 * (16 + GAP) + 2 * GAP), 3)
    assert np.array_equal(picture[:16, 2 * (16 + GAP) :][:, :16], pixels[0].numpy())


def triple_page(values: list[int], size: int = 16) -> np.ndarray:
    """A picture as a run leaves it: images whose filled-in panels have these values, the others 10 and 200."""
    high, wide = size + GAP, 3 * (size + GAP) + 2 * GAP
    rows = [values[i : i + PER_ROW] for i in range(0, len(values), PER_ROW)]
    page = np.full((len(rows) * high, len(rows[0]) * wide, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            for part, shade in enumerate((10, value, 200)):
                page[i * high :, j * wide + part * (size + GAP) :][:size, :size] = shade
    return page


def middle_of(film: np.ndarray, columns: int) -> list[list[int]]:
    """The shade in the middle of every cell of the filmstrip, row by row."""
    width = film.shape[1] // columns
    rows = range(22 + width // 2, film.shape[0], width)
    return [[int(film[y, j * width + width // 2, 0]) for j in range(columns)] for y in rows]


def test_a_filmstrip_shows_each_image_over_time(tmp_path):
    for step in (100, 200, 300):
        save_png(step_picture(tmp_path, step), triple_page([step // 5 + i for i in range(4)]))
    film = filmstrip(tmp_path, (16, 16), 300)
    assert film is not None
    assert middle_of(film, 5) == [[10, 20 + i, 40 + i, 60 + i, 200] for i in range(4)]


def test_a_filmstrip_has_at_most_six_steps_with_the_first_and_the_last(tmp_path):
    for step in range(1, 21):
        save_png(step_picture(tmp_path, step), triple_page([step * 5] * 8))
    film = filmstrip(tmp_path, (16, 16), 20)
    assert film is not None
    (row, *_) = rows = middle_of(film, 8)
    assert len(rows) == 8 and row[0] == 10 and row[-1] == 200
    assert row[1:-1] == sorted(row[1:-1]) and (row[1], row[-2]) == (5, 100)


def test_a_filmstrip_leaves_out_later_damaged_and_foreign_pictures(tmp_path):
    for step in (1, 2, 3, 9):
        save_png(step_picture(tmp_path, step), triple_page([step * 20] * 4))
    step_picture(tmp_path, 2).write_bytes(step_picture(tmp_path, 2).read_bytes()[:200])
    Image.new("RGB", (33, 7)).save(step_picture(tmp_path, 4))
    (tmp_path / "step-5.png").write_text("no picture of a run")
    film = filmstrip(tmp_path, (16, 16), 4)  # of a run that has 4 steps; 9 is of an earlier, longer try
    assert film is not None and middle_of(film, 4) == [[10, 20, 60, 200]] * 4


def test_one_picture_makes_no_filmstrip(tmp_path):
    assert filmstrip(tmp_path, (16, 16), 5) is None
    save_png(step_picture(tmp_path, 5), triple_page([1, 2, 3, 4]))
    assert filmstrip(tmp_path, (16, 16), 5) is None
