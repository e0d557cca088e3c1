"""Rotary position embedding (arXiv 2104.09864) as the families apply it to queries and keys."""

from __future__ import annotations

import torch


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels as pairs, computed in fp32, returned in the dtype of `x`.

    Args:
        x: (..., D) with D even.
        cos, sin: broadcastable to `x`, each angle twice in a row.
    """
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
