"""Straight paths between data and noise: points, estimates, steps and times that every objective uses.

Flow matching: Lipman et al. 2022 (arXiv:2210.02747), Liu et al. 2022 (arXiv:2209.03003). The time shift is that of
Stable Diffusion 3 (arXiv:2403.03206, section 5.3.2) and of the samplers in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from vivace.core.errors import ConfigError

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), s (B,)) -> velocity (B, ...)."""

FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, ...), s (B,), r (B,)) -> mean velocity between s and r (B, ...)."""


def like(s: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as float32 (B, 1, ...), with as many axes as x."""
    return s.float().reshape(-1, *[1] * (x.ndim - 1))


def interpolate(clean: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """The point `(1 - s) clean + s noise` in float32, for clean and noise (B, ...) at times (B,)."""
    at = like(s, clean)
    return (1.0 - at) * clean.float() + at * noise.float()


def renoise(x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A point at time s, (B, ...), taken to a noisier time t by fresh noise, so that its marginal is right.

    With `a = (1 - t) / (1 - s)` it is `a x + sqrt(t^2 - a^2 s^2) noise`; at s = 0 the same as `interpolate`. A point
    that is noise already (s = 1) can only go to t = 1, and is replaced by the fresh noise.
    """
    scale, spread = transition(like(s, x), like(t, x))
    return scale * x.float() + spread * noise.float()


def transition(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and standard deviation of the kernel from time s to a time t >= s."""
    scale = (1.0 - t) / (1.0 - s).clamp_min(1e-6)
    return scale, (t.square() - (scale * s).square()).clamp_min(0.0).sqrt()


def clean_from_velocity(x: Tensor, velocity: Tensor, s: Tensor) -> Tensor:
    """The data that a velocity at (x, s) points at: `x - s v`, float32."""
    return x.float() - like(s, x) * velocity.float()


def noise_from_velocity(x: Tensor, velocity: Tensor, s: Tensor) -> Tensor:
    """The noise that a velocity at (x, s) comes from: `x + (1 - s) v`, float32."""
    return x.float() + (1.0 - like(s, x)) * velocity.float()


def velocity_from_clean(x: Tensor, clean: Tensor, s: Tensor) -> Tensor:
    """The velocity `(x - clean) / s` that leads from x to this estimate of the data; s must not be 0."""
    return (x.float() - clean.float()) / like(s, x)


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """`uncond + scale (cond - uncond)` in float32; scale 1 is no guidance. A tensor of scales is (B,)."""
    factor = like(scale, cond) if isinstance(scale, Tensor) else scale
    return uncond.float() + factor * (cond.float() - uncond.float())


def guided_velocity(cond: Velocity, uncond: Velocity, scale: float | Tensor) -> Velocity:
    """The velocity under classifier-free guidance (arXiv:2207.12598), as one callable."""
    return lambda x, s: guided(cond(x, s), uncond(x, s), scale)


def euler_step(x: Tensor, velocity: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """x at time s moved along a velocity to time r: `x - (s - r) v`, float32. On straight paths this is DDIM."""
    return x.float() - like(s - r, x) * velocity.float()


@torch.no_grad()
def solve(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """The ODE from times[0] to times[-1] by Euler steps, without gradient.

    `times` is (K + 1,), or (K + 1, B) where every sample has its own.
    """
    x = x.float()
    times = times.float().to(x.device)
    for s, r in pairwise(times):
        s, r = s.expand(len(x)), r.expand(len(x))
        x = euler_step(x, velocity(x, s), s, r)
    return x


def shifted_times(
    steps: int, shift: float = 1.0, *, last: float = 0.0, device: torch.device | str | None = None
) -> Tensor:
    """Times of a sampler, float32 (steps + 1,) from 1 down to 0: u uniform, then `s = shift u / (1 + (shift - 1) u)`.

    Args:
        steps: evaluations of the network, at all times but the final 0.
        shift: above 1 puts more steps where there is much noise.
        last: the u at which the uniform spacing ends; the time after the last evaluation is 0 all the same. diffusers'
            flow-matching UniPC has 1/1000 here.

    Raises:
        ConfigError: no step, or a shift that is not positive.
    """
    if steps < 1 or shift <= 0:
        raise ConfigError(f"a sampler needs 1 step or more and a positive shift, not {steps} and {shift}.")
    u = torch.linspace(1.0, last, steps + 1, dtype=torch.float64, device=device)
    s = shift * u / (1.0 + (shift - 1.0) * u)
    s[-1] = 0.0
    return s.float()


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """`sqrt(d^2 + c^2) - c` per position (arXiv:2310.14189): about d^2 / 2c when small, |d| when large."""
    return (difference.float().square() + c * c).sqrt() - c


def distance(a: Tensor, b: Tensor, huber: float = 0.0) -> Tensor:
    """Per position, float32: pseudo-Huber with this constant, or the squared difference at 0."""
    difference = a.float() - b.float()
    return pseudo_huber(difference, huber) if huber else difference.square()


def weighted_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean of values (B, ...), float32, or `sum(w v) / sum(w)` with a weight that broadcasts to them.

    A weight that is zero everywhere gives zero.
    """
    values = values.float()
    if weight is None:
        return values.mean()
    spread = weight.detach().to(values).expand_as(values)
    return (spread * values).mean() / spread.mean().clamp_min(torch.finfo(torch.float32).tiny)


def flow_matching_loss(
    student: Velocity, clean: Tensor, noise: Tensor, s: Tensor, *, weight: Tensor | None = None
) -> Tensor:
    """Squared error of the velocity at a point between data and noise (arXiv:2210.02747, eq. 23), scalar."""
    clean, noise = clean.detach().float(), noise.detach().float()
    return weighted_mean(distance(student(interpolate(clean, noise, s), s), noise - clean), weight)
