"""AdaSpa's exact shares against the whole map, its division among heads against all divisions, and when it searches."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from views import view_of

from vivace.core.shapes import TokenGrid
from vivace.kernels import block_mass
from vivace.techniques.attention import adaspa
from vivace.techniques.attention.adaspa import AdaSpa, best_for_all, exact_shares
from vivace.testing.subjects import Subject

GRIDS = (
    TokenGrid(4, 8, 8),
    TokenGrid(3, 7, 10),
    TokenGrid(3, 7, 10, text=9),
    TokenGrid(2, 9, 9, text=20, text_first=True),
)


def shares_by_hand(q, k, grid, start, allowed):
    """Shares (N, N) of one head from all its tokens (S, D), in blocks of 16 in order."""
    p = torch.softmax(
        (q.double() @ k.double().T / q.shape[-1] ** 0.5).masked_fill(~allowed, float("-inf")), -1
    )
    video = p[start : start + grid.video, start : start + grid.video]
    columns = torch.stack([c.sum(-1) for c in video.split(16, dim=-1)], -1)
    return torch.stack([rows.mean(0) for rows in columns.split(16)])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("at_once", [300, 10**9])
def test_equals_dense_attention_under_the_best_blocks(grid, at_once, monkeypatch) -> None:
    monkeypatch.setitem(block_mass.AT_ONCE, "cpu", at_once)
    technique = AdaSpa(sparsity=0.7)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, grid.tokens, 3, 8, generator=generator) for _ in range(3))
    q = q * torch.tensor([0.3, 2.0, 5.0])[:, None]
    start, allowed = grid.text if grid.text_first else 0, torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    if grid.text:
        allowed[1, ..., 2 if grid.text_first else grid.tokens - 2] = False
    view = view_of(technique, grid, q, k, v, allowed)
    out, routes = technique.attention(view, None)
    kept = routes.mask(view.layout.blocks)
    n = view.video

    block_of = torch.arange(grid.video) // 16
    seen = allowed.repeat(1, 3, grid.tokens, 1)
    video = slice(start, start + grid.video)
    for b in range(2):
        shares = [shares_by_hand(q[b, :, h], k[b, :, h], grid, start, allowed[b, 0, 0]) for h in range(3)]
        torch.testing.assert_close(exact_shares(view)[b].double(), torch.stack(shares), rtol=1e-5, atol=1e-6)
        counts = kept[b, :, :n, :n].sum(-1)
        assert (counts == counts[:, :1]).all()
        assert int(counts[:, 0].sum()) == -(-3 * 3 * n // 10)
        assert len(set(counts[:, 0].tolist())) > 1
        for h in range(3):
            for i, row in enumerate(shares[h]):
                best = set(row.argsort(descending=True)[: counts[h, 0]].tolist())
                assert set(kept[b, h, i, :n].nonzero()[:, 0].tolist()) == best
            seen[b, h, video, video] &= kept[b, h, :n, :n][block_of][:, block_of]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(
        1, 2
    )
    torch.testing.assert_close(view.layout.restore(out), want, rtol=1e-4, atol=1e-5)


def recall(shares, weight, counts):
    """Mean over heads and queries of the probability in the best blocks, so many for each head."""
    return sum(
        float((h.sort(-1, descending=True).values[:, :c].sum(-1) * weight).sum())
        for h, c in zip(shares, counts, strict=True)
    ) / len(shares)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_division_among_heads_recovers_more(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = torch.tensor([0.5, 2.0, 6.0])[:, None, None]
    shares = torch.softmax(torch.randn(3, 5, 5, generator=generator) * heads, -1) * 0.9
    tokens = torch.tensor([16, 16, 16, 16, 4])
    weight = tokens / tokens.sum()
    divisions = list(itertools.product(range(1, 6), repeat=3))
    for budget in (3, 5, 8, 12):
        counts = best_for_all(shares[None], tokens, budget / 15, 0.0)[0].sum(-1)[:, 0].tolist()
        assert sum(counts) == budget or min(counts) == 1
        best = max(recall(shares, weight, c) for c in divisions if sum(c) <= budget)
        assert recall(shares, weight, counts) >= best - 1e-6

    # A tenth of the probability falls on text, which is always there.
    for mass in (0.3, 0.7, 0.95):
        counts = best_for_all(shares[None], tokens, 0.0, mass)[0].sum(-1)[:, 0].tolist()
        assert recall(shares, weight, counts) + 0.1 >= mass
        if min(counts) > 1:
            assert sum(counts) == min(sum(c) for c in divisions if recall(shares, weight, c) + 0.1 >= mass)


def test_samples_divide_for_themselves() -> None:
    generator = torch.Generator().manual_seed(5)
    shares = torch.softmax(torch.randn(3, 2, 6, 6, generator=generator) * 3.0, -1)
    tokens = torch.full((6,), 16)
    together = best_for_all(shares, tokens, 0.3, 0.5)
    for b in range(3):
        assert torch.equal(together[b], best_for_all(shares[b : b + 1], tokens, 0.3, 0.5)[0])


def test_searches_after_the_dense_steps_and_then_every_refresh(monkeypatch) -> None:
    searched = []
    original = exact_shares
    monkeypatch.setattr(adaspa, "exact_shares", lambda view: searched.append(None) or original(view))
    subject = Subject("wan2.1", {"num_inference_steps": 6, "num_frames": 17, "height": 64, "width": 64})
    technique = AdaSpa(dense_steps=1, refresh=3, sparsity=0.6)
    seen = []
    with subject.open(technique, on_step=lambda clock, record: seen.append(len(searched))) as session:
        subject.generate(session)
    # Four layers and two branches search at steps 1 and 4.
    assert seen == [0, 8, 8, 8, 16, 16]
