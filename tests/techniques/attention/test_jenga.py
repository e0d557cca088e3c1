"""Jenga's attention carving against neighbours, best blocks and masses told one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from views import view_of

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.arrangements import along_curve, in_rows
from vivace.techniques.attention.jenga import Jenga, touching

GRIDS = (
    TokenGrid(4, 8, 8),
    TokenGrid(3, 7, 10),
    TokenGrid(3, 12, 9, text=20),
    TokenGrid(5, 9, 9, text=7, text_first=True),
)


def place(grid, token):
    return token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width


def neighbours_by_hand(grid, slots):
    """Blocks with tokens that differ by at most one along every axis."""
    blocks = [[place(grid, int(t)) for t in row if t >= 0] for row in slots]
    return torch.tensor(
        [
            [
                any(
                    max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
                    for a, b in itertools.product(one, other)
                )
                for other in blocks
            ]
            for one in blocks
        ]
    )


@pytest.mark.parametrize("arrange", [along_curve, in_rows])
@pytest.mark.parametrize("grid", [*GRIDS[:2], TokenGrid(1, 9, 9), TokenGrid(17, 2, 3)], ids=str)
def test_touching_blocks(grid, arrange) -> None:
    slots = arrange(grid, 16)
    assert torch.equal(torch.from_numpy(touching(grid, slots)), neighbours_by_hand(grid, slots))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "technique",
    [
        Jenga(drop=0.8),
        Jenga(drop=0.9, mass=0.6),
        Jenga(drop=0.6, neighbours=False),
        Jenga(drop=0.9, neighbours=False),
    ],
    ids=lambda t: f"{t.drop}-{t.mass}-{t.neighbours}",
)
def test_keeps_the_best_a_mass_and_the_neighbours(grid, technique) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, grid.tokens, 2, 8, generator=generator) * 2.0 for _ in range(3))
    view = view_of(technique, grid, q, k, v)
    out, routes = technique.attention(view, None)
    slots = along_curve(grid, 16)
    start, n = grid.text if grid.text_first else 0, len(slots)
    near = neighbours_by_hand(grid, slots)
    block_of = torch.empty(grid.video, dtype=torch.long)
    for block, row in enumerate(slots):
        block_of[row[row >= 0]] = block

    video = slice(start, start + grid.video)
    seen = torch.ones(2, 2, grid.tokens, grid.tokens, dtype=torch.bool)
    for b, h in itertools.product(range(2), range(2)):
        means = [
            torch.stack([x[b, video, h].double()[row[row >= 0]].mean(0) for row in slots]) for x in (q, k)
        ]
        p = torch.softmax(means[0] @ means[1].T / 8**0.5, -1)
        kept = near.clone() if technique.neighbours else torch.zeros(n, n, dtype=torch.bool)
        for i, row in enumerate(p):
            best, total = sorted(range(n), key=lambda j, row=row: -row[j]), 0.0
            for rank, j in enumerate(best):
                # A share is rounded up; the small number forgives what 1 - .9 is not.
                if rank >= (1 - technique.drop) * n - 1e-6 and total >= technique.mass:
                    break
                kept[i, j] = True
                total += float(row[j])
        assert torch.equal(routes.mask(view.layout.blocks)[b, h, :n, :n], kept)
        assert not kept.all()
        seen[b, h, video, video] = kept[block_of][:, block_of]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(
        1, 2
    )
    torch.testing.assert_close(view.layout.restore(out), want, rtol=1e-4, atol=1e-5)


def test_a_flat_map_gets_more_blocks_than_a_peaked_one() -> None:
    """With equal queries and keys every block has the same share, and the cut-off decides."""
    grid = TokenGrid(4, 16, 16)
    noise = torch.randn(1, grid.tokens, 1, 16, generator=torch.Generator().manual_seed(1))
    flat, peaked = torch.zeros_like(noise), noise * 100.0
    technique = Jenga(drop=0.9, mass=0.5, neighbours=False)
    counts = [technique.route(view_of(technique, grid, x, x, x)).count for x in (flat, peaked)]
    n = counts[0].shape[-1]
    assert (counts[0] == n // 2).all()
    assert counts[1].max() < n // 2
