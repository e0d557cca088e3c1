"""How a token grid is cut into the blocks of a `Layout`: rows or 3-D tiles of tokens, text behind. No tensors.

Training a student with sparse attention and running it must cut alike, so this is below both.
"""

from __future__ import annotations

import numpy as np

from vivace.core.shapes import TokenGrid

LEAST_BLOCKS = 16
"""A clip is cut into so many blocks at least, where it has the tokens: fewer leave nothing to choose from."""


def block_size(grid: TokenGrid, block: int) -> int:
    """The block size of a grid: `block`, or a smaller power of two (16 at least) for a small clip."""
    while block > 16 and grid.video < LEAST_BLOCKS * block:
        block //= 2
    return block


def fit_tile(grid: TokenGrid, budget: int) -> tuple[int, int, int]:
    """The tile (frames, height, width) of at most `budget` tokens that suits a grid.

    Tiles should be full, cover the grid with little overhang, and cut every axis into about equally many pieces, so
    that a window has the proportions of the clip.
    """
    sides = np.array([grid.frames, grid.height, grid.width])
    tiles = np.stack(np.meshgrid(*(np.arange(1, s + 1) for s in sides), indexing="ij"), -1).reshape(-1, 3)
    tiles = tiles[tiles.prod(-1) <= budget]
    pieces = -(-sides // tiles)
    waste = pieces.prod(-1) * budget / grid.video
    spread = pieces.max(-1) / np.where(sides > 1, pieces, pieces.max(-1, keepdims=True)).min(-1)
    t, h, w = tiles[np.argmin(waste * np.sqrt(spread))]
    return int(t), int(h), int(w)


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


def cut(order: np.ndarray, block: int) -> np.ndarray:
    """An order of tokens cut into blocks; the last one is padded."""
    blocks = -(-order.size // block)
    slots = np.full(blocks * block, -1, dtype=np.int64)
    slots[: order.size] = order
    return slots.reshape(blocks, block)


def with_text(grid: TokenGrid, slots: np.ndarray) -> tuple[np.ndarray, int]:
    """Slots of the video (N, C) with the grid's text tokens in blocks behind them, and how many blocks those are."""
    if not grid.text:
        return slots, 0
    first_text, first_video = (0, grid.text) if grid.text_first else (grid.video, 0)
    text = cut(np.arange(first_text, first_text + grid.text), slots.shape[1])
    return np.concatenate([np.where(slots >= 0, slots + first_video, -1), text]), len(text)
