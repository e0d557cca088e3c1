"""Distribution matching: a student's clips get the teacher's distribution, not its trajectories.

The gradient of the reverse Kullback-Leibler divergence is the critic's score less the teacher's, at the student's clip
with noise on it; the critic is a diffusion model of the student's clips and is trained beside the student. DMD:
arXiv:2311.18828, DMD2: arXiv:2405.14867. Student and critic take turns: `student_turn`.

`interval_matching_loss` and `interval_score_loss` do the same for a point that still has noise in it, at a time `at`;
with `at` 0 they are DMD's two losses. TDM (arXiv:2503.06674) and Phased DMD (arXiv:2510.27684) are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.chance import Chance
from vivace.training.losses.paths import (
    Velocity,
    clean_from_velocity,
    euler_step,
    interpolate,
    like,
    transition,
    weighted_mean,
)

Sampling = Literal["consistency", "ode"]
Random = torch.Generator | Chance | None


class StepInput(NamedTuple):
    """Where a student's own sampling stood: x (B, ...) float32 at times s (B,), the step's end r (B,), its number."""

    x: Tensor
    s: Tensor
    r: Tensor
    index: int


def student_turn(update: int, ratio: int = 5) -> bool:
    """Whether update number `update` is also the student's: one in `ratio`; the critic learns in all (DMD2, 4.2)."""
    return update % ratio == 0


def _random(x: Tensor, generator: Random) -> Tensor:
    if isinstance(generator, Chance):
        return generator.normal(x)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device).to(x.device)


def _below(high: int, generator: Random) -> int:
    if isinstance(generator, Chance):
        return generator.below(high)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(high, (), generator=generator, device=device))


@torch.no_grad()
def backward_simulation(
    student: Velocity,
    noise: Tensor,
    times: Tensor,
    *,
    stop: int | None = None,
    mode: Sampling = "consistency",
    generator: Random = None,
) -> StepInput:
    """The student's own sampling, without gradient, up to the step that is to be trained (DMD2, section 4.5).

    A student that is trained on noised real clips never sees its own errors; here it sees what it will see.

    Args:
        student: (x, s) -> v. noise: (B, ...), where it starts.
        times: of the sampler, (K + 1,) descending from 1; the last may be above 0 (a phase that ends in noise).
        stop: step to stop before, 0 to K - 1, the same for the batch; random otherwise. With several processes it must
            be the same in all, or they wait for the slowest: hand it in, or draw from a `Chance`, which sees to that.
        mode: `consistency` estimates the clip and noises it anew between steps; `ode` takes Euler steps.
        generator: of the stop and of fresh noise.

    Raises:
        ConfigError: no such step, or another mode.
    """
    steps = len(times) - 1
    if mode not in ("consistency", "ode"):
        raise ConfigError(f"a student samples by 'consistency' or by 'ode', not by '{mode}'.")
    if stop is None:
        stop = _below(steps, generator)
    if not 0 <= stop < steps:
        raise ConfigError(f"a sampler of {steps} steps has none with number {stop}.")
    x, times = noise.float(), times.float().to(noise.device)
    for k in range(stop):
        s, r = times[k].expand(len(x)), times[k + 1].expand(len(x))
        velocity = student(x, s)
        if mode == "ode":
            x = euler_step(x, velocity, s, r)
        else:
            x = interpolate(clean_from_velocity(x, velocity, s), _random(x, generator), r)
    return StepInput(x, times[stop].expand(len(x)), times[stop + 1].expand(len(x)), stop)


def reward_weights(
    reward: Tensor, *, beta: float = 0.5, baseline: Tensor | float = 0.0, high: float | None = None
) -> Tensor:
    """`exp((reward - baseline) / beta)` per sample (B,), without gradient (Reward Forcing, arXiv:2512.04678).

    For the `scale` of a distribution-matching loss: samples that the reward likes move the student more.

    Args:
        baseline: taken off first, as a running mean, so that weights stay about 1 whatever the reward's units.
        high: no weight above this.

    Raises:
        ConfigError: beta is not positive.
    """
    if beta <= 0:
        raise ConfigError(f"beta must be positive, not {beta}.")
    weights = ((reward.detach().float() - baseline) / beta).exp()
    return weights if high is None else weights.clamp_max(high)


