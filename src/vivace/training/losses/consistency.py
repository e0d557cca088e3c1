"""Discrete consistency: LCM and VideoLCM, phased consistency (PCM), and the two experts of DCM.

A teacher takes one guided step down its trajectory, and student and EMA student must name the same end from the points
before and after it. On straight paths the consistency function is `f(x, s) = x - (s - end) v(x, s)`: at s = end it is x
itself for any network, which is the boundary condition that LCM's c_skip and c_out bring about.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivace.training.losses.adversarial import feature_matching, hinge_discriminator, hinge_generator
from vivace.training.losses.motion import temporal_difference_loss
from vivace.training.losses.paths import Velocity, distance, euler_step, renoise, weighted_mean
from vivace.training.losses.rectified import window_of

Judge = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]
"""(x (B, ...), s (B,)) -> logits of a discriminator, and the hidden states that it read them from."""

HUBER = 1e-3
"""The pseudo-Huber constant of the LCM family's public code, for latents of about unit variance."""


def consistency_function(network: Velocity, x: Tensor, s: Tensor, end: Tensor | float = 0.0) -> Tensor:
    """Where a network says that the trajectory through x (B, ...) at times s (B,) is at time `end`; float32."""
    return euler_step(x, network(x, s), s, torch.as_tensor(end, device=s.device).expand_as(s))


def consistency_pair(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    end: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The student's end of the trajectory through x, with gradient, and the average's after a teacher's step to r.

    Args:
        student, average: the same network and its EMA (or itself), as velocities. teacher: guided, as in LCM's
            augmented solver.
        x: points (B, ...) at times s (B,). r: the lower time, `end` <= r < s. end: of the trajectory, or of a phase.

    Returns:
        float32 (B, ...), (B, ...).
    """
    x = x.detach().float()
    with torch.no_grad():
        target = consistency_function(average, euler_step(x, teacher(x, s), s, r), r, end)
    return consistency_function(student, x, s, end), target


def consistency_loss(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    *,
    end: Tensor | float = 0.0,
    huber: float = HUBER,
    weight: Tensor | None = None,
) -> Tensor:
    """LCM (arXiv:2310.04378, algorithm 1) and VideoLCM (arXiv:2312.09109), scalar; arguments of `consistency_pair`.

    It differs: the teacher's step is Euler on the velocity, and the student is not told the guidance scale unless it is
    closed over it.
    """
    prediction, target = consistency_pair(student, average, teacher, x, s, r, end)
    return weighted_mean(distance(prediction, target, huber), weight)


def phase_end(s: Tensor, edges: Tensor) -> Tensor:
    """The time (B,) at which the phase of each time s (B,) ends; a time on an edge belongs to the phase below it.

    Raises:
        ConfigError: edges that do not ascend from 0 to 1.
    """
    return window_of(s, edges)[1]


def phased_consistency_loss(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    edges: Tensor,
    *,
    huber: float = HUBER,
    weight: Tensor | None = None,
) -> Tensor:
    """PCM (arXiv:2405.18407): consistency within phases, which makes a deterministic sampler of as many steps.

    Args:
        edges: of the phases, ascending from 0 to 1, (K + 1,). A lower time r beyond the phase is taken to its end.
    """
    end = phase_end(s, edges)
    return consistency_loss(
        student, average, teacher, x, s, torch.maximum(r, end), end=end, huber=huber, weight=weight
    )


def is_semantic(s: Tensor, boundary: float) -> Tensor:
    """DCM (arXiv:2506.03123): whether the expert for layout and motion is asked, (B,) bool; the one for details is
    asked at `boundary` and below."""
    return s > boundary


def semantic_expert_loss(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    *,
    end: Tensor | float = 0.0,
    coherence: float = 1.0,
    stride: int = 1,
    huber: float = HUBER,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DCM's for the semantic expert: consistency, and the same changes between frames; scalar, and its parts.

    Args:
        x: points of clips (B, C, T, H, W) at times s (B,) above the boundary; others as in `consistency_pair`.
        coherence: weight of the changes, squared, 1 in the authors' code.
        stride: frames between those that are compared; 3 latent frames in the authors' code.
        weight: of positions, in the consistency only.

    Returns:
        loss, and its parts `consistency` and `coherence`.
    """
    prediction, target = consistency_pair(student, average, teacher, x, s, r, end)
    near = weighted_mean(distance(prediction, target, huber), weight)
    changes = temporal_difference_loss(prediction, target, stride=stride)
    return near + coherence * changes, {"consistency": near.detach(), "coherence": changes.detach()}


def detail_expert_loss(
    student: Velocity,
    average: Velocity,
    teacher: Velocity,
    judge: Judge,
    x: Tensor,
    s: Tensor,
    r: Tensor,
    at: Tensor,
    noise: Tensor,
    *,
    end: Tensor | float = 0.0,
    adversarial: float = 0.1,
    features: float = 0.2,
    huber: float = HUBER,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """DCM's for the detail expert: consistency, a discriminator, and its features; scalar, the two ends, and parts.

    The two ends are noised alike to a time `at` before they are judged. PCM's adversarial consistency is the same with
    `features` 0. It differs from the authors' code, which noises along a straight line from `end` to `at`; here the
    marginal is that of the path. In that code the discriminator weighs 5 and the features 10, times a common weight.

    Args:
        judge: logits and hidden states. Its parameters collect gradient unless they are frozen.
        at: times (B,), `end` <= at < 1, at which the ends are judged. noise: (B, ...). Others: `consistency_pair`.

    Returns:
        loss; the student's noised end and the target's, detached, for `detail_discriminator_loss`; the parts.
    """
    prediction, target = consistency_pair(student, average, teacher, x, s, r, end)
    stop = torch.as_tensor(end, device=s.device).expand_as(s)
    fake, real = renoise(prediction, stop, at, noise), renoise(target, stop, at, noise)
    logits, found = judge(fake, at)
    with torch.no_grad():
        wanted = judge(real, at)[1]
    near = weighted_mean(distance(prediction, target, huber), weight)
    fooled, alike = hinge_generator(logits), feature_matching(found, wanted)
    loss = near + adversarial * fooled + features * alike
    told = {"consistency": near.detach(), "adversarial": fooled.detach(), "features": alike.detach()}
    return loss, fake.detach(), real.detach(), told


def detail_discriminator_loss(judge: Judge, fake: Tensor, real: Tensor, at: Tensor) -> Tensor:
    """The discriminator's hinge loss on the two noised ends that `detail_expert_loss` returns, scalar."""
    return hinge_discriminator(judge(real.detach(), at)[0], judge(fake.detach(), at)[0])
