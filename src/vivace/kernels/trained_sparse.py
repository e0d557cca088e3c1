"""What trained sparse attention does beside its exact blocks: VSA's coarse branch and SLA's linear one.

Training a student and running it must compute the same, so this is below both (`vivace.techniques.attention.vsa` and
`sla`, `vivace.training.distillation.student_forms`). Plain torch, differentiable but for the choice of blocks.
Shapes: B rows, H heads, N blocks of video, C slots of a block, D head dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.tiles import in_tiles

CUBE = (4, 4, 4)
"""Frames, height and width of VSA's cube of 64 tokens; other block sizes get the tile that suits the clip."""
SKIPPED = 0.1
"""Share of the key blocks that SLA leaves out altogether; the paper's."""
MOST = 2**27
"""Numbers in the (D, D) states of blocks of queries that are held at once."""


def cubes(grid: TokenGrid, block: int) -> np.ndarray:
    """VSA's slots (N, C) of a grid's video."""
    return in_tiles(grid, block, CUBE if block == 64 else None)


def coarse_branch(scores: Tensor, means: Tensor, gate: Tensor | float, block: int) -> Tensor:
    """A gate times attention between block means, the same for all slots of a block (VSA, arXiv 2505.13389).

    Args:
        scores: scaled products of the means of queries and keys, float32 (B, H, N, N).
        means: of the values, float32 (B, H, N, D).
        gate: (H, 1, 1), or one for all.
        block: C.

    Returns:
        (B, H, N * C, D), float32 where the gate is.
    """
    coarse = gate * (torch.softmax(scores, -1) @ means)
    return coarse[:, :, :, None].expand(-1, -1, -1, block, -1).flatten(2, 3)


def middling(scores: Tensor, exact: Tensor, skipped: float) -> Tensor:
    """SLA's pairs of blocks, bool (B, H, N, N), that are neither exact nor among the worst share by their scores."""
    ranked = scores.detach().masked_fill(exact, float("inf"))
    order = torch.sort(ranked, dim=-1, stable=True).indices
    blocks = scores.shape[-1]
    worst = torch.arange(blocks, device=scores.device) < int(skipped * blocks + 1e-9)
    return ~exact & ~torch.zeros_like(exact).expand_as(ranked).scatter(-1, order, worst.expand_as(order))


def linear_branch(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, gone: Tensor) -> Tensor:
    """Linear attention of blocks of queries over the key blocks of a mask (SLA, arXiv 2509.24006).

        f(q) (sum_j f(k_j)^T v_j) / (f(q) . sum_j f(k_j)),   f = softmax over the head's dimensions

    Args:
        q, k, v: (B, H, N, C, D).
        seen: bool (B, H, N, N).
        gone: bool (N, C), slots that hold no token.

    Returns:
        (B, H, N * C, D), zero where a block of queries has no such keys.
    """
    dtype, n = q.dtype, q.shape[2]
    fq, fk = (torch.softmax(x.float(), -1).to(dtype) for x in (q, k))
    fk = fk.masked_fill(gone[:, :, None], 0.0)
    b, h, d = *q.shape[:2], q.shape[-1]
    states = (fk.transpose(-1, -2) @ v).flatten(3)  # (B, H, N, D * D)
    masses = fk.float().sum(3)  # (B, H, N, D)
    step, outs = max(1, MOST // (b * h * d * d)), []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        here = seen[:, :, rows]
        above = fq[:, :, rows] @ (here.to(dtype) @ states).unflatten(-1, (d, d))  # (B, H, R, C, D)
        below = fq[:, :, rows].float() @ (here.float() @ masses)[..., None]
        some = here.any(-1)[..., None, None]
        outs.append((above.float() / torch.where(some, below, 1.0)).to(dtype))
    return torch.cat(outs, 2).flatten(2, 3)
