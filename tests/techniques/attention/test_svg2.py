"""Sparse VideoGen 2 against k-means, sorting and masked attention written by hand in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.op import runner as attention_by
from vivace.kernels.block_select.op import runner as selection_by
from vivace.kernels.cluster_tokens.op import runner as clustering_by
from vivace.techniques.attention.dynamic import View
from vivace.techniques.attention.svg2 import Svg2, Tools
from vivace.testing.subjects import Subject

GRID = TokenGrid(3, 5, 6)  # 90 tokens: five blocks of 16 and one of 10
JOINT = TokenGrid(3, 5, 6, text=20, text_first=True)
D, HEADS, BATCH, SIZE = 8, 2, 2, 16
TOOLS = Tools(selection_by("reference"), clustering_by("reference")())
SMALL = Svg2(clusters_q=3, clusters_k=4, first=4, later=1, mass=0.5, share=0.2)


def attend(technique, grid, q, k, v, memory=None, kept=None):
    """(out (B, S, H, D), routes, view) of a call as the engine makes it."""
    layout = technique.layout(grid)
    arranged = (layout.arrange(x) for x in (q, k, v))
    memory = {} if memory is None else memory
    view = View(*arranged, layout, D**-0.5, memory, TOOLS, attention_by("reference"))
    out, routes = technique.attention(view, kept)
    return layout.restore(out), routes, view


def lively(grid, seed=0):
    """Tokens in clear groups that are scattered over the clip, so that sorting matters."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        groups = 3.0 * torch.randn(4, D, generator=generator)
        label = torch.randint(4, (BATCH, grid.tokens, HEADS), generator=generator)
        out.append(groups[label] + 0.5 * torch.randn(BATCH, grid.tokens, HEADS, D, generator=generator))
    return [*out, torch.randn(BATCH, grid.tokens, HEADS, D, generator=generator)]


def lloyd(x, centres, iterations):
    """Labels and centres of one head's tokens (S, D) in float64."""
    centres = centres.copy()
    for _ in range(iterations):
        label = [min(range(len(centres)), key=lambda c: ((t - centres[c]) ** 2).sum()) for t in x]
        for c in range(len(centres)):
            if members := [t for t, own in zip(x, label, strict=True) if own == c]:
                centres[c] = np.mean(members, 0)
    return label, centres


