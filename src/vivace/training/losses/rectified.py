"""Straightened trajectories: reflow on a teacher's pairs (arXiv:2209.03003), PeRFlow's windows (arXiv:2405.07510)."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.paths import (
    Velocity,
    distance,
    flow_matching_loss,
    interpolate,
    like,
    solve,
    weighted_mean,
)
from vivace.training.losses.progressive import middle_times


def reflow_pair(teacher: Velocity, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The clip that a teacher makes of noise (B, ...) over a sampler's times (K + 1,), and that noise; float32."""
    return solve(teacher, noise, times), noise.float()


def reflow_loss(
    student: Velocity, clean: Tensor, noise: Tensor, s: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """Flow matching on the line between a teacher's noise and the clip it made of *this* noise (eq. 1), scalar.

    InstaFlow (arXiv:2309.06380) does the same with a guided text-to-image teacher. The pairs are what differs from
    plain flow matching, whose clips and noise are independent.
    """
    return flow_matching_loss(student, clean, noise, s, weight=weight)


def one_step_loss(
    student: Velocity, clean: Tensor, noise: Tensor, *, huber: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """InstaFlow's last stage: the student's single step from noise against the paired clip, scalar.

    With pixels or latents as they are; the paper's perceptual distance belongs to the caller.
    """
    noise = noise.detach().float()
    made = noise - student(noise, torch.ones(len(noise), device=noise.device)).float()
    return weighted_mean(distance(made, clean.detach(), huber), weight)


def window_of(s: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower edge of the window that each time (B,) is in; a time on an edge is in the window below it.

    `edges` ascend from 0 to 1, (K + 1,).

    Raises:
        ConfigError: edges that do not ascend, or do not span 0 to 1.
    """
    edges = edges.float()
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or bool((edges.diff() <= 0).any()):
        raise ConfigError(f"edges must ascend from 0 to 1, not {edges.tolist()}.")
    edges = edges.to(s.device)
    upper = torch.searchsorted(edges, s.float().contiguous()).clamp(1, len(edges) - 1)
    return edges[upper], edges[upper - 1]


@torch.no_grad()
def window_line(
    teacher: Velocity, clean: Tensor, noise: Tensor, s: Tensor, edges: Tensor, *, steps: int = 8
) -> tuple[Tensor, Tensor]:
    """A point at time s on the chord of a teacher's trajectory across s's window, and the chord's velocity.

    The window is entered at its noisy edge with data and noise mixed, so no trajectory from pure noise is needed.

    Args:
        clean, noise: (B, ...). s: times (B,). edges: ascending from 0 to 1.
        steps: of the teacher across one window.

    Returns:
        float32 (B, ...), (B, ...).
    """
    top, bottom = window_of(s, edges)
    start = interpolate(clean, noise, top)
    end = solve(teacher, start, middle_times(top, bottom, steps))
    velocity = (start - end) / like(top - bottom, start)
    return start - like(top - s, start) * velocity, velocity


def perflow_loss(
    student: Velocity,
    teacher: Velocity,
    clean: Tensor,
    noise: Tensor,
    s: Tensor,
    edges: Tensor,
    *,
    steps: int = 8,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """The student's velocity against the straight velocity of s's window, scalar.

    Velocity matching only; the paper's noise and data parametrisations are other spaces for the same error.
    """
    x, velocity = window_line(teacher, clean, noise, s, edges, steps=steps)
    return weighted_mean(distance(student(x, s), velocity, huber), weight)
