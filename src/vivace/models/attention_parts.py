"""Parts of attention processors that several families share."""

from __future__ import annotations

from typing import Any

import torch


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of neighbouring channels, in fp32, returned as `x`'s dtype.

    Args:
        x: (..., D) with D even.
        cos, sin: broadcastable to `x`, each angle twice in a row.
    """
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def per_head(attn: Any, mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor | None:
    """A mask or bias over keys, (B, 1 or Q, L), as (B, H, 1 or Q, L); `keys` is (B, L, C)."""
    if mask is None:
        return None
    rows, length = keys.shape[:2]
    return attn.prepare_attention_mask(mask, length, rows).view(rows, attn.heads, -1, length)


def by_token(factors: torch.Tensor) -> torch.Tensor:
    """Rotary factors (S, D), or (B, S, D) where every row has positions of its own, as (1 or B, S, 1, D)."""
    return (factors if factors.ndim == 3 else factors[None])[:, :, None]


def rotary_at(factors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rotary factors of some tokens, chosen for every row by itself.

    Args:
        factors: (S, D), (1, S, 1, D), or (B, S, D) as the families' blocks take them.
        index: (B, K) int64, positions in the sequence.

    Returns:
        (B, K, D) for two or three axes, (B, K, 1, D) for four; the kernel processors of all families take these.
    """
    if factors.ndim == 3:
        return factors.gather(1, index[:, :, None].expand(-1, -1, factors.shape[2]))
    flat = factors.reshape(-1, factors.shape[-1])
    return flat[index] if factors.ndim == 2 else flat[index][:, :, None]
