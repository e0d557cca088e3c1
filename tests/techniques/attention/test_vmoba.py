"""VMoBA against pairs of blocks counted out by hand for every head, in all three partitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.op import runner as attention_by
from vivace.kernels.block_select.op import runner as selection_by
from vivace.techniques.attention.dynamic import View
from vivace.techniques.attention.vmoba import VideoMoba
from vivace.testing.subjects import Subject

GRID = TokenGrid(3, 5, 6, text=20)  # 90 tokens of video in blocks of 16
D, HEADS, BATCH = 8, 2, 2


def noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, GRID.tokens, HEADS, D, generator=generator) for _ in range(3)]


def attend(technique, partition, q, k, v):
    layout = technique.layout(GRID, partition=partition)
    arranged = (layout.arrange(x) for x in (q, k, v))
    view = View(*arranged, layout, D**-0.5, {}, selection_by("reference"), attention_by("reference"))
    out, routes = technique.attention(view, None)
    return layout.restore(out), routes, layout


def partition_by_hand(partition):
    """Tokens of every block: 16 in a row, 16 of the places over all frames, or a box in three dimensions."""
    tokens = np.arange(90).reshape(3, 5, 6)
    if partition < 2:
        order = tokens.reshape(-1) if partition == 0 else tokens.transpose(1, 2, 0).reshape(-1)
        return [order[i : i + 16].tolist() for i in range(0, 90, 16)]
    slots = VideoMoba().layout(GRID, partition=2).slots
    boxes = [row[row >= 0].tolist() for row in slots[:-2]]  # without two blocks of text
    for box in boxes:  # whatever the tile, it is a box
        places = np.stack(np.unravel_index(box, (3, 5, 6)))
        assert len(box) == np.prod(np.ptp(places, 1) + 1)
    return boxes


def by_hand(q, k, v, blocks, threshold):
    """One head (S, D): masked attention and the pairs of blocks that are kept."""
    n = len(blocks)
    worth = {
        (i, j): float(q[a].detach().mean(0) @ k[b].detach().mean(0))
        for i, a in enumerate(blocks)
        for j, b in enumerate(blocks)
    }
    low, high = min(worth.values()), max(worth.values())
    alike = {pair: (w - low) / (high - low) for pair, w in worth.items()}
    kept = {(i, i) for i in range(n)}
    reached, goal = sum(alike[p] for p in kept), threshold * sum(alike.values())
    for pair in sorted(alike.keys() - kept, key=lambda p: -alike[p]):
        if reached >= goal:
            break
        kept.add(pair)
        reached += alike[pair]
    seen = torch.ones(len(q), len(q), dtype=torch.bool)
    seen[:90, :90] = False
    for i, j in kept:
        seen[torch.tensor(blocks[i])[:, None], torch.tensor(blocks[j])] = True
    scores = (q @ k.T * D**-0.5).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ v, int(seen.sum()), kept


@pytest.mark.parametrize("partition", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.05, 0.4])
def test_is_the_method_written_out(partition, threshold):
    q, k, v = noise(partition)
    out, routes, layout = attend(VideoMoba(threshold=threshold), partition, q, k, v)
    blocks, visited = partition_by_hand(partition), 0
    for b in range(BATCH):
        for h in range(HEADS):
            head = (x[b, :, h].double() for x in (q, k, v))
            want, pairs, _ = by_hand(*head, blocks, threshold)
            torch.testing.assert_close(out[b, :, h].double(), want, rtol=1e-4, atol=1e-5)
            visited += pairs
    assert routes.pairs(layout.counts, BATCH, HEADS) == visited


def test_blocks_of_one_head_get_unequal_shares():
    """A block of queries that resembles nothing keeps itself alone; another gets all that is left."""
    q, k, v = noise()
    k = k.abs()
    q[:, :16], q[:, 16:90] = 5.0, -1.0
    _, routes, _ = attend(VideoMoba(threshold=0.4), 0, q, k, v)
    video = routes.count[:, :, :6] - 2  # two blocks of text in every list
    assert (video[:, :, 0] >= 3).all()
    assert (video[:, :, 1:] == 1).all()


def test_one_head_of_equal_scores_keeps_its_own_blocks():
    scores = torch.full((1, 1, 5, 5), 3.0)
    assert torch.equal(VideoMoba().chosen(scores)[0, 0], torch.eye(5, dtype=torch.bool))


def test_layers_take_turns(monkeypatch):
    clip = {"num_frames": 33, "height": 64, "width": 64, "num_inference_steps": 1}
    grid, technique, seen = TokenGrid(9, 4, 4), VideoMoba(dense_steps=0), []
    original = VideoMoba.attention

    def watched(self, view, kept):
        seen.append(view.layout.slots)
        return original(self, view, kept)

    monkeypatch.setattr(VideoMoba, "attention", watched)
    Subject("wan2.1", clip, layers=5).run(technique)
    rows, columns, boxes = (technique.layout(grid, partition=n).slots for n in range(3))
    assert not np.array_equal(rows, columns)
    assert not np.array_equal(columns, boxes)
    for got, wanted in zip(seen, (rows, columns, boxes, rows, columns) * 2, strict=True):  # two branches
        assert np.array_equal(got, wanted)


def test_gradients_flow_through_the_chosen_blocks():
    inputs = [x.double().requires_grad_() for x in noise(3)]
    aim = torch.randn(BATCH, GRID.tokens, HEADS, D, generator=torch.Generator().manual_seed(4)).double()
    out, _, _ = attend(VideoMoba(threshold=0.2), 1, *inputs)
    got = torch.autograd.grad((out * aim).sum(), inputs)
    loss = 0.0
    for b in range(BATCH):
        for h in range(HEADS):
            want, _, _ = by_hand(*(x[b, :, h] for x in inputs), partition_by_hand(1), 0.2)
            loss = loss + (want * aim[b, :, h]).sum()
    for a, b in zip(got, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
