"""Matching of tokens in windows: against loops over tokens that share no code with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from vivace.core.shapes import TokenGrid
from vivace.techniques.compression.token_matching import Windows, match, merged, parsed, restored

GRIDS = [TokenGrid(4, 4, 4), TokenGrid(5, 3, 7), TokenGrid(1, 6, 5), TokenGrid(3, 2, 1)]


def cut(length: int, most: int) -> list[int]:
    """The piece of an axis that each position is in; pieces are equal up to one, later ones longer."""
    pieces = -(-length // most)
    return [max(n for n in range(pieces) if n * length // pieces <= i) for i in range(length)]


def by_hand(x, grid, window, stride, count):
    """Which tokens go, and into which: a dictionary for one sample (S, C), and all pairs that were compared."""
    places = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    pieces = [cut(n, most) for n, most in zip((grid.frames, grid.height, grid.width), window, strict=True)]
    home = [tuple(pieces[a][p[a]] for a in range(3)) for p in places]
    corner = {
        h: tuple(min(q[a] for q, g in zip(places, home, strict=True) if g == h) for a in range(3))
        for h in home
    }
    fixed = [
        all((p[a] - corner[h][a]) % stride[a] == 0 for a in range(3))
        for p, h in zip(places, home, strict=True)
    ]
    best = []
    for i in range(len(places)):
        if fixed[i]:
            continue
        likes = {
            j: float(torch.nn.functional.cosine_similarity(x[i].double(), x[j].double(), dim=0))
            for j in range(len(places))
            if fixed[j] and home[j] == home[i]
        }
        winner = max(likes, key=likes.__getitem__)
        best.append((likes[winner], i, winner))
    best.sort(reverse=True)
    return {i: j for _, i, j in best[:count]}, len(best)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stride", ["2x2x2", "1x2x2", "2x1x1"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_most_alike_go_into_their_nearest(grid, stride, share) -> None:
    window, steps = (2, 4, 3), parsed(stride)
    x = torch.randn(2, grid.video, 6, generator=torch.Generator().manual_seed(1))
    windows = Windows(grid, window, steps, "cpu")
    count = int(share * windows.available)
    found = match(x, windows, count)
    means = merged(x, found, windows)
    back = restored(means, found)
    for row in range(2):
        gone, sources = by_hand(x[row], grid, window, steps, count)
        assert windows.available == sources
        assert found.keep[row].tolist() == [i for i in range(grid.video) if i not in gone]
        groups = {i: [i] for i in found.keep[row].tolist()}
        for i, j in gone.items():
            groups[j].append(i)
        for position, i in enumerate(found.keep[row].tolist()):
            assert found.number[row, position] == len(groups[i])
            torch.testing.assert_close(means[row, position], x[row, groups[i]].mean(0))
            for member in groups[i]:
                assert torch.equal(back[row, member], means[row, position])


def test_more_than_there_are_is_refused() -> None:
    windows = Windows(GRIDS[0], (4, 4, 4), (2, 2, 2), "cpu")
    assert windows.available == 56
    with pytest.raises(ValueError, match="only 56 are sources"):
        match(torch.randn(1, 64, 4), windows, 57)


def test_counts_need_no_device() -> None:
    for grid in GRIDS:
        one, two = Windows(grid, (2, 4, 3), (2, 2, 2)), Windows(grid, (2, 4, 3), (2, 2, 2), "cpu")
        assert (one.available, one.flops(7)) == (two.available, two.flops(7))
        assert two.destinations.shape == (one.count, one.width)
        assert two.sources.shape == (one.count, one.depth)


def test_rows_are_matched_by_themselves() -> None:
    x = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(2))
    windows = Windows(GRIDS[0], (4, 4, 4), (2, 2, 2), "cpu")
    together = match(x, windows, 20)
    for row in range(3):
        alone = match(x[row : row + 1], windows, 20)
        for a, b in zip(alone.parts, together.row(row).parts, strict=True):
            assert torch.equal(a, b)
