"""Random numbers that are a pure function of what they are for.

A generator that counts its draws would make crops and masks depend on how many workers and ranks share the work. Here a
number is the hash of (seed, purpose, position, draw): any process can compute it, at any time, in any order. The hash
is splitmix64's finalizer (Steele, Lea & Flood 2014), applied twice; about 1 us a sample, vectorized.
"""

import zlib

import numpy as np
from jaxtyping import Float, Int, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        for _ in range(2):
            z = z + _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def hashes(seed: int, purpose: str, positions: Int[np.ndarray, " n"], draws: int) -> UInt64[np.ndarray, "n draws"]:
    """Returns `draws` 64-bit hashes for each position; different purposes give independent numbers."""
    key = _mix(np.array([seed % 2**64], np.uint64) ^ np.uint64(zlib.crc32(purpose.encode()) * 0x100000001))
    with np.errstate(over="ignore"):
        z = _mix(key + np.asarray(positions).astype(np.uint64))[:, None]
        return _mix(z + np.arange(draws, dtype=np.uint64) * _GOLDEN)


def uniforms(seed: int, purpose: str, positions: Int[np.ndarray, " n"], draws: int) -> Float[np.ndarray, "n draws"]:
    """Returns `draws` float64 numbers in [0, 1) for each position."""
    return (hashes(seed, purpose, positions, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def step_seed(seed: int, purpose: str, *position: int) -> int:
    """Returns a 32-bit seed for generators that want one, for example for (step, rank)."""
    value = seed
    for part in position:
        value = int(hashes(value, purpose, np.array([part]), 1)[0, 0])
    return value % 2**32
