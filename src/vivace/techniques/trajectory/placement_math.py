"""Where the steps of a sampler lie: rules that make noise levels, and the search along a recorded trajectory.

Levels are flow sigmas, numpy float64, falling, first 1 (pure noise), without the final 0. Legend: n levels or nodes,
m = n + 1 nodes with the final one, d numbers per latent. Odds are sigma / (1 - sigma): the noise-to-signal ratio of
the straight path x = (1 - sigma) x0 + sigma noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.float64]

AYS_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
"""Align Your Steps (arXiv 2404.14507): the published ten-step schedule of Stable Diffusion 1.5."""


def uniform(n: int) -> Levels:
    """n equal steps from 1 to 0."""
    return np.linspace(1.0, 0.0, n + 1)[:-1]


def shifted(levels: Levels, shift: float) -> Levels:
    """Levels whose odds are multiplied: s sigma / (1 + (s - 1) sigma). The shift of flow matching (2403.03206)."""
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def power(n: int, rho: float) -> Levels:
    """(1 - i/n) ** rho: equal steps in sigma ** (1 / rho), the form of Karras et al. (2206.00364) from 1 to 0.

    rho above 1 crowds the steps at low noise, below 1 at high noise.
    """
    return uniform(n) ** rho


def align_your_steps(n: int) -> Levels:
    """The knots of Align Your Steps as flow levels of the same log-SNR; log-linear in the odds between them.

    The odds at a knot t are sqrt((1 - a) / a) with a the cumulated signal of Stable Diffusion's schedule. Its first
    level still holds a little signal (0.936); a flow model starts from pure noise, so the first level is 1.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1.0 - betas)[list(AYS_TIMESTEPS)]
    log_odds = 0.5 * np.log((1.0 - signal) / signal)
    places = np.linspace(0.0, len(log_odds) - 1.0, n) if n > 1 else np.zeros(1)
    odds = np.exp(np.interp(places, np.arange(len(log_odds)), log_odds))
    levels = odds / (1.0 + odds)
    levels[0] = 1.0
    return levels


def is_uniform(sigmas: Any) -> bool:
    """Whether noise levels handed to a scheduler are a pipeline's uniform grid, not somebody's own.

    Pipelines write the grid as 1, 1 - 1/n ... 1/n, in ways that differ in the last bits.
    """
    given = np.asarray(sigmas, dtype=np.float64)
    return given.ndim == 1 and len(given) > 0 and np.allclose(given, uniform(len(given)), rtol=0, atol=1e-6)


def asked_steps(call: Mapping[str, Any]) -> int | None:
    """How many steps arguments of a scheduler's `set_timesteps` ask for; None when they are somebody's own schedule."""
    given = call.get("sigmas")
    if call.get("timesteps") is not None or (given is not None and not is_uniform(given)):
        return None
    return len(given) if given is not None else call.get("num_inference_steps")


def ask_for(call: dict[str, Any], steps: int) -> None:
    """Put a number of steps into such arguments, in the form in which they are."""
    if call.get("sigmas") is not None:
        call["sigmas"] = uniform(steps)
    if call.get("num_inference_steps") is not None:
        call["num_inference_steps"] = steps


def jump_costs(velocities: Any, sigmas: Any) -> Levels:
    """Local error of every Euler jump along a recorded trajectory.

    The trajectory goes from node k to k + 1 by (sigma[k+1] - sigma[k]) velocity[k]. A jump from i to j goes straight
    along velocity[i]; its cost is the L2 distance of where it lands from node j.

    Args:
        velocities: (m - 1, d) or (m, d), the velocity at each node; the last node's is not used.
        sigmas: (m,) falling, the final level (usually 0) included.

    Returns:
        (m, m), infinite where j <= i.

    Raises:
        ValueError: the numbers of velocities and levels do not fit.
    """
    v, s = np.asarray(velocities, dtype=np.float64), np.asarray(sigmas, dtype=np.float64)
    m = len(s)
    if v.ndim != 2 or len(v) not in (m - 1, m):
        raise ValueError(f"{m} noise levels need {m - 1} velocities of shape (steps, d), not {v.shape}")
    moves = np.diff(s)[:, None] * v[: m - 1]
    costs = np.full((m, m), np.inf)
    for i in range(m - 1):
        landed = (s[i + 1 :] - s[i])[:, None] * v[i]
        costs[i, i + 1 :] = np.linalg.norm(landed - np.cumsum(moves[i:], axis=0), axis=1)
    return costs


def cheapest_path(sigmas: Any, costs: Any, steps: int, *, worst: bool = False) -> NDArray[np.int64]:
    """The nodes of the cheapest chain of exactly `steps` jumps from the first node to the last.

    Dynamic programming over (jumps, node), O(steps m^2). The sum is GITS' objective (2405.11326), the largest jump
    LeMiCa's.

    Args:
        sigmas: (m,) falling.
        costs: (m, m); entry (i, j) with i < j is the cost of jumping from node i to j. The rest is not read.
        steps: number of jumps, 1 to m - 1.
        worst: minimise the largest cost in the chain instead of the sum.

    Returns:
        (steps + 1,) rising indices, the first 0 and the last m - 1. Among equal chains, the one whose last jumps
        start earliest.

    Raises:
        ValueError: shapes do not fit, levels do not fall, or there are more steps than jumps.
    """
    s, c = np.asarray(sigmas, dtype=np.float64), np.array(costs, dtype=np.float64)
    m = len(s)
    if c.shape != (m, m):
        raise ValueError(f"{m} noise levels need costs of shape ({m}, {m}), not {c.shape}")
    if not np.all(np.diff(s) < 0):
        raise ValueError("the noise levels must fall from node to node")
    if not 1 <= steps <= m - 1:
        raise ValueError(f"{m} nodes allow 1 to {m - 1} steps, not {steps}")
    c[np.tril_indices(m)] = np.inf
    best, came_from = c[0].copy(), np.zeros((steps, m), dtype=np.int64)
    for k in range(1, steps):
        through = np.maximum(best[:, None], c) if worst else best[:, None] + c
        came_from[k] = np.argmin(through, axis=0)
        best = through[came_from[k], np.arange(m)]
    path = [m - 1]
    for k in range(steps - 1, 0, -1):
        path.append(int(came_from[k, path[-1]]))
    return np.array([0, *path[::-1]], dtype=np.int64)
