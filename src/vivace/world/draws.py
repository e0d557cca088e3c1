"""Counter-based random numbers: a pure function of (seed, name, lane), so a scene never depends on its batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), elementwise on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """Named uniform draws for a batch of seeds. Every name is its own stream; drawing never changes a state."""

    def __init__(self, seeds: Sequence[int]) -> None:
        start = np.array([seed & _MASK for seed in seeds], dtype=np.uint64)
        self._state = _mix(start + np.uint64(0x9E3779B97F4A7C15))

    def uniform(self, name: str, lanes: int = 1, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Uniform numbers in [low, high), shape (B, lanes), float64."""
        key = np.uint64(zlib.crc32(name.encode()) << 20)
        lane = _mix(key + np.arange(1, lanes + 1, dtype=np.uint64))
        bits = _mix(self._state[:, None] ^ lane) >> np.uint64(11)
        return low + (high - low) * (bits.astype(np.float64) * 2.0**-53)

    def index(self, name: str, size: int) -> np.ndarray:
        """Uniform integers in [0, size), shape (B,)."""
        return (self.uniform(name)[:, 0] * size).astype(np.int64)

    def order(self, name: str, size: int) -> np.ndarray:
        """A random permutation of `size` items for each seed, shape (B, size)."""
        return np.argsort(self.uniform(name, size), axis=1, kind="stable")
