"""k-means and permutations in plain torch: readable, any device. Sums are matrix products, not atomic additions."""

from __future__ import annotations

import torch

MOST = 2**27
"""Scores of tokens and centres that are held at once."""


def cluster(
    x: torch.Tensor, centres: torch.Tensor, iterations: int, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `spec`."""
    b, h, s, _ = x.shape
    k = centres.shape[2]
    centres = centres.float()
    numbers = torch.arange(k, device=x.device)
    step = max(1, MOST // (b * h * k))
    labels = torch.empty(b, h, s, dtype=torch.int32, device=x.device)
    for _ in range(iterations):
        rounded = centres.to(x.dtype).float()
        across, bias = rounded.transpose(-1, -2), rounded.square().sum(-1)[:, :, None] / 2
        sums, counts = torch.zeros_like(centres), torch.zeros_like(centres[..., 0])
        for part in range(0, s, step):
            rows = slice(part, part + step)
            here = x[:, :, rows].float()
            scores = here @ across - bias
            nearest = torch.where(scores.isnan(), float("-inf"), scores).argmax(-1)
            labels[:, :, rows] = nearest.masked_fill(gone[rows], k)
            member = labels[:, :, rows, None] == numbers  # (B, H, R, K)
            # A slot without a token may hold anything, and nothing times infinity is no number.
            sums += member.float().transpose(-1, -2) @ here.masked_fill(gone[rows, None], 0.0)
            counts += member.sum(-2)
        full = (counts > 0.0)[..., None]
        centres = torch.where(full, sums / counts.clamp(min=1.0)[..., None], centres)
    return labels, torch.argsort(labels, dim=-1, stable=True).to(torch.int32), centres


def permute(x: torch.Tensor, order: torch.Tensor, back: bool) -> torch.Tensor:
    """See `take` and `put` of `spec`."""
    moved = order.shape[2]
    index = order.long()[..., None].expand(-1, -1, -1, x.shape[3])
    first = x[:, :, :moved]
    first = torch.empty_like(first).scatter_(2, index, first) if back else first.gather(2, index)
    return torch.cat([first, x[:, :, moved:]], 2)
