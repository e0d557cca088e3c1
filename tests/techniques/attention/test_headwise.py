"""The kernel of a layer whose heads differ, against dense attention under each head's own token mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.kernels.block_attention.op import runner
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.techniques.attention.headwise import HeadwiseAttention, MapBank

TOKENS, BLOCKS, WIDTH = 22, 6, 4
WHICH = (2, 0, 1, 2)


def maps(orders: int) -> list[BlockMap]:
    """Three random maps whose tokens stand in one order, or each in its own; the last block is half empty."""
    random = np.random.default_rng(orders)
    out, order = [], random.permutation(TOKENS)
    for _ in range(3):
        order = random.permutation(TOKENS) if orders > 1 else order
        slots = np.full(BLOCKS * WIDTH, -1, dtype=np.int64)
        slots[:TOKENS] = order
        keep = random.random((1, BLOCKS, BLOCKS)) < 0.4
        out.append(BlockMap(slots.reshape(BLOCKS, WIDTH), keep | np.eye(BLOCKS, dtype=bool)))
    return out


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, TOKENS, len(WHICH), 8, generator=generator, dtype=dtype) for _ in range(3)]


def by_hand(q, k, v, given, added=None):
    """Softmax attention in float64, head by head, one token mask each."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for h, number in enumerate(WHICH):
        allowed = torch.from_numpy(given[number].token_mask()[0])
        scores = q[:, :, h].double() @ k[:, :, h].double().transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        if added is not None:
            scores = scores + added[:, 0].double()
        out[:, :, h] = torch.softmax(scores, -1).nan_to_num(0.0) @ v[:, :, h].double()
    return out


@pytest.mark.parametrize("orders", [1, 3])
@pytest.mark.parametrize("backend", ["gather", "reference"])
def test_every_head_has_its_own_map(orders, backend) -> None:
    given, (q, k, v) = maps(orders), tensors()
    kernel = HeadwiseAttention(MapBank(given), WHICH, runner(backend))
    copies = [x.clone() for x in (q, k, v)]
    torch.testing.assert_close(kernel(q, k, v).double(), by_hand(q, k, v, given), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True))
    # One row of a batch is what it is alone, and strides do not matter.
    alone = kernel(q[1:], k[1:], v[1:])
    torch.testing.assert_close(kernel(q, k, v)[1:], alone)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(kernel(*strided), kernel(q, k, v))


@pytest.mark.parametrize("orders", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "additive", "shared"])
def test_key_masks_come_on_top(orders, kind) -> None:
    given, (q, k, v) = maps(orders), tensors()
    hidden = torch.zeros(2, 1, 1, TOKENS)
    hidden[0, ..., 3:7] = float("-inf")
    hidden[1, ..., 11] = float("-inf")
    mask = {"bool": hidden == 0, "additive": hidden + 0.3 * torch.arange(TOKENS), "shared": hidden[:1] == 0}[
        kind
    ]
    added = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    kernel = HeadwiseAttention(MapBank(given), WHICH, runner("gather"))
    want = by_hand(q, k, v, given, added)
    torch.testing.assert_close(kernel(q, k, v, mask).double(), want, rtol=1e-4, atol=1e-5)


def test_pairs_are_the_masks() -> None:
    given = maps(3)
    kernel = HeadwiseAttention(MapBank(given), WHICH, runner("gather"))
    count = sum(given[n].token_mask().sum() for n in WHICH)
    assert kernel.pairs(3, len(WHICH), TOKENS, TOKENS) == 3 * count


def test_maps_of_other_sizes_are_refused() -> None:
    first, other = maps(1)[0], BlockMap.contiguous(np.ones((1, 2, 2), dtype=bool), 11, TOKENS)
    with pytest.raises(ValueError, match="slots of one shape"):
        MapBank([first, other])
    with pytest.raises(ValueError, match="one head group"):
        MapBank([BlockMap(first.slots, np.ones((2, BLOCKS, BLOCKS), dtype=bool))])


def test_layers_with_other_heads_share_one_compiled_graph() -> None:
    from torch._dynamo.utils import counters

    bank, (q, k, v) = MapBank(maps(3)), tensors()
    layers = [HeadwiseAttention(bank, w, runner("gather")) for w in (WHICH, (0, 0, 0, 1), (1, 2, 0, 0))]

    class Site(torch.nn.Module):
        def forward(self, q, k, v):
            return self.kernel(q, k, v) * 2.0

    torch._dynamo.reset()
    counters.clear()
    for layer in layers:
        site = Site()
        site.kernel = layer
        compiled = torch.compile(site.forward, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(q, k, v), layer(q, k, v) * 2.0)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
