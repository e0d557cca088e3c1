"""XAttention against its antidiagonals summed one by one, and the pieces of the map against the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from views import view_of

from vivace import Plan
from vivace.core.shapes import TokenGrid
from vivace.kernels import block_mass as pieces
from vivace.kernels.block_mass import block_mass
from vivace.techniques.attention.xattention import XAttention, antidiagonal_mass
from vivace.testing.subjects import Subject

GRIDS = (
    TokenGrid(4, 8, 8),
    TokenGrid(3, 7, 10),
    TokenGrid(3, 7, 10, text=9),
    TokenGrid(2, 9, 9, text=20, text_first=True),
)


def tokens(grid, seed=0, batch=2, heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, grid.tokens, heads, dim, generator=generator) for _ in range(3)]


def shares_by_hand(q, k, block, stride):
    """Shares of key blocks for one head, from its video tokens (S, D) in order."""
    q, k = q.double(), k.double()
    squares = -(-len(q) // stride)
    sums = torch.full((squares, squares), 0.0, dtype=torch.float64)
    for i in range(squares):
        for j in range(squares):
            for a in range(stride):
                row, column = i * stride + a, j * stride + stride - 1 - a
                if row < len(q) and column < len(k):
                    sums[i, j] += q[row] @ k[column]
    p = torch.softmax(sums / (q.shape[-1] ** 0.5 * stride), -1)
    return torch.stack(
        [
            torch.stack([rows[:, c].sum(-1).mean() for c in torch.arange(squares).split(block // stride)])
            for rows in p.split(block // stride)
        ]
    )


def up_to(shares, mass):
    """The best blocks of every row until their shares reach the mass."""
    keep = torch.zeros(shares.shape, dtype=torch.bool)
    for row, kept in zip(shares, keep, strict=True):
        total = 0.0
        for block in sorted(range(len(row)), key=lambda j: -row[j]):
            if total >= mass:
                break
            kept[block] = True
            total += float(row[block])
    return keep


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_keeps_blocks_by_their_antidiagonals(grid, stride) -> None:
    technique = XAttention(dense_steps=0, stride=stride, mass=0.6)
    q, k, v = tokens(grid)
    q, k = q * 2.0, k * 2.0
    view = view_of(technique, grid, q, k, v)
    out, routes = technique.attention(view, None)
    kept = routes.mask(view.layout.blocks)
    n, start = view.video, grid.text if grid.text_first else 0
    for b in range(2):
        for h in range(2):
            video = slice(start, start + grid.video)
            shares = shares_by_hand(q[b, video, h], k[b, video, h], view.layout.block, stride)
            assert torch.equal(kept[b, h, :n, :n], up_to(shares, 0.6))
    assert kept[:, :, n:].all()
    assert kept[:, :, :, n:].all()
    assert not kept.all()

    block_of = torch.empty(grid.tokens, dtype=torch.long)
    where = torch.from_numpy(view.layout.slots)
    for block, slots in enumerate(where):
        block_of[slots[slots >= 0]] = block
    seen = kept[:, :, block_of][..., block_of]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(
        1, 2
    )
    torch.testing.assert_close(view.layout.restore(out), want, rtol=1e-4, atol=1e-5)


def test_a_slanted_line_is_found() -> None:
    """Query t looks at key t + 33 alone: the line crosses one antidiagonal of every square that it passes."""
    grid = TokenGrid(4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    code = F.normalize(torch.randn(grid.video, 64, generator=generator), dim=-1) * 30.0
    q, k = code.roll(-33, 0)[None, :, None], code[None, :, None]
    technique = XAttention(dense_steps=0, stride=4)
    view = view_of(technique, grid, q, k, k)
    best = antidiagonal_mass(view, 4)[0, 0].argmax(-1)
    assert view.layout.block == 16
    assert torch.equal(best, (torch.arange(16) + 2) % 16)


@pytest.mark.parametrize("at_once", [1, 100, 5000, 10**9])
def test_pieces_of_the_map_make_the_whole(at_once, monkeypatch) -> None:
    monkeypatch.setitem(pieces.AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 3, 20, 8, generator=generator), torch.randn(2, 3, 18, 8, generator=generator)
    real = torch.arange(20) < 17
    bias = torch.randn(2, 18, generator=generator)
    bias[:, 16:] = float("-inf")
    got = block_mass(q, k, real, bias, 5, 6, 0.3)
    p = torch.softmax((q.double() @ k.double().transpose(-1, -2)) * 0.3 + bias[:, None, None], -1)
    columns = torch.stack([c.sum(-1) for c in p.split(3, dim=-1)], -1)
    want = torch.stack(
        [columns[:, :, i * 4 : min(i * 4 + 4, 17)].mean(2) for i in range(5)],
        2,
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 5))


def test_pieces_are_one_operation() -> None:
    q = torch.randn(1, 2, 8, 4)
    arguments = (q, q, torch.ones(8, dtype=torch.bool), None, 2, 4, 0.5)
    torch.library.opcheck(torch.ops.vivace.block_mass.default, arguments)


def test_a_plan_of_few_steps_hears_of_the_dense_start() -> None:
    subject = Subject("wan2.1", {"num_inference_steps": 4, "num_frames": 17, "height": 64, "width": 64})
    problems = Plan([XAttention()]).problems(subject.model)
    assert any("5 warm-up steps of 4" in str(p) for p in problems)
    run = subject.run(XAttention(dense_steps=3, mass=0.3))
    assert [bool(s.branches[0].by) for s in run.receipt.steps] == [False, False, False, True]
