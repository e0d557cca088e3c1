"""Error algebra of a trajectory: what any schedule with any linear predictor would cost, without the network.

The exact run gives network outputs c_i (conditional) and d_i = c_i - u_i (guidance delta), i = 0..n-1. A predictor
that answers step j with sum_k w_jk c_k has the error vector e = sum_k w_jk c_k - c_j, whose squared length is a
quadratic form in the inner products of the c's. Sampling with v = c + (g - 1) d and steps a_j = sigma_(j+1) - sigma_j
moves the final latent, to first order, by sum_j a_j (e^c_j + (g - 1) e^d_j): a quadratic form again. So the (2n, 2n)
Gram matrix of [c_0 .. c_(n-1), d_0 .. d_(n-1)] holds all that is needed.

It is normalised by the mean of |c_i|^2, so an error of 0.01 is one hundredth of a network output's length. It is an
estimate: errors are taken along the exact trajectory, and what they do to later outputs is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vivace.core.errors import ConfigError

COORDINATES = ("sigma", "step", "log")
"""In what a predictor extrapolates: noise level, step number, or the logarithm of sigma / (1 - sigma)."""
_CHUNK = 1 << 18


def gram(cond: np.ndarray, uncond: np.ndarray | None = None) -> np.ndarray:
    """The normalised Gram matrix of one clip.

    Args:
        cond: conditional outputs (n, ...), one row for each step.
        uncond: unconditional outputs of the same shape; None without guidance, which makes all deltas zero.

    Returns:
        (2n, 2n) float64; the first n diagonal entries have mean 1.
    """
    n = len(cond)
    c = cond.reshape(n, -1)
    u = c if uncond is None else uncond.reshape(n, -1)
    out = np.zeros((2 * n, 2 * n))
    for start in range(0, c.shape[1], _CHUNK):
        part = c[:, start : start + _CHUNK].astype(np.float64)
        both = np.concatenate([part, part - u[:, start : start + _CHUNK]])
        out += both @ both.T
    scale = float(np.trace(out[:n, :n])) / n
    return out / scale if scale > 0 else out


def mean_gram(clips: Iterable[np.ndarray]) -> np.ndarray:
    """Mean over clips of their normalised matrices."""
    return np.mean(list(clips), axis=0)


def lagrange_weights(nodes: Sequence[float] | np.ndarray, at: float | np.ndarray) -> np.ndarray:
    """Weights w with p(at) = sum_k w_k p(nodes_k) for every polynomial p of degree below the number of nodes.

    Args:
        nodes: (..., k) coordinates, distinct along the last axis.
        at: (...) where to evaluate.

    Returns:
        (..., k), rows that sum to 1.
    """
    x = np.asarray(nodes, dtype=np.float64)
    to = np.asarray(at, dtype=np.float64)
    weights = np.ones_like(x)
    for k in range(x.shape[-1]):
        for m in range(x.shape[-1]):
            if m != k:
                weights[..., k] *= (to - x[..., m]) / (x[..., k] - x[..., m])
    return weights


def step_errors(g: np.ndarray, nodes: np.ndarray, at: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Squared errors of predictions, in units of the Gram matrix.

    Args:
        g: (n, n) Gram matrix of one stream.
        nodes: (..., k) indices that the prediction uses.
        at: (...) index that is predicted.
        weights: (..., k).

    Returns:
        (...) squared lengths of sum_k w_k v_k - v_at.
    """
    nodes, at = np.asarray(nodes), np.asarray(at)
    among = np.einsum("...k,...m,...km->...", weights, weights, g[nodes[..., :, None], nodes[..., None, :]])
    across = np.einsum("...k,...k->...", weights, g[nodes, at[..., None]])
    return np.maximum(among - 2.0 * across + g[at, at], 0.0)


