"""PISA against sums over single tokens in float64, and against dense attention where its expansion is exact."""

from __future__ import annotations

import math

import pytest
import torch
from views import view_of

from vivace.core.shapes import TokenGrid
from vivace.techniques.attention.pisa import Pisa
from vivace.testing.subjects import Subject

GRID = TokenGrid(3, 5, 6)  # 90 tokens: five blocks of 16 and one of 10
JOINT = TokenGrid(3, 5, 6, text=20)
D, HEADS, BATCH = 8, 2, 2


def attend(technique, grid, q, k, v):
    view = view_of(technique, grid, q, k, v)
    out, routes = technique.attention(view, None)
    return view.layout.restore(out), routes, view


def noise(grid, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(BATCH, grid.tokens, HEADS, D, generator=generator) for _ in range(3)]


def dense(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, -1) @ v).transpose(1, 2)


def by_hand(q, k, v, grid, share, order):
    """One head (S, D): every query on its own, every key of an unselected block through its expansion."""
    video, size, scale = grid.video, 16, D**-0.5
    blocks = [range(i, min(i + size, video)) for i in range(0, video, size)]
    mean = [(x[list(b)].mean(0)) for x in (q, k) for b in blocks]
    of_q, of_k = mean[: len(blocks)], mean[len(blocks) :]
    number = math.ceil(share * len(blocks))
    out = torch.zeros_like(v)
    for i, queries in enumerate(blocks):
        worth = [float(of_q[i] @ m) for m in of_k]
        chosen = sorted(range(len(blocks)), key=lambda j: -worth[j])[:number]
        exact = [t for j in chosen for t in blocks[j]] + list(range(video, grid.tokens))
        left = [j for j in range(len(blocks)) if j not in chosen]
        shares = {j: len(blocks[j]) * math.exp(scale * worth[j]) for j in left}
        for t in queries:
            top, bottom = torch.zeros(D).double(), 0.0
            for u in exact:
                weight = math.exp(scale * float(q[t] @ k[u]))
                top, bottom = top + weight * v[u], bottom + weight
            matrix, mass = torch.zeros(D, D).double(), 0.0
            for j in left:
                weight = len(blocks[j]) * math.exp(scale * float(q[t] @ of_k[j]))
                members, values = k[list(blocks[j])], v[list(blocks[j])]
                top, mass = top + weight * values.mean(0), mass + weight
                covariance = sum(
                    torch.outer(a - of_k[j], b - values.mean(0)) for a, b in zip(members, values, strict=True)
                )
                matrix = matrix + shares[j] / sum(shares.values()) * covariance / len(blocks[j])
            if order:
                top = top + mass * scale * (q[t] @ matrix)
            out[t] = top / (bottom + mass)
    if grid.text:
        weights = torch.softmax(q[video:] @ k.T * scale, -1)
        out[video:] = weights @ v
    return out


@pytest.mark.parametrize("grid", [GRID, JOINT], ids=str)
@pytest.mark.parametrize("order", [0, 1])
def test_is_the_expansion_written_out(grid, order):
    technique = Pisa(share=0.3, order=order)
    q, k, v = noise(grid)
    out, _, _ = attend(technique, grid, q, k, v)
    for b in range(BATCH):
        for h in range(HEADS):
            want = by_hand(*(x[b, :, h].double() for x in (q, k, v)), grid, 0.3, order)
            torch.testing.assert_close(out[b, :, h].double(), want, rtol=1e-4, atol=1e-5)


def test_a_few_queries_at_a_time_change_nothing(monkeypatch):
    q, k, v = noise(GRID)
    whole, _, _ = attend(Pisa(share=0.3), GRID, q, k, v)
    monkeypatch.setattr("vivace.techniques.attention.pisa.MOST", 2 * BATCH * HEADS * 16 * 6)
    parts, _, _ = attend(Pisa(share=0.3), GRID, q, k, v)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_blocks_of_equal_keys_are_exact():
    """Their mean is every key, so nothing is lost: also with one exact block only."""
    q, k, v = noise(GRID)
    k = torch.cat([x[:, :1].expand_as(x) for x in k.split(16, 1)], 1)
    out, routes, _ = attend(Pisa(share=0.01), GRID, q, k, v)
    assert routes.count.unique().tolist() == [1]
    torch.testing.assert_close(out.double(), dense(q, k, v), rtol=1e-4, atol=1e-5)


def test_errors_fall_with_the_square_of_the_spread_of_keys():
    """Queries of a block are equal, so that they share their matrix by right; what is left is of second order."""
    errors = {}
    for order in (0, 1):
        for spread in (0.1, 0.01):
            q, k, v = noise(GRID, seed=1)
            centres = torch.cat([x[:, :1].expand_as(x) for x in k.split(16, 1)], 1)
            q = torch.cat([x[:, :1].expand_as(x) for x in q.split(16, 1)], 1)
            k = centres + spread * k
            out, _, _ = attend(Pisa(share=0.01, order=order), GRID, *(x.double() for x in (q, k, v)))
            errors[order, spread] = float((out - dense(q, k, v)).norm())
    assert errors[0, 0.1] / errors[0, 0.01] == pytest.approx(10.0, rel=0.3)
    assert errors[1, 0.1] / errors[1, 0.01] == pytest.approx(100.0, rel=0.3)
    assert errors[1, 0.1] < 0.2 * errors[0, 0.1]


def test_all_blocks_exact_is_dense_attention():
    q, k, v = noise(JOINT)
    out, _, _ = attend(Pisa(share=1.0), JOINT, q, k, v)
    torch.testing.assert_close(out.double(), dense(q, k, v), rtol=1e-4, atol=1e-5)


def test_samples_do_not_see_each_other():
    q, k, v = noise(GRID)
    both, _, _ = attend(Pisa(share=0.3), GRID, q, k, v)
    alone, _, _ = attend(Pisa(share=0.3), GRID, q[1:], k[1:], v[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)


def test_work_on_means_is_counted():
    clip = {"num_frames": 33, "height": 128, "width": 128, "num_inference_steps": 2}
    subject = Subject("wan2.1", clip)  # 9 x 8 x 8 = 576 tokens: 18 blocks of 32; heads 2, dimension 12
    visited = [
        subject.run(Pisa(dense_steps=0, share=0.1, order=order)).receipt.counts["attention_pairs"]
        for order in (0, 1)
    ]
    dense_pairs = subject.exact().receipt.counts["attention_pairs"]
    calls = 2 * 2 * 4 * 2  # steps, branches, layers, heads
    cross = dense_pairs - calls * 576**2
    means = 576 * 18
    assert visited[0] - cross == pytest.approx(calls * (576 * 2 * 32 + means))
    assert visited[1] - visited[0] == pytest.approx(calls * (576 + 18**2 + 576) * 12 / 2)
