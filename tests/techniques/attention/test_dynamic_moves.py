"""The engine's fused pass (tokens into blocks, with means) against moving and pooling apart, for dynamic methods."""

from __future__ import annotations

import pytest
import torch

from vivace.core.shapes import TokenGrid
from vivace.kernels.arrange_blocks.op import mover
from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_select.op import select_blocks
from vivace.techniques.attention.adaspa import AdaSpa
from vivace.techniques.attention.chipmunk import Chipmunk
from vivace.techniques.attention.draft_attention import DraftAttention, largest
from vivace.techniques.attention.dynamic import SparseSite, View
from vivace.techniques.attention.jenga import Jenga
from vivace.techniques.attention.pisa import Pisa
from vivace.techniques.attention.sparge import SpargeAttention
from vivace.techniques.attention.svg2 import Svg2
from vivace.techniques.attention.vmoba import VideoMoba
from vivace.techniques.attention.vsa import VideoSparseAttention
from vivace.techniques.attention.xattention import XAttention
from vivace.testing.interpreter import interpret

GRIDS = (TokenGrid(3, 7, 9), TokenGrid(3, 6, 7, text=19, text_first=True))
HEADS, D, BATCH = 2, 8, 1


def call(technique, grid, fused: bool, inputs, mask=None):
    """(output (B, S, H, D), routes, view) by one way of moving tokens."""
    layout = technique.layout(grid)
    if fused:
        layout._mover = mover("triton")
    q, k, v = inputs
    view = View.of(
        q,
        k,
        v,
        layout,
        technique.alike,
        scale=D**-0.5,
        memory={},
        select=select_blocks,
        attend=block_attention,
        bias=layout.key_bias(mask, BATCH),
    )
    out, routes = technique.attention(view, None)
    return layout.restore(out), routes, view


def noise(grid, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, grid.tokens, HEADS, D, generator=make) for _ in range(3)]


METHODS = (
    AdaSpa(),
    DraftAttention(sparsity=0.6),
    Jenga(drop=0.8),
    Jenga(drop=0.8, neighbours=False, mass=0.6),
    Pisa(),
    SpargeAttention(mass=0.5, similar=0.03),
    SpargeAttention(share=0.3, similar=-1.0),
    VideoMoba(),
    VideoSparseAttention(top=3, gate=0.3),
    XAttention(),
)


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("technique", METHODS, ids=lambda t: f"{t.card.name}")
def test_lists_and_outputs_are_the_same(technique, grid) -> None:
    inputs = noise(grid)
    want, lists, _ = call(technique, grid, False, inputs)
    got, routes, view = call(technique, grid, True, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    blocks = view.layout.blocks
    assert torch.equal(routes.mask(blocks), lists.mask(blocks))


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
def test_gradients_are_the_same() -> None:
    """Through the blocks and, by the coarse branch, through the means."""
    grid, found = GRIDS[1], []
    aim = torch.randn(BATCH, grid.tokens, HEADS, D, generator=torch.Generator().manual_seed(1))
    for fused in (False, True):
        inputs = [x.requires_grad_() for x in noise(grid)]
        out, _, _ = call(VideoSparseAttention(top=3, gate=0.3), grid, fused, inputs)
        found.append(torch.autograd.grad((out * aim).sum(), inputs))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0.0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
@pytest.mark.parametrize(
    "technique",
    [Chipmunk(columns=0.2), Svg2(share=0.3, mass=0.1, first=2), METHODS[6]],
    ids=lambda t: t.card.name,
)
def test_pairs_are_counted_alike(technique) -> None:
    """The fused pass brings its own count of pairs, as on a GPU; what a call leaves for the next must be fit for it."""
    grid, pairs = GRIDS[0], []
    for fused in (False, True):
        site = SparseSite(technique, None)
        site.layout = layout = technique.layout(grid)
        if fused:
            layout._mover = mover("triton")
        site.select, site.attend = technique.selector(device="cpu").run, block_attention
        found = []
        for seed in (0, 1):  # a call that chooses, and one that has what the first left
            site(*noise(grid, seed))
            found.append(float(site.pairs(BATCH, HEADS, grid.tokens, grid.tokens)))
            site.kept = site.last if technique.refresh > 1 else None
        pairs.append(found)
    assert pairs[0] == pairs[1]
    assert pairs[0][1] < BATCH * HEADS * grid.tokens**2


def test_a_map_keeps_its_share_among_equal_entries() -> None:
    """A flat map keeps the first entries, not all of them, and every row its best."""
    flat = torch.zeros(1, 2, 4, 5)
    keep = largest(flat, 0.3)
    assert keep[0, 0].flatten().nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 15]
    steps = torch.arange(20.0).view(1, 1, 4, 5)
    assert largest(steps, 0.25)[0, 0].flatten().nonzero()[:, 0].tolist() == [4, 9, 14, 15, 16, 17, 18, 19]
