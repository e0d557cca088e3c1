"""Patterns that single heads have, as block maps, each named by a short text. Pure geometry: no tensors, no weights.

    full                 everything
    skip                 only the block's own tokens
    diagonal:W           tokens up to a share W of the sequence away in the flattened order
    multi_diagonal:W     in every frame, places up to a share W of a frame away from the token's own place
    stripe:K             its own block, and K key frames spread evenly over the clip, the first among them
    frames:K             its own frame, and K reference frames spread evenly over the clip, the first among them
    window:R             3-D tiles up to a share R of each axis away (`patterns.sliding_tiles`)

Blocks never cross a frame (a tile of `window` may). Text tokens of joint attention see and are seen by everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import permutations

import numpy as np

from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.techniques.attention.arrangements import cut, with_text
from vivace.techniques.attention.patterns import (
    LEAST_BLOCKS,
    LEAST_BLOCKS_PER_FRAME,
    block_size,
    sliding_tiles,
)

FULL, SKIP = "full", "skip"
AXES: tuple[tuple[int, int, int], ...] = tuple(permutations(range(3)))  # type: ignore[assignment]
"""The six orders of (frame, height, width); tokens run along the last axis of an order first."""


class FrameBlocks:
    """A grid cut into blocks of neighbours that never cross a frame.

    Args:
        grid: the tokens.
        block: most tokens of a block; small frames get smaller blocks.

    Attributes:
        slots: int64 (N, C), the video token in every slot, -1 behind them.
        frame: int64 (N,), the frame of every block.
        place: float64 (N,), where the middle of every block lies in its frame, in tokens.
        area: tokens of a frame.
    """

    def __init__(self, grid: TokenGrid, block: int) -> None:
        self.grid, self.area = grid, grid.height * grid.width
        parts = -(-self.area // block_size(self.area, block, LEAST_BLOCKS_PER_FRAME))
        edges = np.linspace(0, self.area, parts + 1).round().astype(np.int64)
        inside = np.arange(int(np.diff(edges).max()))
        one = np.where(inside < np.diff(edges)[:, None], edges[:-1, None] + inside, -1)
        starts = np.arange(grid.frames)[:, None, None] * self.area
        self.slots = np.where(one >= 0, one + starts, -1).reshape(-1, one.shape[1])
        self.frame = np.repeat(np.arange(grid.frames), parts)
        self.place = np.tile((edges[:-1] + edges[1:] - 1) / 2, grid.frames)

    def diagonal(self, width: float) -> np.ndarray:
        """Blocks whose middles are up to a share `width` of the sequence apart: bool (N, N)."""
        middle = self.frame * self.area + self.place
        return _apart(middle) <= width * self.grid.video

    def multi_diagonal(self, width: float) -> np.ndarray:
        """Blocks of any two frames whose middles are up to a share `width` of a frame apart in it: bool (N, N)."""
        return _apart(self.place) <= width * self.area

    def stripe(self, count: int) -> np.ndarray:
        """Each block itself, and all blocks of `count` key frames: bool (N, N)."""
        return self.skip() | self._referred(count)

    def frames(self, count: int) -> np.ndarray:
        """Blocks of the same frame; all blocks of `count` reference frames see everything and are seen: bool (N, N)."""
        referred = self._referred(count)
        return np.equal.outer(self.frame, self.frame) | referred | referred.T

    def skip(self) -> np.ndarray:
        """Each block itself: bool (N, N)."""
        return np.eye(len(self.slots), dtype=bool)

    def full(self) -> np.ndarray:
        """Everything: bool (N, N)."""
        return np.ones((len(self.slots),) * 2, dtype=bool)

    def _referred(self, count: int) -> np.ndarray:
        return np.isin(self.frame, spread(self.grid.frames, count))[None]


def spread(frames: int, count: int) -> np.ndarray:
    """`count` frames spread evenly over a clip, the first always among them: frame i * F / count, rounded down."""
    count = min(count, frames)
    return np.arange(count) * frames // max(count, 1)


_WITH_VALUE: dict[str, Callable[[FrameBlocks, float], np.ndarray]] = {
    "diagonal": FrameBlocks.diagonal,
    "multi_diagonal": FrameBlocks.multi_diagonal,
    "stripe": lambda blocks, k: blocks.stripe(int(k)),
    "frames": lambda blocks, k: blocks.frames(int(k)),
}
_WHOLE = ("stripe", "frames")
"""Names whose value is a number of frames."""
WINDOW = "window"


def parse(text: str) -> tuple[str, float]:
    """A pattern's name and value; the value is 0 where the pattern has none.

    Raises:
        ConfigError: no such pattern, or a value that it cannot have.
    """
    name, colon, rest = text.partition(":")
    try:
        value = float(rest) if colon else 0.0
    except ValueError:
        value = float("nan")
    takes = name in (*_WITH_VALUE, WINDOW)
    known = takes or name in (FULL, SKIP)
    fits = 0.0 <= value < float("inf") if name in _WHOLE else 0.0 <= value <= 1.0
    if not known or takes != bool(colon) or not fits or (name in _WHOLE and value != int(value)):
        raise ConfigError(
            f"'{text}' is no pattern of a head; there are full, skip, diagonal:W, multi_diagonal:W and window:W with W "
            "from 0 to 1, stripe:K and frames:K with a whole number K."
        )
    return name, value


@functools.lru_cache(maxsize=32)
def head_map(grid: TokenGrid, pattern: str, block: int) -> BlockMap:
    """The map of one pattern on a grid.

    Args:
        grid: the tokens.
        pattern: see the module.
        block: most tokens of a block.

    Raises:
        ConfigError: no such pattern.
    """
    name, value = parse(pattern)
    if name == WINDOW:
        return sliding_tiles(grid, value, block)
    blocks = _blocks(grid, block)
    keep = _WITH_VALUE[name](blocks, value) if name in _WITH_VALUE else getattr(blocks, name)()
    return seen_by_text(grid, blocks.slots, keep)


@functools.lru_cache(maxsize=8)
def _blocks(grid: TokenGrid, block: int) -> FrameBlocks:
    return FrameBlocks(grid, block)


def in_axis_order(grid: TokenGrid, axes: tuple[int, int, int], block: int) -> np.ndarray:
    """Blocks of neighbours when the video's tokens stand in another order of its axes: slots (N, C).

    Args:
        grid: the tokens.
        axes: an order of (0 frame, 1 height, 2 width), slowest first; (0, 1, 2) is the model's own.
        block: most tokens of a block; small clips get smaller blocks.
    """
    order = np.arange(grid.video).reshape(grid.frames, grid.height, grid.width).transpose(axes).reshape(-1)
    return cut(order, block_size(grid.video, block, LEAST_BLOCKS))


def seen_by_text(grid: TokenGrid, slots: np.ndarray, keep: np.ndarray) -> BlockMap:
    """A map of the video, (N, C) and (N, N), with the grid's text tokens, which see and are seen by everything."""
    whole, text = with_text(grid, slots)
    everything = np.ones((1, len(whole), len(whole)), dtype=bool)
    everything[0, : len(whole) - text, : len(whole) - text] = keep
    return BlockMap(whole, everything)


def _apart(x: np.ndarray) -> np.ndarray:
    return np.abs(np.subtract.outer(x, x))
