"""Blocks and means step by step, in plain torch: readable, any device."""

from __future__ import annotations

import torch

T = torch.Tensor


def arrange(x: T, slots: T, back: T, counts: T, copy: bool, pool: bool, alike: bool) -> tuple[T, T, T]:
    """See `spec`."""
    b, _, h, d = x.shape
    n, c = slots.shape
    flat = slots.reshape(-1)
    blocks = x.transpose(1, 2).index_select(2, flat.clamp(min=0))
    if len(flat) > len(back):  # there is padding
        blocks = blocks.masked_fill(flat[:, None] < 0, 0.0)
    # What is not wanted comes back empty, each a tensor of its own as custom operations need it.
    mean, cosine = (torch.empty(0, device=x.device) for _ in range(2))
    if pool:
        mean = _means(blocks.view(b, h, n, c, d), counts)
    if alike:
        unit = torch.nn.functional.normalize(blocks.view(b, h, n, c, d).float(), dim=-1)
        # The mean over pairs of x.y is the square of the mean's length.
        cosine = _means(unit, counts).square().sum(-1)
    return (blocks if copy else x.new_empty(0)), mean, cosine


def _means(blocks: T, counts: T) -> T:
    """(B, H, N, C, D), zero in the padding, to float32 (B, H, N, D)."""
    wide = blocks if blocks.dtype == torch.float64 else blocks.float()
    return (wide.sum(3) / counts[:, None].clamp(min=1)).float()


def restore(blocks: T | None, mean: T | None, slots: T, back: T, counts: T, dtype: torch.dtype) -> T:
    """See `spec`."""
    out = None
    if blocks is not None:
        out = blocks.transpose(1, 2).index_select(1, back)
    if mean is not None:
        share = mean / counts[:, None].clamp(min=1)
        spread = share.transpose(1, 2).index_select(1, back // slots.shape[1])
        out = spread if out is None else out + spread
    assert out is not None
    return out.to(dtype)
