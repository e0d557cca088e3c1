"""Sparse VideoGen's choice for heads against outputs computed row by row, and on heads made for either pattern."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from views import view_of

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.sparse_videogen import SparseVideoGen

GRIDS = (
    TokenGrid(6, 8, 8),
    TokenGrid(9, 5, 7),
    TokenGrid(9, 5, 7, text=9),
    TokenGrid(7, 6, 6, text=20, text_first=True),
)


def patterns_by_hand(grid, density):
    """Token masks (spatial, temporal) of the video: a frame's parts of at most 16 tokens, equal up to one."""
    area = grid.height * grid.width
    parts = -(-area // 16)
    edges = [round(area * i / parts) for i in range(parts + 1)]
    blocks = [(f, edges[i], edges[i + 1]) for f in range(grid.frames) for i in range(parts)]
    # A band of half-width w on a square of side one leaves two triangles of side 1 - w.
    width = 1 - (1 - density) ** 0.5
    masks = torch.zeros(2, grid.video, grid.video, dtype=torch.bool)
    for (f, a, b), (g, c, d) in itertools.product(blocks, blocks):
        apart_in_place = abs((a + b) / 2 - (c + d) / 2)
        apart_in_order = abs(f * area + (a + b) / 2 - g * area - (c + d) / 2)
        near = (apart_in_order <= width * grid.video, apart_in_place <= width * area)
        for mask, inside in zip(masks, near, strict=True):
            mask[f * area + a : f * area + b, g * area + c : g * area + d] = inside or g == 0
    return masks


def with_text(grid, masks):
    whole = torch.ones(2, grid.tokens, grid.tokens, dtype=torch.bool)
    start = grid.text if grid.text_first else 0
    whole[:, start : start + grid.video, start : start + grid.video] = masks
    return whole


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("density", "masked"), [(0.25, False), (0.1, True)])
def test_every_head_gets_the_pattern_of_smaller_error(grid, density, masked) -> None:
    technique = SparseVideoGen(density=density, samples=10)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, grid.tokens, 4, 8, generator=generator) * 2.0 for _ in range(3))
    start, mask = grid.text if grid.text_first else 0, None
    if masked and grid.text:
        mask = torch.ones(3, 1, 1, grid.tokens, dtype=torch.bool)
        mask[1, ..., (3 if grid.text_first else grid.tokens - 3)] = False
    view = view_of(technique, grid, q, k, v, mask)
    out, _ = technique.attention(view, None)

    masks = with_text(grid, patterns_by_hand(grid, density))
    rows = [start + int((i + 0.5) * grid.video / 10) for i in range(10)]
    heads = (x.transpose(1, 2).double() for x in (q, k, v))
    allowed = torch.ones(3, 1, 1, grid.tokens, dtype=torch.bool) if mask is None else mask
    qh, kh, vh = heads
    dense = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=allowed)
    sparse = [F.scaled_dot_product_attention(qh, kh, vh, attn_mask=allowed & m) for m in masks]
    chosen = torch.empty(3, 4, dtype=torch.long)
    for b, h in itertools.product(range(3), range(4)):
        errors = [sum(float((s[b, h, r] - dense[b, h, r]).square().mean()) for r in rows) for s in sparse]
        chosen[b, h] = int(errors[1] < errors[0])
    if density == 0.25:
        assert 0 < chosen.sum() < chosen.numel()
    want = torch.where(chosen[..., None, None] == 0, *sparse).transpose(1, 2).float()
    torch.testing.assert_close(view.layout.restore(out), want, rtol=1e-4, atol=1e-5)


def test_a_head_that_looks_through_time_is_temporal_and_one_that_looks_around_is_spatial() -> None:
    grid = TokenGrid(8, 8, 8)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.arange(grid.video)
    of_place = torch.randn(64, 32, generator=generator)[tokens % 64]
    of_frame = torch.randn(8, 32, generator=generator)[tokens // 64]
    q = torch.stack([of_place, of_frame], 1)[None] * 4.0
    v = torch.randn(1, grid.video, 2, 32, generator=generator)
    technique = SparseVideoGen(density=0.3)
    routes = technique.route(view_of(technique, grid, q, q, v))
    kept = routes.mask(16)[0]
    frame, part = torch.arange(16) // 2, torch.arange(16) % 2
    temporal = (part[:, None] == part) | (frame == 0)
    assert torch.equal(kept[0], temporal)
    assert (kept[1] == temporal).float().mean() < 0.9
    assert kept[1][frame[:, None] == frame].all()


def test_density_of_both_patterns_is_about_what_is_asked_for() -> None:
    grid = TokenGrid(21, 30, 52)
    for density in (0.1, 0.25, 0.5):
        layout = SparseVideoGen(density=density).layout(grid)
        tokens = layout.counts.double()
        sink = 1 / grid.frames
        for index, count in zip(layout.tables["index"], layout.tables["count"], strict=True):
            valid = torch.arange(index.shape[-1]) < count[:, None]
            share = float(((tokens[index] * valid).sum(-1) * tokens).sum() / grid.video**2)
            assert density - 0.02 <= share <= density + sink + 0.02


def test_rows_are_sampled_over_the_whole_clip() -> None:
    grid = TokenGrid(5, 32, 32, text=30)
    layout = SparseVideoGen().layout(grid)
    rows = layout.slots.reshape(-1)[layout.tables["rows"].numpy()]
    assert list(rows) == [int((i + 0.5) * grid.video / 64) for i in range(64)]
    assert len(SparseVideoGen().layout(TokenGrid(3, 4, 4)).tables["rows"]) == 3
