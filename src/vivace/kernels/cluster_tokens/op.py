"""k-means of tokens, for every sample and head on its own: `vivace::cluster_tokens`, one custom operation of torch.

Deterministic: it starts from given centres, and sums are matrix products, not atomic additions. No synchronisation.
"""

from __future__ import annotations

import torch

T = torch.Tensor

MOST = 2**27
"""Scores of tokens and centres that are held at once."""


def start(x: T, clusters: int, real: int) -> T:
    """First centres (B, H, K, D) float32: evenly spaced ones of the first `real` tokens of x (B, H, S, D)."""
    return x[:, :, torch.arange(clusters, device=x.device) * real // clusters].float()


def cluster(x: T, centres: T, iterations: int, gone: T) -> tuple[T, T]:
    """Lloyd's iterations.

    Args:
        x: tokens (B, H, S, D).
        centres: (B, H, K, D) float32, where to start.
        iterations: at least one; each assigns every token to its nearest centre, and moves centres to the means.
        gone: bool (S,), slots that hold no token.

    Returns:
        labels int64 (B, H, S) of the last assignment, K where there is no token; centres float32 after it. A centre
        without tokens stays where it is.

    Raises:
        ValueError: no iterations.
    """
    if iterations < 1:
        raise ValueError(f"k-means needs at least one iteration, not {iterations}.")
    return _op(x, centres, iterations, gone)


@torch.library.custom_op("vivace::cluster_tokens", mutates_args=())
def _op(x: T, centres: T, iterations: int, gone: T) -> tuple[T, T]:
    b, h, s, _ = x.shape
    k = centres.shape[2]
    numbers = torch.arange(k, device=x.device)
    step = max(1, MOST // (b * h * k))
    labels = torch.empty(b, h, s, dtype=torch.long, device=x.device)
    for _ in range(iterations):
        # The nearest centre c has the largest x.c - |c|^2 / 2.
        across, bias = centres.to(x.dtype).transpose(-1, -2), centres.square().sum(-1)[:, :, None] / 2
        sums, counts = torch.zeros_like(centres), torch.zeros_like(centres[..., 0])
        for part in range(0, s, step):
            rows = slice(part, part + step)
            here = x[:, :, rows]
            nearest = ((here @ across).float() - bias).argmax(-1)
            labels[:, :, rows] = nearest.masked_fill(gone[rows], k)
            member = (labels[:, :, rows, None] == numbers).to(x.dtype)  # (B, H, R, K)
            sums += (member.transpose(-1, -2) @ here).float()
            counts += member.sum(-2, dtype=torch.float32)
        full = (counts > 0.0)[..., None]
        centres = torch.where(full, sums / counts.clamp(min=1.0)[..., None], centres)
    return labels, centres


@_op.register_fake
def _(x: T, centres: T, iterations: int, gone: T) -> tuple[T, T]:
    return x.new_empty(x.shape[:3], dtype=torch.long), centres.new_empty(centres.shape)
