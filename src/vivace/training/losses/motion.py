"""What moves in a clip: weights by position and by sample, and differences between frames as a loss.

Distilled students lose motion before they lose detail. The weights make any objective here look more at what moves;
the loss compares how frames change instead of how they look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.paths import distance, weighted_mean


def frame_differences(x: Tensor, stride: int = 1) -> Tensor:
    """Differences of frames `stride` apart of a clip or its latents (B, C, T, H, W): (B, C, T - stride, H, W).

    Raises:
        ConfigError: the clip is too short for the stride, or has other axes.
    """
    if x.ndim != 5 or not 1 <= stride < x.shape[2]:
        raise ConfigError(
            f"differences of frames {stride} apart need (B, C, T, H, W) with more than {stride} frames, "
            f"not {tuple(x.shape)}; take a smaller stride or a longer clip."
        )
    return x[:, :, stride:].float() - x[:, :, :-stride].float()


def _amount(x: Tensor) -> Tensor:
    """How much every position changes to its frames before and after, (B, 1, T, H, W), float32."""
    if x.shape[2] == 1:
        return torch.zeros_like(x[:, :1], dtype=torch.float32)
    change = frame_differences(x).abs().mean(1, keepdim=True)
    # A frame inside is as restless as the mean of its two neighbours; at the ends there is one neighbour.
    before, after = torch.cat([change[:, :, :1], change], 2), torch.cat([change, change[:, :, -1:]], 2)
    return 0.5 * (before + after)


@torch.no_grad()
def motion_weights(x: Tensor, *, strength: float = 1.0) -> Tensor:
    """Weights per position of clips or latents (B, C, T, H, W), float32 (B, 1, T, H, W) with mean 1 in every sample.

    `1 + strength * change / mean change`, over its mean: still ground keeps `1 / (1 + strength)`, so that no position
    is without a teacher. A clip in which nothing moves, or of one frame, has weight 1 everywhere.

    Raises:
        ConfigError: a negative strength.
    """
    if strength < 0:
        raise ConfigError(f"the strength of motion weights must not be negative, not {strength}.")
    change = _amount(x)
    mean = change.mean((1, 2, 3, 4), keepdim=True)
    relative = torch.where(mean > 0, change / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
    return (1.0 + strength * relative) / (1.0 + strength)


@torch.no_grad()
def motion_emphasis(x: Tensor, *, strength: float = 1.0, floor: float = 0.1) -> Tensor:
    """Weights per sample of a batch (B, C, T, H, W), float32 (B, 1, 1, 1, 1) with mean 1: more where more moves.

    A sample's mean change over that of the batch, never below `floor`, to the power of `strength`. The mean is over
    this batch: with one sample the weight is 1.
    """
    amount = _amount(x).mean((1, 2, 3, 4), keepdim=True)
    relative = amount / amount.mean().clamp_min(torch.finfo(amount.dtype).tiny)
    raised = relative.clamp_min(floor) ** strength
    return raised / raised.mean()


def temporal_difference_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    stride: int = 1,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """How far the changes between frames of a prediction are from those of a target, both (B, C, T, H, W); scalar.

    In the spirit of the motion consistency model (arXiv:2406.06890), which applies its consistency loss to a motion
    representation so that appearance may come from elsewhere. It differs: MCM learns that representation or takes
    others beside raw differences, and uses it *instead of* the consistency loss; this is a term to be added to one.
    Any offset that all frames share costs nothing here.

    Args:
        stride: frames between the two that are compared.
        huber: pseudo-Huber constant; 0 for squares.
        weight: broadcasts to the differences (B, C, T - stride, H, W).

    Raises:
        ConfigError: fewer frames than the stride needs.
    """
    change = frame_differences(prediction, stride)
    return weighted_mean(distance(change, frame_differences(target.detach(), stride), huber), weight)