def coordinates(sigmas: Sequence[float] | np.ndarray, coordinate: str = "sigma") -> np.ndarray:
    """Coordinates (n,) of the steps.

    Raises:
        ConfigError: an unknown name.
    """
    s = np.asarray(sigmas, dtype=np.float64)[:-1]
    if coordinate == "sigma":
        return s
    if coordinate == "step":
        return np.arange(len(s), dtype=np.float64)
    if coordinate == "log":
        s = np.clip(s, 1e-4, 1.0 - 1e-4) if s.max() <= 1.0 else s / (1.0 + s)
        # Clipped ends would fall together; the step number keeps them apart.
        return np.log(s / (1.0 - s)) - 1e-6 * np.arange(len(s))
    raise ConfigError(f"'{coordinate}' is no coordinate; the coordinates are {', '.join(COORDINATES)}.")


def error_rows(computed: np.ndarray, x: np.ndarray, order: int) -> np.ndarray:
    """What each step's prediction error is made of.

    Args:
        computed: (n,) bool; the first step must be computed.
        x: (n,) coordinates.
        order: degree of the extrapolation through the last order + 1 computed steps; lower where fewer exist.

    Returns:
        (n, n): row j holds weights w with error_j = sum_k w_k v_k; zero where step j is computed.
    """
    n = len(x)
    rows = np.zeros((n, n))
    steps = np.flatnonzero(computed)
    skipped = np.flatnonzero(~computed)
    if not len(skipped):
        return rows
    known = np.searchsorted(steps, skipped)
    for use in range(1, order + 2):
        chosen = known == use if use < order + 1 else known >= use
        at = skipped[chosen]
        if len(at):
            nodes = steps[known[chosen][:, None] - use + np.arange(use)]
            rows[at[:, None], nodes] = lagrange_weights(x[nodes], x[at])
            rows[at, at] = -1.0
    return rows


def schedule_error(
    g: np.ndarray,
    sigmas: Sequence[float] | np.ndarray,
    cond_steps: Iterable[int],
    delta_steps: Iterable[int] | None,
    order: int = 0,
    guidance: float = 1.0,
    coordinate: str = "sigma",
) -> dict[str, float]:
    """Predicted errors of computing some steps only.

    Args:
        g: (2n, 2n) Gram matrix.
        sigmas: (n + 1,) noise levels.
        cond_steps: steps at which the conditional output is computed; 0 must be one of them.
        delta_steps: steps at which the guidance delta is computed; None for the same steps.
        order: degree of the extrapolation.
        guidance: the guidance scale.
        coordinate: one of `COORDINATES`.

    Returns:
        `sum` and `max` of the steps' errors, and `end`, the error of the final latent; lengths, not squares.

    Raises:
        ConfigError: step 0 is not computed, or a step does not exist.
    """
    n = len(g) // 2
    cond = set(cond_steps)
    delta = cond if delta_steps is None else set(delta_steps)
    return vector_errors(
        g,
        np.diff(np.asarray(sigmas, dtype=np.float64)),
        error_rows(mask(cond, n), coordinates(sigmas, coordinate), order),
        error_rows(mask(delta, n), coordinates(sigmas, coordinate), order) if guidance != 1.0 else None,
        guidance,
    )


def vector_errors(
    g: np.ndarray, strides: np.ndarray, cond: np.ndarray, delta: np.ndarray | None, guidance: float
) -> dict[str, float]:
    """As `schedule_error`, from the (n, n) error rows of both streams and strides (n,) = differences of sigma."""
    n = len(strides)
    rows = np.zeros((n, 2 * n))
    rows[:, :n] = cond
    if delta is not None:
        rows[:, n:] = (guidance - 1.0) * delta
    rows *= strides[:, None]
    local = np.sqrt(np.maximum(np.einsum("jk,jk->j", rows @ g, rows), 0.0))
    whole = rows.sum(0)
    return {
        "sum": float(local.sum()),
        "max": float(local.max(initial=0.0)),
        "end": float(np.sqrt(max(float(whole @ g @ whole), 0.0))),
    }


def mask(steps: Iterable[int], n: int) -> np.ndarray:
    """(n,) bool of a set of steps.

    Raises:
        ConfigError: a step does not exist, or step 0 is not among them.
    """
    chosen = sorted(set(steps))
    if not chosen or chosen[0] != 0 or chosen[-1] >= n:
        raise ConfigError(f"computed steps must hold 0 and lie below {n}; these are {chosen}.")
    out = np.zeros(n, dtype=bool)
    out[chosen] = True
    return out
