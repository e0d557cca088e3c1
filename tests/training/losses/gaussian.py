"""A teacher whose everything is known: data N(mean, deviation^2), the same in every position.

On the straight path x_s is N((1 - s) m, q) with q = (1 - s)^2 c^2 + s^2, so that

- the score is `-(x - (1 - s) m) / q`,
- the velocity is `E[n - x_0 | x_s] = -m + (s - (1 - s) c^2) / q (x - (1 - s) m)`, as n and x_0 correlate with x_s by s
  and (1 - s) c^2,
- the ODE keeps quantiles, `x_r = (1 - r) m + sqrt(q_r / q_s) (x_s - (1 - s) m)`: its derivative in r is the velocity.

Students are affine in x with coefficients that are free or known functions of the times, so that optima are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def wide(s: Tensor, x: Tensor) -> Tensor:
    return s.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    mean: float = 0.7
    deviation: float = 0.5

    def variance(self, s):
        return (1 - s) ** 2 * self.deviation**2 + s**2

    def score(self, x: Tensor, s: Tensor) -> Tensor:
        s = wide(s, x)
        return -(x - (1 - s) * self.mean) / self.variance(s)

    def velocity(self, x: Tensor, s: Tensor) -> Tensor:
        s = wide(s, x)
        slope = (s - (1 - s) * self.deviation**2) / self.variance(s)
        return -self.mean + slope * (x - (1 - s) * self.mean)

    def solution(self, x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """x_r of the trajectory through x_s."""
        s, r = wide(s, x), wide(r, x)
        stretch = (self.variance(r) / self.variance(s)).sqrt()
        return (1 - r) * self.mean + stretch * (x - (1 - s) * self.mean)

    def map(self, x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """The mean velocity between s and r; the velocity where they are equal."""
        span = wide(s - r, x)
        mean = (x - self.solution(x, s, r)) / torch.where(span.abs() < 1e-6, 1.0, span)
        return torch.where(span.abs() < 1e-6, self.velocity(x, s), mean)

    def clean(self, count: int, shape=(4,)) -> Tensor:
        return self.mean + self.deviation * torch.randn(count, *shape)

    def point(self, count: int, s: Tensor, shape=(4,)) -> Tensor:
        """Samples of x_s."""
        clean = self.clean(count, shape)
        at = wide(s, clean)
        return (1 - at) * clean + at * torch.randn_like(clean)


class Off(nn.Module):
    """A known function plus `shift + scale x`, both 0 at the optimum; callable as a velocity and as a map."""

    def __init__(self, truth: Callable[..., Tensor], shift: float = 0.0, scale: float = 0.0) -> None:
        super().__init__()
        self.truth = truth
        self.shift = nn.Parameter(torch.tensor(shift))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        return self.truth(x, *times) + self.shift + self.scale * x


class Affine(nn.Module):
    """`a + b x` at all times: a whole network for one time."""

    def __init__(self, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor, *times: Tensor) -> Tensor:
        return self.a + self.b * x


def train(
    loss: Callable[[int], Tensor], parameters: Iterable[nn.Parameter], steps: int = 300, rate: float = 0.1
) -> float:
    """Adam with a rate that falls to a hundredth; the last loss."""
    optimizer = torch.optim.Adam(list(parameters), lr=rate, betas=(0.8, 0.95))
    value = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.01 ** (step / steps)
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
    return float(value.detach())


def times(count: int, low: float = 0.05, high: float = 0.95) -> Tensor:
    return low + (high - low) * torch.rand(count)


def numbers(module: nn.Module) -> list[float]:
    return [p.item() for p in module.parameters()]


def untouched(*modules: nn.Module) -> bool:
    """Whether no gradient has reached any parameter, not even a zero."""
    return all(p.grad is None for module in modules for p in module.parameters())


def line(f: Callable[[Tensor], Tensor]) -> list[float]:
    """Intercept and slope of a function that is affine in every position."""
    zero, one = f(torch.zeros(1, 4)), f(torch.ones(1, 4))
    return [float(zero[0, 0]), float((one - zero)[0, 0])]


def size(module: nn.Module) -> float:
    """Largest gradient of a module's parameters."""
    return max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in module.parameters())
