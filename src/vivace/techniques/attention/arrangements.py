"""Ways to cut a token grid into blocks, as slots of tokens: rows, 3-D tiles, and curves that fill space."""

from __future__ import annotations

import numpy as np

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.patterns import fit_tile

LEAST_BLOCKS = 16
"""A clip is cut into so many blocks at least, where it has the tokens: fewer leave nothing to choose from."""


def block_size(grid: TokenGrid, block: int) -> int:
    """The block size of a grid: `block`, or a smaller power of two (16 at least) for a small clip."""
    while block > 16 and grid.video < LEAST_BLOCKS * block:
        block //= 2
    return block


def in_rows(grid: TokenGrid, block: int) -> np.ndarray:
    """Neighbours in the flattened sequence: slots (N, C)."""
    return cut(np.arange(grid.video), block)


def in_tiles(grid: TokenGrid, block: int, tile: tuple[int, int, int] | None = None) -> np.ndarray:
    """3-D tiles of at most `block` tokens, one a block; `tile` fixes (frames, height, width) of a tile."""
    sides = np.array([grid.frames, grid.height, grid.width])
    shape = np.array(fit_tile(grid, block) if tile is None else tile)
    shape = np.minimum(shape, sides)
    pieces = -(-sides // shape)
    places = np.indices(tuple(sides)).reshape(3, -1).T
    cell, inside = np.divmod(places, shape)
    block_of = np.ravel_multi_index(tuple(cell.T), tuple(pieces))
    slot = np.ravel_multi_index(tuple(inside.T), tuple(shape))
    slots = np.full((int(pieces.prod()), block), -1, dtype=np.int64)
    slots[block_of, slot] = np.arange(grid.video)
    return np.take_along_axis(slots, np.argsort(slots < 0, axis=1, kind="stable"), 1)


def along_curve(grid: TokenGrid, block: int) -> np.ndarray:
    """Neighbours along a Hilbert curve through the grid: slots (N, C), all full but the last."""
    return cut(hilbert(grid), block)


def by_place(grid: TokenGrid, block: int) -> np.ndarray:
    """Tokens of one place in all frames stand together: slots (N, C)."""
    return cut(np.arange(grid.video).reshape(grid.frames, -1).T.reshape(-1), block)


def cut(order: np.ndarray, block: int) -> np.ndarray:
    """An order of tokens cut into blocks; the last one is padded."""
    blocks = -(-order.size // block)
    slots = np.full(blocks * block, -1, dtype=np.int64)
    slots[: order.size] = order
    return slots.reshape(blocks, block)


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


def with_text(grid: TokenGrid, slots: np.ndarray) -> tuple[np.ndarray, int]:
    """Slots of the video (N, C) with the grid's text tokens in blocks behind them, and how many blocks those are."""
    if not grid.text:
        return slots, 0
    first_text, first_video = (0, grid.text) if grid.text_first else (grid.video, 0)
    text = cut(np.arange(first_text, first_text + grid.text), slots.shape[1])
    return np.concatenate([np.where(slots >= 0, slots + first_video, -1), text]), len(text)
