"""Ways to cut a token grid into blocks, as slots of tokens: rows, 3-D tiles, and curves that fill space."""

from __future__ import annotations

import numpy as np

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.tiles import block_size, cut, in_rows, in_tiles, with_text

__all__ = ["along_curve", "block_size", "by_place", "cut", "hilbert", "in_rows", "in_tiles", "with_text"]


def along_curve(grid: TokenGrid, block: int) -> np.ndarray:
    """Neighbours along a Hilbert curve through the grid: slots (N, C), all full but the last."""
    return cut(hilbert(grid), block)


def by_place(grid: TokenGrid, block: int) -> np.ndarray:
    """Tokens of one place in all frames stand together: slots (N, C)."""
    return cut(np.arange(grid.video).reshape(grid.frames, -1).T.reshape(-1), block)


def hilbert(grid: TokenGrid) -> np.ndarray:
    """Tokens in the order of a 3-D Hilbert curve (Skilling, 2004) over the smallest cube of 2^n that holds the grid."""
    sides = (grid.frames, grid.height, grid.width)
    bits = max(1, (max(sides) - 1).bit_length())
    x = np.indices(sides).reshape(3, -1).astype(np.int64)
    step = np.int64(1) << (bits - 1)
    while step > 1:  # undo the excess work of the inverse transform, from the largest cube down
        low = step - 1
        for i in range(3):
            flip = (x[i] & step) != 0
            swap = np.where(flip, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(flip, x[0] ^ low, x[0] ^ swap)
            x[i] ^= swap
        step >>= 1
    for i in range(1, 3):  # Gray code
        x[i] ^= x[i - 1]
    carry = np.zeros_like(x[0])
    step = np.int64(1) << (bits - 1)
    while step > 1:
        carry ^= np.where(x[2] & step, step - 1, 0)
        step >>= 1
    x ^= carry
    key = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for i in range(3):
            key = (key << 1) | ((x[i] >> bit) & 1)
    return np.argsort(key, kind="stable")
