"""The random generators of many samples at once: each is bit for bit the one that `numpy.random.default_rng(seed)` makes, in a fraction of the time.

Making a generator is hashing its seed, some thirty operations on 32-bit words, one seed after the other. Here the words of all seeds are hashed together, with
the hash of `numpy.random.SeedSequence`, which NumPy promises to keep (NEP 19), and each generator is handed what it would have asked its seed for.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.random.bit_generator import ISeedSequence

POOL, TOLD, SHIFT = 4, 8, np.uint32(16)  # 32-bit words that a seed is hashed to, that a PCG64 asks for
OF_SEEDS, OF_POOLS = (
    (0x43B0D7E5, 0x931E8875),
    (0x8B51F9DD, 0x58F38DED),
)  # the first constant of a hash, and the factor from each to the next
LEFT, RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
STEP, MASK_128, MASK_64 = 0x2360ED051FC65DA44385DF649FCCF645, 2**128 - 1, 2**64 - 1  # the factor of a PCG64
FEW = 8  # hashing together takes as long as hashing so many one after the other
Words = np.ndarray  # [words, seeds] in uint32


def generators(seeds: Sequence[Sequence[int]]) -> list[np.random.Generator]:
    """`[numpy.random.default_rng(tuple(seed)) for seed in seeds]`, of non-negative integers."""
    numbers = _table(seeds) if len(seeds) >= FEW else None
    if numbers is None:
        return [np.random.default_rng(tuple(seed)) for seed in seeds]
    return [np.random.Generator(np.random.PCG64(cast(Any, _Seed(told)))) for told in _told(numbers)]


def coins(seeds: Sequence[Sequence[int]]) -> list[bool]:
    """`[numpy.random.default_rng(tuple(seed)).random() < 0.5 for seed in seeds]`, of non-negative integers."""
    numbers = _table(seeds) if len(seeds) >= FEW else None
    if numbers is None:
        return [bool(rng.random() < 0.5) for rng in generators(seeds)]
    return [_heads(*told) for told in _told(numbers).tolist()]


def _heads(high: int, low: int, high_stream: int, low_stream: int) -> bool:
    """Whether the first number of a PCG64 that was told this is below a half: the first bit of its first 64, which are its state's halves, xored and rotated."""
    stream = ((high_stream << 64 | low_stream) << 1 | 1) & MASK_128
    state = (((stream + (high << 64 | low)) * STEP + stream) * STEP + stream) & MASK_128
    top = state >> 64
    return not ((top ^ state) & MASK_64) >> ((top >> 58) + 63 & 63) & 1


class _Seed(ISeedSequence):
    """A seed that was hashed already: what it tells a PCG64, [4] in uint64."""

    def __init__(self, told: np.ndarray):
        self.told = told

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return self.told


def _table(seeds: Sequence[Sequence[int]]) -> np.ndarray | None:
    """The seeds [n, k] in uint64; None where they are not k integers each below 2^64."""
    try:
        numbers = np.asarray(seeds)
    except ValueError:  # of different lengths
        return None
    if numbers.ndim != 2 or numbers.dtype.kind not in "iu" or not numbers.size or numbers.min() < 0:
        return None
    return numbers.astype(np.uint64)


def _told(numbers: np.ndarray) -> np.ndarray:
    """Of seeds [n, k], [n, 4] in uint64. A number from 2^32 on is two words, so seeds are hashed together whose numbers have as many."""
    halves = np.stack([numbers & np.uint64(0xFFFFFFFF), numbers >> np.uint64(32)], axis=2).astype(np.uint32)
    long, told = halves[..., 1] > 0, np.empty((len(numbers), TOLD), dtype=np.uint32)
    for kind in set(map(tuple, long.tolist())):
        here, used = (long == kind).all(1), np.array([(True, is_long) for is_long in kind])
        told[here] = _asked(_pool(halves[here][:, used].T)).T
    return told[:, ::2].astype(np.uint64) | told[:, 1::2].astype(np.uint64) << np.uint64(32)


def _constants(first: int, factor: int, count: int) -> np.ndarray:
    """[count, 1]"""
    found = [first]
    while len(found) < count:
        found.append(found[-1] * factor & 0xFFFFFFFF)
    return np.array(found, dtype=np.uint32)[:, None]


def _hashed(words: Words, constants: np.ndarray) -> Words:
    """Each word by its constant and the next."""
    words = (words ^ constants[:-1]) * constants[1:]
    return words ^ (words >> SHIFT)


def _mixed(x: Words, y: Words) -> Words:
    mixed = x * LEFT - y * RIGHT
    return mixed ^ (mixed >> SHIFT)


def _pool(words: Words) -> Words:
    """The hash of seeds."""
    pool = np.zeros((POOL, words.shape[1]), dtype=np.uint32)
    pool[: len(words)] = words[:POOL]
    constants = _constants(*OF_SEEDS, POOL * max(POOL, len(words)) + 1)
    pool, at = _hashed(pool, constants[: POOL + 1]), POOL
    for source in range(POOL):
        others = [i for i in range(POOL) if i != source]
        pool[others] = _mixed(pool[others], _hashed(pool[source], constants[at : at + POOL]))
        at += POOL - 1
    for word in words[POOL:]:
        pool = _mixed(pool, _hashed(word, constants[at : at + POOL + 1]))
        at += POOL
    return pool


def _asked(pool: Words) -> Words:
    """What a PCG64 is told of it."""
    return _hashed(np.tile(pool, (TOLD // POOL, 1)), _constants(*OF_POOLS, TOLD + 1))
