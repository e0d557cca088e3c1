"""Continuous-time consistency: sCM (arXiv:2410.11081) on straight paths, and rCM (arXiv:2510.08431).

A consistency function `f(x, s) = x - s v(x, s)` is constant along the teacher's trajectory where
`df/ds = v_teacher - v - s dv/ds` is zero. At that point v is the teacher's mean velocity from s down to 0.

sCM is written for circular paths and its network's output F there. Here the network is a flow-matching one, called as
it was trained; `df/ds` is taken in its own coordinates, and the factor s between f and v goes into the weighting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.derivative import STEP, Derivative, total_derivative
from vivace.training.losses.distribution import distribution_matching_loss
from vivace.training.losses.paths import Velocity, like, weighted_mean


def warm_up(update: int, updates: int) -> float:
    """Share of the derivative's part in the tangent, growing from 0 to 1 over the first updates (sCM, section 4.2)."""
    return 1.0 if updates <= 0 else min(1.0, update / updates)


def normalised(tangent: Tensor, c: float = 0.1) -> Tensor:
    """`g / (|g| + c)` per sample of (B, ...), with |g| the root mean square, so that c does not depend on the size.

    sCM (section 4.2) takes the norm, over all positions; a mean loss makes up for the difference.
    """
    size = tangent.square().mean(tuple(range(1, tangent.ndim)), keepdim=True).sqrt()
    return tangent / (size + c)


@torch.no_grad()
def consistency_tangent(
    student: Velocity,
    velocity: Tensor,
    x: Tensor,
    s: Tensor,
    *,
    output: Tensor | None = None,
    warmup: float = 1.0,
    derivative: Derivative = "jvp",
    step: float = STEP,
) -> Tensor:
    """`df/ds` of the student's consistency function along the teacher's trajectory, float32 (B, ...).

    Args:
        velocity: of the teacher at (x, s), (B, ...).
        output: of the student at (x, s), where it is known; otherwise it is evaluated.
        warmup: factor 0 to 1 of the part with the derivative: see `warm_up`.
    """
    current = (student(x, s) if output is None else output).detach().float()
    change = velocity.float() - current
    if warmup == 0.0:
        return change
    slope = total_derivative(student, x, s, velocity, derivative=derivative, step=step)
    return change - warmup * like(s, x) * slope


def continuous_consistency_loss(
    student: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    *,
    warmup: float = 1.0,
    normalise: float | None = 0.1,
    derivative: Derivative = "jvp",
    step: float = STEP,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sCM (section 4.2): the consistency function moves against its tangent; scalar, and diagnostics.

    The value is `|v - (v_detached + g)|^2`, of which only the gradient means something: it is -2 g. It differs from
    sCM besides the path: no learned weighting of times (`weight` takes one) and no double normalisation of layers.

    Args:
        student: must be called with gradient once and without two times more (once with `jvp`); no dropout.
        teacher: the guided velocity; for consistency *training* a callable that returns `noise - clean`.
        x: points (B, ...) at times s (B,).
        normalise: c of `normalised`; None leaves the tangent as it is.

    Returns:
        loss, and `tangent` (root mean square of df/ds before it is normalised) and `error` (of v against the teacher).
    """
    x = x.detach().float()
    with torch.no_grad():
        velocity = teacher(x, s).float()
    output = student(x, s).float()
    tangent = consistency_tangent(
        student, velocity, x, s, output=output, warmup=warmup, derivative=derivative, step=step
    )
    size = tangent.square().mean().sqrt()
    if normalise is not None:
        tangent = normalised(tangent, normalise)
    loss = weighted_mean((output - (output.detach() + tangent)).square(), weight)
    return loss, {"tangent": size, "error": (output.detach() - velocity).square().mean()}


def regularised_consistency_loss(
    student: Velocity,
    teacher: Velocity,
    fake: Velocity,
    x: Tensor,
    s: Tensor,
    made: Tensor,
    at: Tensor,
    noise: Tensor,
    *,
    regularisation: float = 0.01,
    warmup: float = 1.0,
    normalise: float | None = 0.1,
    derivative: Derivative = "jvp",
    step: float = STEP,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """rCM: continuous consistency, which covers the data, plus DMD on what the student makes, which sharpens it.

    The critic `fake` is trained beside it as in DMD2: `distribution.fake_score_loss`.

    Args:
        x: points of real clips at times s (B,), for the consistency.
        made: the student's own clips with gradient (B', ...), from `distribution.backward_simulation` and one step.
        at, noise: times (B',) and noise at which the teacher and the critic judge them.
        regularisation: weight of the divergence; 0.01 as in the paper.
        weight: of positions, in the consistency only, as x and `made` show different clips.

    Returns:
        loss, its parts `consistency` and `divergence`, and the diagnostics of both losses.

    Raises:
        ConfigError: a negative weight of the divergence.
    """
    if regularisation < 0:
        raise ConfigError(f"the divergence's weight must not be negative, not {regularisation}.")
    loss, told = continuous_consistency_loss(
        student,
        teacher,
        x,
        s,
        warmup=warmup,
        normalise=normalise,
        derivative=derivative,
        step=step,
        weight=weight,
    )
    divergence, more = distribution_matching_loss(made, teacher, fake, at, noise)
    told |= {"consistency": loss.detach(), "divergence": divergence.detach()} | more
    return loss + regularisation * divergence, told
