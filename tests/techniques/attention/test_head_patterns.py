"""Patterns of heads against their definitions, token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.head_patterns import AXES, head_map, in_axis_order, spread

GRIDS = [
    TokenGrid(3, 2, 2),
    TokenGrid(5, 3, 4),
    TokenGrid(7, 2, 3, text=5),
    TokenGrid(4, 5, 2, text=3, text_first=True),
    TokenGrid(1, 4, 4),
]


def places(grid):
    """(frame, row, column) of every token, None for text."""
    video = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    text = [None] * grid.text
    return text + video if grid.text_first else video + text


def references(grid, count):
    count = min(count, grid.frames)
    return {int(i * grid.frames / count) for i in range(count)}


def sees(grid, pattern, a, b):
    """Whether token `a` sees token `b`, by the words of the module."""
    if a is None or b is None or pattern == "full":
        return True
    name, _, value = pattern.partition(":")
    area = grid.height * grid.width
    (pa, pb), far = ((t[1] * grid.width + t[2] for t in (a, b)), float(value or 0))
    if name == "diagonal":
        return abs(a[0] * area + pa - b[0] * area - pb) <= far * grid.video
    if name == "multi_diagonal":
        return abs(pa - pb) <= far * area
    if name == "stripe":
        return a == b or b[0] in references(grid, int(value))
    if name == "frames":
        return a[0] == b[0] or bool({a[0], b[0]} & references(grid, int(value)))
    assert name == "skip"
    return a == b


PATTERNS = (
    "full", "skip", "diagonal:0", "diagonal:0.2", "multi_diagonal:0", "multi_diagonal:0.3", "stripe:1", "stripe:2",
    "stripe:0", "frames:1", "frames:3", "frames:99",
)  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_single_token_blocks_a_map_is_the_definition(grid, pattern) -> None:
    got = head_map(grid, pattern, 1).token_mask()[0]
    for (i, a), (j, b) in itertools.product(enumerate(places(grid)), repeat=2):
        assert got[i, j] == sees(grid, pattern, a, b), (a, b)


@pytest.mark.parametrize("pattern", ["skip", "diagonal:0.1", "multi_diagonal:0.1", "stripe:2", "frames:2"])
def test_blocks_of_a_real_clip_stay_in_their_frames(pattern) -> None:
    grid = TokenGrid(21, 30, 52, text=7)
    block_map = head_map(grid, pattern, 128)
    assert block_map.slots.shape[1] <= 128
    assert block_map.tokens / block_map.slots.size > 0.9
    for slots in block_map.slots:
        tokens = slots[slots >= 0]
        video = tokens[tokens < grid.video]
        assert video.size in (0, tokens.size)
        assert len(np.unique(video // (30 * 52))) <= 1
    assert block_map.density < 0.35


def test_reference_frames_make_cost_linear_in_the_frames() -> None:
    pairs = [head_map(TokenGrid(n, 8, 8), "frames:2", 64).pairs(1, 1) for n in (8, 16, 32)]
    # Two frames see all n, the others themselves and those two.
    assert pairs == [(5 * n - 6) * 64**2 for n in (8, 16, 32)]


def test_reference_frames_are_spread_from_the_first() -> None:
    assert spread(9, 3).tolist() == [0, 3, 6]
    assert spread(3, 8).tolist() == [0, 1, 2]


def test_windows_are_sliding_tiles() -> None:
    grid = TokenGrid(4, 4, 4)
    assert head_map(grid, "window:1.0", 64).keep.all()
    assert head_map(grid, "window:0.0", 64).density < 1.0


@pytest.mark.parametrize("axes", AXES)
def test_an_order_of_axes_sorts_tokens_by_them(axes) -> None:
    grid = TokenGrid(3, 4, 5, text=2)
    tokens = sorted(range(60), key=lambda i: [places(grid)[i][a] for a in axes])
    slots = in_axis_order(grid, axes, 64)
    assert slots[slots >= 0].tolist() == tokens
    assert (slots[:-1] >= 0).all()
    assert len(slots) >= 32


@pytest.mark.parametrize(
    "text",
    ["diagonal", "full:1", "stripe:0.5", "stripe:-1", "diagonal:2", "window:x", "diagonal:nan", "dense", ""],
)
def test_wrong_patterns_are_refused(text) -> None:
    with pytest.raises(ConfigError, match="is no pattern of a head"):
        head_map(GRIDS[0], text, 64)
