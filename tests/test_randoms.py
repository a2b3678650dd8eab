import zlib

import numpy as np
import pytest
from scipy import stats

from quarterlight.ssl.randoms import hashes, step_seed, uniforms

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    for _ in range(2):
        z = (z + GOLDEN) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
    return z


def plain_hash(seed: int, purpose: str, position: int, draw: int) -> int:
    """The same hash in Python's integers."""
    key = mix((seed & MASK) ^ (zlib.crc32(purpose.encode()) * 0x100000001))
    return mix((mix((key + position) & MASK) + draw * GOLDEN) & MASK)


def test_one_round_of_the_mixer_is_splitmix64():
    state, first = 1234567, 6457827717110365317  # the first output that Vigna's splitmix64.c gives for this seed
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    assert z ^ (z >> 31) == first


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**64 - 1])
@pytest.mark.parametrize("purpose", ["mask", "order of epoch 17", ""])
def test_hashes_equal_plain_integer_arithmetic(seed, purpose):
    positions = np.array([0, 1, 255, 10**6, 2**40])
    expected = [[plain_hash(seed, purpose, int(p), d) for d in range(3)] for p in positions]
    assert hashes(seed, purpose, positions, 3).tolist() == expected


def test_the_stream_of_hashes_is_the_one_that_earlier_runs_have_seen():
    assert hashes(0, "mask", np.array([0, 1]), 2).tolist() == [
        [200225263501117395, 9360829933791651043],
        [12169969363072016648, 9559146062524151626],
    ]
    assert hashes(42, "augment", np.array([123456789]), 3).tolist() == [
        [4116302561444573698, 7388134768487161121, 2796232480919823900]
    ]


def test_the_stream_of_uniforms_is_the_one_that_earlier_runs_have_seen():
    assert uniforms(0, "mask", np.array([5]), 4).tolist() == [
        [0.22926181100402698, 0.8679625204350276, 0.3502212058259172, 0.643212599127218]
    ]


def test_step_seeds_are_those_that_earlier_runs_have_used():
    assert [step_seed(7, "step", step, rank) for step in (0, 1, 1000) for rank in (0, 1)] == [
        279103889,
        3995821363,
        2883924217,
        2745807331,
        2252158391,
        3427016549,
    ]


def test_numbers_of_a_position_do_not_depend_on_its_neighbors():
    everything = hashes(3, "augment", np.arange(1000), 5)
    some = np.random.default_rng(0).permutation(1000)[:100]
    assert np.array_equal(hashes(3, "augment", some, 5), everything[some])


def test_fewer_draws_are_the_first_ones():
    assert np.array_equal(hashes(3, "augment", np.arange(9), 2), hashes(3, "augment", np.arange(9), 7)[:, :2])


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_the_integer_type_of_positions_does_not_matter(dtype):
    positions = np.array([0, 7, 127])
    assert np.array_equal(hashes(1, "x", positions.astype(dtype), 2), hashes(1, "x", positions, 2))


def test_no_position_gives_no_number():
    assert hashes(0, "x", np.arange(0), 4).shape == (0, 4)
    assert uniforms(0, "x", np.arange(4), 0).shape == (4, 0)


def test_hashes_of_many_positions_and_draws_are_all_different():
    values = hashes(0, "mask", np.arange(20_000), 20)
    assert len(np.unique(values)) == values.size


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniforms_are_uniform_over_positions_and_over_draws(seed):
    values = uniforms(seed, "mask", np.arange(500), 400)
    assert values.min() >= 0 and values.max() < 1
    for sample in (values.ravel(), values[:, 0], values[:, 399], values[0], values[499]):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3


def test_every_bit_is_set_half_of_the_time():
    bits = np.unpackbits(hashes(9, "bits", np.arange(20_000), 1).view(np.uint8), axis=1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_seeds_purposes_positions_and_draws_are_uncorrelated():
    base = uniforms(0, "mask", np.arange(10_000), 2)
    others = {
        "seed": uniforms(1, "mask", np.arange(10_000), 1)[:, 0],
        "purpose": uniforms(0, "augment", np.arange(10_000), 1)[:, 0],
        "position": uniforms(0, "mask", np.arange(1, 10_001), 1)[:, 0],
        "draw": base[:, 1],
    }
    for what, other in others.items():
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < 0.04, what


def test_step_seeds_fit_in_32_bits_and_differ_between_steps_ranks_purposes_and_runs():
    seeds = [step_seed(run, p, step, rank) for run in (0, 1) for p in "ab" for step in range(50) for rank in range(8)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert step_seed(0, "step", 1, 2) != step_seed(0, "step", 2, 1)