def by_hand(q, k, v, video, mass, share, numbers, iterations):
    """One head (S, D), text behind the video: dense attention under the mask that SVG2 describes."""
    orders = []
    for x, number in zip((q, k), numbers, strict=True):
        first = x[[i * 80 // number for i in range(number)]]  # 80 tokens stand in full blocks
        label, _ = lloyd(x[:video], first, iterations)
        orders.append(sorted(range(video), key=lambda t, own=label: (own[t], t)))
    cut = [[o[i : i + SIZE] for i in range(0, video, SIZE)] for o in orders]
    seen = np.ones((len(q), len(q)), dtype=bool)
    pairs = 0
    for rows in cut[0]:
        worth = [math.exp(q[rows].mean(0) @ k[b].mean(0) * D**-0.5) * len(b) for b in cut[1]]
        rank = sorted(range(len(worth)), key=lambda j, w=worth: -w[j])
        kept, total = [], 0.0
        for j in rank:
            if total >= mass * sum(worth) and len(kept) >= math.ceil(share * len(worth)):
                break
            kept.append(j)
            total += worth[j]
        for j in set(range(len(worth))) - set(kept):
            seen[np.ix_(rows, cut[1][j])] = False
    pairs = seen.sum()
    scores = np.where(seen, np.exp(q @ k.T * D**-0.5), 0.0)
    return scores @ v / scores.sum(1, keepdims=True), pairs


@pytest.mark.parametrize("grid", [GRID, JOINT], ids=str)
def test_is_the_method_written_out(grid):
    q, k, v = lively(grid)
    out, routes, view = attend(SMALL, grid, q, k, v)
    first = grid.text if grid.text_first else 0
    behind = [*range(first, grid.tokens), *range(first)]  # the video, then text
    visited = 0
    for b in range(BATCH):
        for h in range(HEADS):
            head = (x[b, behind, h].double().numpy() for x in (q, k, v))
            want, pairs = by_hand(*head, grid.video, 0.5, 0.2, (3, 4), 4)
            np.testing.assert_allclose(out[b, behind, h].double().numpy(), want, rtol=1e-4, atol=1e-5)
            visited += pairs
    assert visited < BATCH * HEADS * grid.tokens**2
    assert routes.pairs(view.layout.counts, BATCH, HEADS) == visited
    assert view.beside == 4 * 96 * (3 + 4)  # iterations, slots, centres


def test_the_next_step_starts_from_the_last_centres():
    memory = {}
    q, k, v = lively(GRID)
    attend(SMALL, GRID, q, k, v, memory)
    _, want = lloyd(k[1, :, 0].double().numpy(), k[1, [0, 20, 40, 60], 0].double().numpy(), 4)
    np.testing.assert_allclose(memory["centres_k"][1, 0].numpy(), want, rtol=1e-4, atol=1e-5)
    k2 = k + 0.5 * torch.randn(k.shape, generator=torch.Generator().manual_seed(5))
    _, _, view = attend(SMALL, GRID, q, k2, v, memory)
    _, moved = lloyd(k2[1, :, 0].double().numpy(), want, 1)
    np.testing.assert_allclose(memory["centres_k"][1, 0].numpy(), moved, rtol=1e-4, atol=1e-5)
    assert view.beside == 96 * (3 + 4)


def test_centres_of_another_batch_are_not_used():
    memory = {}
    q, k, v = lively(GRID)
    attend(SMALL, GRID, q, k, v, memory)
    _, _, view = attend(SMALL, GRID, q[:1], k[:1], v[:1], memory)
    assert view.beside == 4 * 96 * (3 + 4)


def test_kept_lists_come_with_their_order():
    """The second call has other tokens, and the order of the first: nothing is clustered again."""
    technique, memory = SMALL.replace(refresh=2), {}
    q, k, v = lively(GRID)
    _, routes, first = attend(technique, GRID, q, k, v, memory)
    order = {n: memory["orders"][n].clone() for n in "qk"}
    q2, k2, v2 = lively(GRID, seed=9)
    out, again, view = attend(technique, GRID, q2, k2, v2, memory, kept=routes)
    assert again is routes
    assert (first.beside, view.beside) == (4 * 96 * 7, 0.0)
    mask = routes.mask(6).repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)  # in sorted slots
    for b in range(BATCH):
        for h in range(HEADS):
            seen = torch.zeros(96, 96, dtype=torch.bool)
            seen[order["q"][b, h][:, None], order["k"][b, h][None]] = mask[b, h]
            scores = (q2[b, :, h] @ k2[b, :, h].T * D**-0.5).masked_fill(~seen[:90, :90], float("-inf"))
            torch.testing.assert_close(
                out[b, :, h], torch.softmax(scores, -1) @ v2[b, :, h], rtol=1e-4, atol=1e-5
            )


def test_all_mass_is_dense_attention():
    q, k, v = lively(JOINT)
    out, _, _ = attend(SMALL.replace(share=1.0), JOINT, q, k, v)
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_sorting_gathers_what_belongs_together():
    """Groups scattered over the clip: with sorting, one block of sixteen tokens holds one group, so less is visited."""
    q, k, v = lively(GRID)
    k[..., :] = torch.where(torch.arange(90)[None, :, None, None] % 2 == 0, q.mean(), -q.mean()) + 0.01 * k
    technique = SMALL.replace(clusters_k=2, first=8)
    _, _, view = attend(technique, GRID, q, k, v)
    even = view.layout.arrange(torch.arange(90.0)[None, :, None, None].expand(BATCH, -1, HEADS, 1) % 2)
    again = View(view.q, view.k, view.v, view.layout, 1.0, {}, TOOLS, attention_by("reference"))
    sorted_even = TOOLS.clustering.take(even, technique.order(again, "k"))[:, :, :90].view(BATCH, HEADS, 90)
    for row in sorted_even.flatten(0, 1):
        assert row.diff().abs().sum() == 1  # one boundary between the two kinds


def test_clusters_are_made_again_at_every_step_of_a_clip():
    clip = {"num_frames": 33, "height": 64, "width": 64, "num_inference_steps": 3}
    subject = Subject("wan2.1", clip)  # 9 x 4 x 4 = 144 tokens in nine blocks of 16
    whole = {"dense_steps": 0, "dense_layers": 0, "share": 1.0, "clusters_q": 4, "clusters_k": 6}
    receipt = subject.run(Svg2(**whole, first=5, later=2)).receipt
    work = 2 * 4 * 2 * 144 * (4 + 6) * (5 + 2 + 2)  # branches, layers, heads, slots, centres, iterations
    assert receipt.counts["attention_pairs"] - subject.exact().receipt.counts["attention_pairs"] == work
