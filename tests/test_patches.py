import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.patches import check_grid, patchify, pixel_target, unpatchify


@pytest.mark.parametrize(("size", "patch_size", "in_chans"), [((8, 8), 4, 3), ((6, 10), 2, 1), ((14, 28), 14, 5)])
def test_unpatchify_undoes_patchify(size, patch_size, in_chans):
    images = torch.randn(2, in_chans, *size)
    patches = patchify(images, patch_size)
    grid = (size[0] // patch_size, size[1] // patch_size)
    assert torch.equal(unpatchify(patches, patch_size, grid, in_chans), images)


def test_patches_are_in_the_order_of_hugging_face():
    config = ViTMAEConfig(image_size=12, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, images = ViTMAEForPreTraining(config), torch.randn(2, 3, 12, 12)
    assert torch.equal(patchify(images, 4), model.patchify(images))


def test_a_patch_is_rows_of_columns_of_channels():
    image = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    wanted = [image[0, c, y, x].item() for y in (2, 3) for x in (0, 1) for c in (0, 1)]
    assert patchify(image, 2)[0, 2].tolist() == wanted


def test_norm_pix_uses_the_unbiased_variance():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    patch = patchify(images, 4)[1, 2].numpy()
    wanted = (patch - patch.mean()) / (patch.var(ddof=1) + 1e-6) ** 0.5
    assert pixel_target(images, 4, norm_pix=True)[1, 2].numpy() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("size", "said"), [((33, 32), "use 32 or 48"), ((32, 8), "width 8 .* use 16")])
def test_sizes_that_do_not_divide_are_refused(size, said):
    with pytest.raises(InputError, match=said):
        check_grid(size, 16)
