"""Patterns against the definition, token by token."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.patterns import block_size, fit_tile, radial, sliding_tiles

GRIDS = [
    TokenGrid(3, 2, 2),
    TokenGrid(5, 4, 6),
    TokenGrid(8, 4, 4, text=5),
    TokenGrid(4, 5, 7, text=9, text_first=True),
    TokenGrid(1, 6, 6),
    TokenGrid(7, 1, 1),
]


def places(grid: TokenGrid) -> list[tuple[int, int, int] | None]:
    """(frame, row, column) of every token, None for text."""
    video = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    text = [None] * grid.text
    return text + video if grid.text_first else video + text


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [0.05, 0.5, 1.0])
def test_sliding_tiles_see_their_neighbours(grid, window) -> None:
    block_map = sliding_tiles(grid, window, 64)
    tile = fit_tile(grid, block_size(grid.video, 64))
    sides = (grid.frames, grid.height, grid.width)
    reach = [max(1, round(window * (math.ceil(s / t) - 1))) for s, t in zip(sides, tile, strict=True)]
    got = block_map.token_mask()[0]
    for (i, a), (j, b) in itertools.product(enumerate(places(grid)), repeat=2):
        near = (
            a is None
            or b is None
            or all(abs(x // t - y // t) <= r for x, y, t, r in zip(a, b, tile, reach, strict=True))
        )
        assert got[i, j] == near, (a, b)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("decay", "near", "sink"), [(0.0, 1, 1), (1.0, 1, 1), (1.0, 0, 0), (2.0, 2, 2), (4.0, 0, 1)]
)
def test_radial_with_single_token_blocks_is_the_formula(grid, decay, near, sink) -> None:
    area = grid.height * grid.width
    got = radial(grid, decay, near, sink, 1).token_mask()[0]
    for (i, a), (j, b) in itertools.product(enumerate(places(grid)), repeat=2):
        if a is None or b is None or b[0] < sink:
            assert got[i, j]
            continue
        doublings, reach = 0, max(near, 0.5)
        while abs(a[0] - b[0]) >= 2 * reach:
            doublings, reach = doublings + 1, 2 * reach
        band = area / 2 ** (decay * doublings)
        apart = abs((a[1] * grid.width + a[2]) - (b[1] * grid.width + b[2]))
        assert got[i, j] == (apart == 0 or apart < band), (a, b)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_text_is_dense_both_ways(grid) -> None:
    text = np.array([p is None for p in places(grid)])
    for block_map in (sliding_tiles(grid, 0.05, 64), radial(grid, 4.0, 0, 0, 64)):
        mask = block_map.token_mask()[0]
        assert mask[text].all()
        assert mask[:, text].all()
        assert mask.diagonal().all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pairs_are_those_of_the_mask(grid) -> None:
    for block_map in (sliding_tiles(grid, 0.2, 128), radial(grid, 1.0, 1, 1, 128)):
        assert block_map.pairs(2, 3) == 6 * block_map.token_mask().sum()
        assert block_map.density == pytest.approx(block_map.token_mask().mean())


@pytest.mark.parametrize("block", [64, 128])
def test_real_clips_get_full_blocks_and_few_pairs(block) -> None:
    wan, embedded = TokenGrid(21, 30, 52), TokenGrid(8, 16, 16)
    for grid, most in ((wan, 0.2), (embedded, 0.4)):
        block_map = sliding_tiles(grid, 0.25, block)
        assert block_map.slots.shape[1] <= block
        assert block_map.tokens / block_map.slots.size > 0.9
        assert block_map.density < most
    assert radial(wan, 1.0, 1, 1, block).density < 0.55
    assert radial(embedded, 1.0, 1, 1, block).density < 0.75


def test_radial_grows_slower_than_the_square_of_the_length() -> None:
    clips = [radial(TokenGrid(n, 16, 16), 1.0, 1, 1, 16) for n in (16, 32, 64)]
    assert clips[0].density > 1.4 * clips[1].density > 1.4**2 * clips[2].density


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_respect_the_budget(grid) -> None:
    for budget in (1, 4, 16, 64):
        assert math.prod(fit_tile(grid, budget)) <= budget
