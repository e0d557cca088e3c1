"""The obviously right implementation: dense attention under the mask that the lists describe, in float64."""

from __future__ import annotations

import torch

from vivace.kernels.block_attention.spec import Routes


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`; computes in `dtype` and returns q's dtype."""
    block, keys = routes.block, k.shape[2]
    allowed = routes.mask(keys // block)
    allowed = allowed.repeat_interleave(block, 2).repeat_interleave(block, 3)
    if routes.sizes is not None:
        slot = torch.arange(block, device=k.device)
        allowed = allowed & (slot < routes.sizes[..., None]).flatten(2)[:, :, None]
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None].to(dtype)
    scores = scores.masked_fill(~allowed, float("-inf"))
    # Slots behind a block's keys may hold anything, and 0 * nan is nan.
    values = v.to(dtype).masked_fill(~allowed.any(-2)[..., None], 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return (weights @ values).to(q.dtype), lse.float()
