"""How a network's output changes along a trajectory: forward-mode, or two more evaluations where that is missing.

Continuous consistency models and MeanFlow need `d/ds f(x_s, s) = df/dx . dx/ds + df/ds` at every update.

The fused attention that torch chooses on a processor has no forward mode (torch 2.13), so `torch.func.jvp` runs with
the unfused one here, whose scores take memory quadratic in tokens. Kernels that are called past
`scaled_dot_product_attention` seldom have one: take differences there. Custom operations that are registered with
`torch.library` are the trap: without an error their derivative is 0. `derivative_gap` tells before a run starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vivace.core.errors import ConfigError
from vivace.training.losses.paths import like

Derivative = Literal["jvp", "difference"]

STEP = 1e-4
"""Half the distance in s of a difference. Networks see s times 1000 in sines of up to 1 radian per unit: a random
float32 video transformer is off by 0.13 at 1e-3, 0.0014 at 1e-4 and 0.001 at 1e-5. In bf16 it is off by 0.14 at best,
so differences leave autocast (tests/training/losses/test_loss_transformer.py)."""


@torch.no_grad()
def total_derivative(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    s: Tensor,
    direction: Tensor,
    *,
    derivative: Derivative = "jvp",
    step: float = STEP,
    low: Tensor | float = 0.0,
) -> Tensor:
    """`d/ds f(x, s)` where x moves along `direction`, without gradient, float32 (B, ...).

    Args:
        f: of x (B, ...) and s (B,); samples must not depend on one another.
        direction: dx/ds (B, ...).
        derivative: `jvp` is exact; `difference` is central, at two evaluations of f, and shorter and one-sided where
            s is at an end of its range. Differences are taken outside autocast: weights must be float32 for them.
        step: of the difference, in s.
        low: the smallest s of the range, one for all or (B,); the largest is 1.

    Raises:
        ConfigError: another kind of derivative, or an operation in f that has no forward mode.
    """
    x, s, direction = x.detach().float(), s.detach().float(), direction.detach().float()
    if derivative == "difference":
        up, down = (1.0 - s).clamp(0.0, step), (s - low).clamp(0.0, step)
        with torch.autocast(x.device.type, enabled=False):
            above = f(x + like(up, x) * direction, s + up).float()
            below = f(x - like(down, x) * direction, s - down).float()
        # Where the range is a single point there is nothing to differ by, and the factor of the derivative is 0.
        return (above - below) / like(up + down, x).clamp_min(1e-12)
    if derivative != "jvp":
        raise ConfigError(f"a derivative is taken by 'jvp' or by 'difference', not by '{derivative}'.")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.MATH):
            result = torch.func.jvp(f, (x, s), (direction, torch.ones_like(s)))
    except RuntimeError as error:  # NotImplementedError is one
        if not isinstance(error, NotImplementedError) and "functorch" not in str(error):
            raise
        raise ConfigError(
            f"this network has an operation without a forward-mode derivative ({str(error).split('. ')[0]}); "
            "ask for derivative='difference'."
        ) from error
    return result[1].detach().float()


def derivative_gap(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    s: Tensor,
    direction: Tensor,
    *,
    step: float = STEP,
) -> float:
    """How far the forward-mode derivative is from differences, relative to the larger of the two, at these points.

    Of a float32 network a hundredth at most, under bf16 autocast a few hundredths; near 1 where an operation drops the
    derivative without an error.

    Raises:
        ConfigError: an operation says that it has no forward mode.
    """
    exact = total_derivative(f, x, s, direction)
    near = total_derivative(f, x, s, direction, derivative="difference", step=step)
    return float((exact - near).norm() / torch.maximum(exact.norm(), near.norm()).clamp_min(1e-12))
