"""Static patterns of attention over a video's token grid, as block maps. Pure geometry: no tensors, no weights.

Text tokens of joint attention stand in blocks of their own that see everything and are seen by everything.
"""

from __future__ import annotations

import numpy as np

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.tiles import fit_tile
from vivace.kernels.block_sparse_attention.spec import BlockMap

LEAST_BLOCKS = 32
"""Blocks that a clip is cut into at least, where it has so many tokens: fewer cannot tell near from far."""
LEAST_BLOCKS_PER_FRAME = 4


def block_size(tokens: int, block: int, least: int = LEAST_BLOCKS) -> int:
    """The block size for a sequence: `block`, or less where that would make fewer than `least` blocks."""
    return max(1, min(block, tokens // least))


def sliding_tiles(grid: TokenGrid, window: float, block: int) -> BlockMap:
    """Every 3-D tile of tokens sees the tiles within a window around it (after STA, arXiv 2502.04507).

    Args:
        grid: the tokens.
        window: reach in each direction along each axis as a share of the axis, 0 to 1; always at least one tile.
        block: most tokens of a tile.
    """
    tile = fit_tile(grid, block_size(grid.video, block))
    sides = (grid.frames, grid.height, grid.width)
    pieces = [-(-side // t) for side, t in zip(sides, tile, strict=True)]
    places = np.indices(sides).reshape(3, -1).T
    cell, inside = np.divmod(places, tile)
    slots = np.full((np.prod(pieces), np.prod(tile)), -1, dtype=np.int64)
    slots[np.ravel_multi_index(cell.T, pieces), np.ravel_multi_index(inside.T, tile)] = np.arange(grid.video)

    keep = np.ones((1, 1), dtype=bool)
    for n in pieces:
        reach = max(1, round(window * (n - 1)))
        keep = np.kron(keep, np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= reach)
    return _with_text(grid, _tokens_first(slots), keep)


def radial(grid: TokenGrid, decay: float, near: int, sink: int, block: int) -> BlockMap:
    """Attention that thins out with the distance in time (after Radial Attention, arXiv 2506.19852).

    Frames up to `near` apart see each other fully. Further off, a token sees a band of tokens around its own place in
    the other frame, whose width falls by 2**decay whenever the distance doubles. The first `sink` frames are seen by
    all. Blocks never cross a frame; a pair of blocks is kept when their centres lie within the band, and blocks at the
    same place always see each other.
    """
    area = grid.height * grid.width
    parts = -(-area // block_size(area, block, LEAST_BLOCKS_PER_FRAME))
    edges = np.linspace(0, area, parts + 1).round().astype(np.int64)
    widths = np.diff(edges)
    frame = np.full((parts, widths.max()), -1, dtype=np.int64)
    for part, (start, width) in enumerate(zip(edges, widths, strict=False)):
        frame[part, :width] = np.arange(start, start + width)
    starts = np.arange(grid.frames)[:, None, None] * area
    slots = np.where(frame >= 0, frame + starts, -1).reshape(-1, frame.shape[1])

    time = np.abs(np.subtract.outer(np.arange(grid.frames), np.arange(grid.frames)))
    doublings = np.floor(np.log2(np.maximum(time / max(near, 0.5), 1.0)))
    band = area / 2.0 ** (decay * doublings)
    centres = (edges[:-1] + edges[1:]) / 2
    apart = np.abs(np.subtract.outer(centres, centres))
    inside = (apart < band[:, :, None, None]) | (apart == 0)  # (frame, frame, part, part)
    inside |= (np.arange(grid.frames) < sink)[None, :, None, None]
    keep = inside.transpose(0, 2, 1, 3).reshape(len(slots), len(slots))
    return _with_text(grid, slots, keep)


def _with_text(grid: TokenGrid, slots: np.ndarray, keep: np.ndarray) -> BlockMap:
    """A map of the video (N, C), (N, N) with the grid's text tokens added."""
    if not grid.text:
        return BlockMap(slots, keep[None])
    first_text, first_video = (0, grid.text) if grid.text_first else (grid.video, 0)
    video = np.where(slots >= 0, slots + first_video, -1)
    size = slots.shape[1]
    text = np.full((-(-grid.text // size), size), -1, dtype=np.int64)
    text.reshape(-1)[: grid.text] = np.arange(first_text, first_text + grid.text)
    blocks = len(video) + len(text)
    everything = np.ones((1, blocks, blocks), dtype=bool)
    everything[0, : len(video), : len(video)] = keep
    return BlockMap(np.concatenate([video, text]), everything)


def _tokens_first(slots: np.ndarray) -> np.ndarray:
    """Slots with the padding of every block moved behind its tokens."""
    return np.take_along_axis(slots, np.argsort(slots < 0, axis=-1, kind="stable"), axis=-1)
