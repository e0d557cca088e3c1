"""Frechet distance between two sets of features, e.g. of `vivace.world.verifier.Verifier.features`."""

from __future__ import annotations

from typing import Any

import numpy as np

from vivace.core.errors import ConfigError

VERSION = "1"
LEAST = 2
"""Rows needed for every feature: with fewer the covariance is singular and the distance mostly bias."""


def frechet_distance(a: Any, b: Any, *, least: int = LEAST) -> float:
    """Squared Frechet (Wasserstein-2) distance of Gaussians fitted to two feature sets (arXiv 1706.08500, eq. 6).

    Args:
        a, b: features (N, D), numpy or torch, any N of at least `least` * D rows each.
        least: rows wanted for every feature; the estimate is biased upwards at any finite N, so compare equal N only.

    Returns: |mean difference|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), not negative.

    Raises:
        ConfigError: shapes differ, values are not finite, or there are too few rows.
    """
    x, y = (np.asarray(getattr(v, "cpu", lambda v=v: v)(), dtype=np.float64) for v in (a, b))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ConfigError(f"features must be two tables (N, D) of one width, not {x.shape} and {y.shape}.")
    if min(len(x), len(y)) < least * x.shape[1]:
        raise ConfigError(
            f"{x.shape[1]} features need at least {least * x.shape[1]} clips on both sides, "
            f"not {len(x)} and {len(y)}; make more clips."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError("the features hold values that are not finite; look for broken clips.")
    means = x.mean(axis=0) - y.mean(axis=0)
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # tr (S T)^(1/2) through the symmetric S^(1/2) T S^(1/2), whose eigenvalues are real and not negative.
    values, axes = np.linalg.eigh(np.atleast_2d(s))
    root = (axes * np.sqrt(values.clip(min=0.0))) @ axes.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(t) @ root).clip(min=0.0)
    return max(
        0.0,
        float(
            means @ means + np.trace(np.atleast_2d(s)) + np.trace(np.atleast_2d(t)) - 2 * np.sqrt(cross).sum()
        ),
    )