def distribution_matching_loss(
    clean: Tensor,
    real: Velocity,
    fake: Velocity,
    s: Tensor,
    noise: Tensor,
    *,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DMD's surrogate (eq. 7 and 8): half the squared distance to `clean - g` without gradient; scalar, diagnostics.

    g is the critic's estimate of the clip less the teacher's, over `mean |clean - teacher's estimate|` per sample. The
    gradient is g over the number of positions; the value has no meaning.

    Args:
        clean: the student's clips (B, ...), with gradient.
        real, fake: velocities of the teacher (guided) and of the critic.
        s, noise: times (B,) in (0, 1) and noise (B, ...) of the point at which the two are asked.
        scale: per sample (B,), not divided by its mean: see `reward_weights`.

    Returns:
        loss, `gradient` (root mean square of g) and `normaliser` (mean over samples).
    """
    return interval_matching_loss(
        clean, torch.zeros_like(s), real, fake, s, noise, weight=weight, scale=scale
    )


def fake_score_loss(
    fake: Velocity, clean: Tensor, s: Tensor, noise: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """The critic's: flow matching on the student's clips (B, ...), which get no gradient; scalar."""
    return interval_score_loss(fake, clean, torch.zeros_like(s), s, noise, weight=weight, high=None)


def interval_matching_loss(
    point: Tensor,
    at: Tensor,
    real: Velocity,
    fake: Velocity,
    s: Tensor,
    noise: Tensor,
    *,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DMD for a point at time `at`, noised on to s > at, where teacher and critic are compared; scalar, diagnostics.

    Both velocities say where x_at was, `E[x_at | x_s]`: linear in x_s and in the estimate of the clip. Their difference
    is b^2 / a times that of the scores, for `x_s = a x_at + b noise`; it is divided by the mean distance of the point
    from the teacher's answer, which at `at` = 0 is DMD's normaliser. Phased DMD weighs by a function of s and `at`
    instead.

    Args:
        point: of the student (B, ...), with gradient, at times `at` (B,). Others as `distribution_matching_loss`.
    """
    with torch.no_grad():
        late, early = like(s, point), like(at, point)
        ratio, spread = transition(early, late)
        x = ratio * point.float() + spread * noise.float()
        # The share of x_s in the estimate of x_at, and of the clip's estimate: a Gaussian bridge from x_0 to x_s.
        keep = ratio * early.square() / late.square()
        clip = (1.0 - early) - keep * (1.0 - late)
        of_real = keep * x + clip * clean_from_velocity(x, real(x, s), s)
        of_fake = keep * x + clip * clean_from_velocity(x, fake(x, s), s)
        over = tuple(range(1, point.ndim))
        normaliser = (point.float() - of_real).abs().mean(over, keepdim=True).clamp_min(1e-5)
        gradient = (of_fake - of_real) / normaliser
        if scale is not None:
            gradient = gradient * like(scale, point)
        target = point.float() - gradient
    loss = 0.5 * weighted_mean((point.float() - target).square(), weight)
    return loss, {"gradient": gradient.square().mean().sqrt(), "normaliser": normaliser.mean()}


def interval_score_loss(
    fake: Velocity,
    point: Tensor,
    at: Tensor,
    s: Tensor,
    noise: Tensor,
    *,
    weight: Tensor | None = None,
    high: float | None = 10.0,
) -> Tensor:
    """A critic learns the velocity field of points at time `at` on all times above, with no clip known; scalar.

    Phased DMD's eq. 13. With `x_s = a x_at + b noise` the unbiased target is
    `(s + (1 - s) at^2 / (1 - at)^2) / b noise - x_at / (1 - at)`; plain `noise - x_at` would be biased. As s nears `at`
    the target grows as 1 / b, so its square is weighed by min(1 / b^2, high), which the paper uses with 10.

    Args:
        point: of the student (B, ...), without gradient, at times `at` (B,) below s (B,).
        high: as above; None for no such weight, as suits `at` = 0.

    Raises:
        ConfigError: a positive `high` is needed.
    """
    if high is not None and high <= 0:
        raise ConfigError(f"the largest weight must be positive, not {high}.")
    with torch.no_grad():
        late, early = like(s, point), like(at, point)
        ratio, spread = transition(early, late)
        x = ratio * point.float() + spread * noise.float()
        rest = (1.0 - early).clamp_min(1e-6)
        pull = late + (1.0 - late) * (early / rest).square()
        target = pull / spread.clamp_min(1e-4) * noise.float() - point.float() / rest
    error = (fake(x, s).float() - target).square()
    if high is not None:
        error = error * spread.square().clamp_min(1e-8).reciprocal().clamp_max(high)
    return weighted_mean(error, weight)


def times_between(low: Tensor, high: Tensor, *, margin: float = 0.02, generator: Random = None) -> Tensor:
    """A random time per sample (B,) between low and high (B,), off both ends by a share of the interval."""
    if isinstance(generator, Chance):
        u = generator.uniform(low)
    else:
        device = low.device if generator is None else generator.device
        u = torch.rand(low.shape, generator=generator, device=device).to(low.device)
    return low.float() + (margin + (1.0 - 2.0 * margin) * u) * (high.float() - low.float())


def trajectory_matching_loss(
    student: Velocity,
    real: Velocity,
    fake: Velocity,
    noise: Tensor,
    times: Tensor,
    *,
    steps: Sequence[int] | None = None,
    generator: Random = None,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """TDM: every point of the student's own ODE trajectory gets the distribution of the teacher's; scalar, diagnostics.

    Step k goes from times[k] to times[k + 1] with gradient through this step alone; its end is noised to a random time
    in between, and teacher and critic are compared there. The critic learns from the same points
    (`interval_score_loss`, whose unbiased target is Phased DMD's and not TDM's).

    Args:
        noise: (B, ...), where trajectories start. times: (K + 1,) descending from 1.
        steps: numbers of the steps that are trained, all by default; what comes after the last of them is not run.

    Raises:
        ConfigError: no steps, or a number that is none.
    """
    count = len(times) - 1
    chosen = set(range(count) if steps is None else steps)
    if not chosen or not chosen <= set(range(count)):
        raise ConfigError(f"steps of this trajectory are 0 to {count - 1}, not {sorted(chosen)}.")
    x, times = noise.detach().float(), times.float().to(noise.device)
    total = torch.zeros((), device=x.device)
    sums: dict[str, Tensor] = {}
    for k in range(max(chosen) + 1):
        s, r = times[k].expand(len(x)), times[k + 1].expand(len(x))
        with torch.set_grad_enabled(k in chosen and torch.is_grad_enabled()):
            end = euler_step(x, student(x, s), s, r)
        if k in chosen:
            late = times_between(r, s, generator=generator)
            fresh = _random(x, generator)
            loss, told = interval_matching_loss(end, r, real, fake, late, fresh, weight=weight, scale=scale)
            total = total + loss / len(chosen)
            for name, value in told.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(chosen)
        x = end.detach()
    return total, sums


def phased_matching_loss(
    student: Velocity,
    start: StepInput,
    real: Velocity,
    fake: Velocity,
    *,
    generator: Random = None,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Phased DMD's for one expert: the end of its step gets the teacher's distribution; scalar, diagnostics.

    Args:
        student: the expert of this phase. Those of earlier phases are run by `backward_simulation` with mode `ode` over
            times that end where this phase ends, and stay as they are.
        start: of `backward_simulation`; its r is the time where the step ends, above 0 in all phases but the last.
    """
    x, s, r, _ = start
    end = euler_step(x, student(x, s), s, r)
    # The paper found times up to 1 better than those up to the phase's own beginning.
    late = times_between(r, torch.ones_like(r), generator=generator)
    fresh = _random(x, generator)
    return interval_matching_loss(end, r, real, fake, late, fresh, weight=weight, scale=scale)
