import numpy as np
import pytest
import torch

from quarterlight.ssl.errors import InputError
from quarterlight.ssl.masking import MaskSampler, gather_units, num_keep, random_masking


def test_kept_and_masked_units_partition_the_grid():
    masking = random_masking(8, 49, 0.75, generator=torch.Generator().manual_seed(0))
    assert masking.ids_keep.shape == (8, 12)
    assert masking.is_masked.sum(dim=1).tolist() == [37] * 8
    for ids, is_masked in zip(masking.ids_keep, masking.is_masked, strict=True):
        assert not is_masked[ids].any() and len(set(ids.tolist())) == 12


def test_ids_restore_undoes_the_shuffle():
    noise = torch.rand(4, 16)
    masking = random_masking(4, 16, 0.5, noise=noise)
    shuffled = gather_units(torch.arange(16.0).expand(4, 16)[:, :, None], noise.argsort(dim=1))
    restored = gather_units(shuffled, masking.ids_restore)
    assert torch.equal(restored[:, :, 0], torch.arange(16.0).expand(4, 16))


def test_the_smallest_noise_is_kept_smallest_first():
    masking = random_masking(1, 4, 0.5, noise=torch.tensor([[0.3, 0.9, 0.1, 0.5]]))
    assert masking.ids_keep.tolist() == [[2, 0]]
    assert masking.ids_restore.tolist() == [[1, 3, 0, 2]]
    assert masking.is_masked.tolist() == [[False, True, False, True]]


def test_every_unit_is_hidden_equally_often():
    masking = MaskSampler((4, 4), 0.75).sample(0, np.arange(20000))
    share = masking.is_masked.double().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.015  # five standard deviations of a share of 20000


def test_a_mask_depends_on_seed_and_position_only():
    sampler = MaskSampler((8, 8), 0.75)
    whole, part = sampler.sample(5, np.arange(100)), sampler.sample(5, np.arange(40, 60))
    assert torch.equal(whole.ids_keep[40:60], part.ids_keep)
    assert not torch.equal(whole.ids_keep, sampler.sample(6, np.arange(100)).ids_keep)


def test_nothing_hidden_keeps_every_unit():
    masking = random_masking(2, 9, 0.0)
    assert not masking.is_masked.any() and masking.ids_keep.shape == (2, 9)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_outside_the_range_are_refused(ratio):
    with pytest.raises(InputError, match="mask.ratio"):
        num_keep(16, ratio)


def test_a_ratio_that_hides_everything_is_refused_with_one_that_does_not():
    with pytest.raises(InputError, match="use at most 0.750"):
        num_keep(4, 0.9)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(InputError, match="noise has shape"):
        random_masking(2, 9, 0.5, noise=torch.rand(2, 8))


@pytest.mark.parametrize("units", [4, 10, 16, 49, 64, 196])
def test_the_ratio_that_a_refusal_names_works(units):
    with pytest.raises(InputError) as refusal:
        num_keep(units, 0.999)
    assert num_keep(units, float(str(refusal.value).rpartition(" ")[2])) == 1
