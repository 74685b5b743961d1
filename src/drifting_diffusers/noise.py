"""Normal numbers by key: the noise of a sample is a function of its key, whatever is drawn beside it, on every machine.

Counters pass through SplitMix64 (Steele, Lea and Flood 2014), 16 bits of what comes out choose a quantile. That is computed for many samples at once, where
numpy needs one generator per sample and has a sixth of the speed; torch's generators look at 32 bits of their seed only on a CPU, and at 16 numbers and
fewer take another way.
"""

from functools import cache

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd


def keys_of(domain: bytes, *columns: np.ndarray) -> np.ndarray:
    """One key [n] of 64 bits per row of the columns, integers in [0, 2^64), each [n].

    Args:
        domain: up to 8 bytes; keys of other domains are others.
        columns: at least one.
    """
    keys = np.full(len(columns[0]), int.from_bytes(domain, "little"), dtype=np.uint64)
    for column in columns:
        keys = _mixed((keys ^ column.astype(np.uint64)) + GOLDEN)
    return keys


def normals(keys: np.ndarray, d: int) -> np.ndarray:
    """For each of n keys d standard normal numbers, [n, d] in float32: 65,536 different ones up to 4.32, about as many as float16 has."""
    counters = np.arange(1, -(-d // 4) + 1, dtype=np.uint64) * GOLDEN
    bits = _mixed(keys[:, None] + counters).astype("<u8", copy=False).view("<u2")  # (n, 4 * ceil(d / 4))
    return np.take(_quantiles(), bits[:, :d], mode="clip")  # nothing is clipped: the mode is the fast one


def _mixed(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, a bijection, in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


@cache
def _quantiles() -> np.ndarray:
    """The middles of 2^16 equally likely parts of the normal distribution, scaled to variance 1."""
    middles = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    return (middles / middles.square().mean().sqrt()).float().numpy()
