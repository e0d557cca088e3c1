"""How much of the attention of a block of queries falls on each block of keys, without the whole map in memory.

    block_mass(q, k, real, bias, queries, keys, scale) -> (B, H, queries, keys) float32

Rows of q are real queries or stand-ins for several of them, in `queries` equal groups; likewise the columns k. The
softmax runs over all columns; its probabilities are summed over each group of columns and averaged over the real rows
of each group of rows, so a row of the result sums to one.

One custom operation of torch (`vivace::block_mass`) with a fake implementation: its loop over pieces of the map, whose
number depends on the clip, is no part of a compiled graph. Not differentiable: it serves selection alone.
"""

from __future__ import annotations

import torch

T = torch.Tensor

AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Entries of the map that are in memory at once, float32, and two or three times over."""


@torch.library.custom_op("vivace::block_mass", mutates_args=())
def _op(q: T, k: T, real: T, bias: T | None, queries: int, keys: int, scale: float) -> T:
    b, h, rows, _ = q.shape
    columns, group = k.shape[2], rows // queries
    at_once = AT_ONCE.get(q.device.type, AT_ONCE["cpu"])
    out = torch.empty(b, h, queries, keys, dtype=torch.float32, device=q.device)
    weight = real.to(torch.float32).view(queries, group)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
    # Whole groups of rows at a time, and of few heads where one group of all of them is too much.
    heads = max(1, min(h, at_once // max(1, group * columns)))
    step = max(1, at_once // (heads * group * columns))
    for i in range(b):
        for j in range(0, h, heads):
            kt = k[i, j : j + heads].transpose(-1, -2)
            for n in range(0, queries, step):
                piece = q[i, j : j + heads, n * group : (n + step) * group]
                scores = (piece @ kt).float() * scale
                if bias is not None:
                    scores += bias[i]
                p = torch.softmax(scores, -1).unflatten(-1, (keys, -1)).sum(-1)
                p = p.unflatten(1, (-1, group)) * weight[n : n + step, :, None]
                out[i, j : j + heads, n : n + step] = p.sum(2)
    return out


@_op.register_fake
def _(q: T, k: T, real: T, bias: T | None, queries: int, keys: int, scale: float) -> T:
    return q.new_empty((*q.shape[:2], queries, keys), dtype=torch.float32)


def block_mass(q: T, k: T, real: T, bias: T | None, queries: int, keys: int, scale: float) -> T:
    """See the module.

    Args:
        q: (B, H, queries * r, D).
        k: (B, H, keys * c, D).
        real: bool (queries * r,), rows that count.
        bias: float32 (B, keys * c) added to the scores of a column, -inf where it is padding; None for nothing.
        queries: groups of rows.
        keys: groups of columns.
        scale: of scores.
    """
    return _op(q.detach(), k.detach(), real, bias, queries, keys, scale)
