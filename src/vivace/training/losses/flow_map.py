"""Flow maps, which go from any time to any other in one evaluation: MeanFlow, and maps that compose.

A map is the mean velocity u between s and r, `x_r = x_s - (s - r) u(x_s, s, r)`. At r = s it is the velocity itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.derivative import STEP, Derivative, total_derivative
from vivace.training.losses.paths import (
    FlowMap,
    Velocity,
    distance,
    euler_step,
    interpolate,
    like,
    weighted_mean,
)


@torch.no_grad()
def instantaneous_velocity(
    clean: Tensor, noise: Tensor, s: Tensor, *, teacher: Velocity | None = None, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The point at time s and the velocity that a map starts with there, float32 (B, ...), (B, ...).

    Args:
        clean, noise: (B, ...). s: times (B,).
        teacher: a guided velocity; its share of the velocity replaces the pair's `noise - clean`. With a share of 1 the
            map is distilled and guidance is in it for good; with less, the rest is MeanFlow from data. The paper mixes
            guidance in from its own map (section 4.2); a teacher has none of that feedback.
        share: of the teacher, 0 to 1.

    Raises:
        ConfigError: another share.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"the teacher's share must be 0 to 1, not {share}.")
    x, velocity = interpolate(clean, noise, s), noise.float() - clean.float()
    if teacher is not None and share:
        velocity = (1.0 - share) * velocity + share * teacher(x, s).float()
    return x, velocity


def adaptive_weight(error: Tensor, power: float, c: float = 1e-3) -> Tensor:
    """`1 / (mean square + c)^power` per sample of errors (B, ...), without gradient (MeanFlow, section 4.3).

    Power 0 is the squared error, 0.5 like pseudo-Huber, 1 the paper's choice. The paper sums squares over positions;
    with the mean, c means the same for clips of any size.
    """
    square = error.detach().float().square().mean(tuple(range(1, error.ndim)), keepdim=True)
    return (square + c) ** -power


def mean_flow_loss(
    student: FlowMap,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    velocity: Tensor,
    *,
    power: float = 1.0,
    c: float = 1e-3,
    derivative: Derivative = "jvp",
    step: float = STEP,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """MeanFlow (arXiv:2505.13447, eq. 9 and 10): u against `velocity - (s - r) du/ds`; scalar, and diagnostics.

    Args:
        x, velocity: (B, ...) at times s (B,), of `instantaneous_velocity`: of a pair, of a teacher, or mixed.
        r: where the map leads (B,), r <= s. At r = s with power 0 this is flow matching exactly. Restricted MeanFlow
            (s - r at most some R) is a choice of r, and the caller's.
        power, c: of `adaptive_weight`.

    Returns:
        loss, and `error` (mean square of u against its target) and `slope` (root mean square of du/ds).
    """
    x, velocity = x.detach().float(), velocity.detach().float()
    slope = total_derivative(
        lambda y, t: student(y, t, r), x, s, velocity, derivative=derivative, step=step, low=r
    )
    error = student(x, s, r).float() - (velocity - like(s - r, x) * slope)
    scale = adaptive_weight(error, power, c) if power else 1.0
    told = {"error": error.detach().square().mean(), "slope": slope.square().mean().sqrt()}
    return weighted_mean(scale * error.square(), weight), told


@torch.no_grad()
def composed_map(
    average: FlowMap, x: Tensor, s: Tensor, middle: Tensor, r: Tensor, *, velocity: Tensor | None = None
) -> Tensor:
    """The mean velocity from s to r of a map that is applied to `middle` first, float32 (B, ...); times (B,).

    `((s - t) u(s, t) + (t - r) u(t, r)) / (s - r)`, and the velocity itself where s = r.

    Args:
        velocity: that of a teacher, which takes the place of the first part where the step to `middle` is short.
    """
    first = (average(x, s, middle) if velocity is None else velocity).float()
    second = average(euler_step(x, first, s, middle), middle, r).float()
    span = (s - r).float()
    share = like(torch.where(span > 0, (s - middle).float() / span.clamp_min(1e-12), 1.0), x)
    return share * first + (1.0 - share) * second


def composition_loss(
    student: FlowMap,
    average: FlowMap,
    x: Tensor,
    s: Tensor,
    middle: Tensor,
    r: Tensor,
    *,
    velocity: Tensor | None = None,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """One step of the student from s to r against two of its average over a time between; scalar.

    Any two times of a trajectory must be related by the map (CTM, arXiv:2310.02279; shortcut models, arXiv:2410.12557,
    at halves). Alone it is content with any map that composes, also with a wrong one: `any_step_loss` adds what ties it
    to the teacher.

    Args:
        student: with gradient. average: its EMA, or itself; called without gradient.
        x: points (B, ...) at times s (B,), with r <= middle <= s.
        velocity: of a teacher at (x, s), for the first part of the way where `middle` is close to s.
    """
    x = x.detach().float()
    target = composed_map(average, x, s, middle, r, velocity=velocity)
    return weighted_mean(distance(student(x, s, r), target, huber), weight)


def any_step_loss(
    student: FlowMap,
    average: FlowMap,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    middle: Tensor,
    r: Tensor,
    *,
    boundary: float = 1.0,
    huber: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A map from any time to any other, distilled from a teacher: it composes, and at r = s it is the teacher.

    The forward part of AnyFlow-type students (arXiv:2605.13724), after its published description rather than its
    training code, which was not there to read; its on-policy part is `distribution.distribution_matching_loss` on
    clips that the map made over a few of its own steps.

    Args:
        teacher: the guided velocity.
        boundary: weight of the map at r = s against the teacher.

    Returns:
        loss, and its parts `composition` and `boundary`.
    """
    x = x.detach().float()
    with torch.no_grad():
        velocity = teacher(x, s).float()
    composition = composition_loss(student, average, x, s, middle, r, huber=huber, weight=weight)
    tie = weighted_mean(distance(student(x, s, s), velocity, huber), weight)
    told = {"composition": composition.detach(), "boundary": tie.detach()}
    return composition + boundary * tie, told
