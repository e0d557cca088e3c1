"""Progressive distillation (arXiv:2202.00512) and guidance distillation (arXiv:2210.03142) on straight paths."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.paths import (
    Velocity,
    distance,
    guided_velocity,
    like,
    solve,
    weighted_mean,
)


def middle_times(s: Tensor, r: Tensor, count: int) -> Tensor:
    """`count` + 1 times (count + 1, B), evenly spaced from s (B,) to r (B,)."""
    share = torch.linspace(0.0, 1.0, count + 1, device=s.device).view(-1, 1)
    return s.float() + share * (r.float() - s.float())


@torch.no_grad()
def progressive_target(
    teacher: Velocity, x: Tensor, s: Tensor, r: Tensor, *, middle: Tensor | None = None, steps: int = 2
) -> Tensor:
    """The velocity whose one Euler step from s to r lands where a teacher's steps land, float32 (B, ...).

    Algorithm 2 of the paper solves DDIM for the data estimate. On straight paths that is the mean of the
    teacher's velocities over its steps, `(x - x_r) / (s - r)`.

    Args:
        middle: the time (B,) between two steps, where a sampler's times are not evenly spaced; halfway otherwise.
        steps: of the teacher, 2 in the paper; `middle` must then be left out if it is not 2.

    Raises:
        ConfigError: a middle time for other than two steps.
    """
    if middle is not None and steps != 2:
        raise ConfigError(f"one middle time is for two teacher steps, not for {steps}; leave it out.")
    times = middle_times(s, r, steps) if middle is None else torch.stack([s, middle, r]).float()
    return (x.float() - solve(teacher, x, times)) / like(s - r, x)


def progressive_loss(
    student: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    *,
    middle: Tensor | None = None,
    steps: int = 2,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Error of the student's velocity at (x, s) against `progressive_target`, scalar.

    It differs from the paper in the space of the error: a velocity's is that of the data estimate over s^2, where the
    paper (section 4) weighs the latter by max(SNR, 1) or SNR + 1 of its own path. Another weighting goes into `weight`.

    Args:
        x: points (B, ...) at times s (B,); the student's step goes to r (B,), below s.
    """
    x = x.detach().float()
    target = progressive_target(teacher, x, s, r, middle=middle, steps=steps)
    return weighted_mean(distance(student(x, s), target, huber), weight)


def guidance_distillation_loss(
    student: Velocity,
    cond: Velocity,
    uncond: Velocity,
    x: Tensor,
    s: Tensor,
    scale: float | Tensor,
    *,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """A student that is called once learns the velocity that guidance makes of two calls (stage one of the paper).

    Args:
        student: closed over the caption, and over the scale where it is told the scale.
        scale: of the guidance: a number, or one per sample (B,) for a student that covers a range. The paper's w is
            this scale minus 1.
    """
    x = x.detach().float()
    with torch.no_grad():
        target = guided_velocity(cond, uncond, scale)(x, s)
    return weighted_mean(distance(student(x, s), target, huber), weight)
