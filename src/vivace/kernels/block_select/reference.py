"""Block selection by sorting, in plain torch: readable, any device."""

from __future__ import annotations

import torch


def select(
    scores: torch.Tensor,
    top: int,
    mass: float,
    forced: torch.Tensor | None,
    text: int,
    softmax: bool,
    also: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    if scores.dtype == torch.bool:
        keep = scores if forced is None else scores | forced
    else:
        keep = chosen(scores, top, mass, forced, softmax)
    if also is not None:
        keep = keep | also
    b, h, nq, nk = keep.shape
    whole = torch.ones(b, h, nq + text, nk + text, dtype=torch.bool, device=scores.device)
    whole[:, :, :nq, :nk] = keep
    index = torch.argsort((~whole).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    return index, whole.sum(-1, dtype=torch.int32)


def chosen(
    scores: torch.Tensor, top: int, mass: float, forced: torch.Tensor | None = None, softmax: bool = True
) -> torch.Tensor:
    """The selection as a bool mask (B, H, NQ, NK)."""
    able = ~torch.isneginf(scores)
    ranked = scores
    if forced is not None:
        ranked = scores.masked_fill(forced, float("inf"))
        able = able | forced
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    keep = torch.arange(scores.shape[-1], device=scores.device).expand_as(order) < top
    if mass > 0.0:
        weights = torch.softmax(scores, -1).nan_to_num(0.0) if softmax else scores.masked_fill(~able, 0.0)
        sums = weights.gather(-1, order).cumsum(-1)
        # A block is needed while those before it fall short.
        before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
        keep = keep | (before < mass)
    keep = torch.zeros_like(able).scatter_(-1, order, keep) & able
    return keep | forced if forced is not None else keep
