"""Predictors: how a value that is not computed is made from remembered ones.

Every predictor here is linear: the prediction at coordinate t is sum_k w_k(t) V_k over the remembered values, newest
first. The weights depend on coordinates only, so they are Python floats: no synchronisation with the device, and the
gain sum_k |w_k| tells how much noise of the values (quantisation) is amplified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vivace.calibration.gram import lagrange_weights


@dataclass(frozen=True, slots=True)
class Predictor:
    """Base: reuse of the newest value."""

    @property
    def depth(self) -> int:
        """Values to remember."""
        return 1

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        """Weights of the remembered values. `nodes` are their coordinates, newest first; `at` is where to predict."""
        return (1.0,)

    def limited(self, nodes: Sequence[float], at: float, gain: float = math.inf) -> tuple[float, ...]:
        """Weights from as many nodes as keep the gain (sum of absolute weights) at or below `gain`."""
        for count in range(min(self.depth, len(nodes)), 1, -1):
            w = self.weights(nodes[:count], at)
            if sum(map(abs, w)) <= gain:
                return w
        return (1.0,)


@dataclass(frozen=True, slots=True)
class Lagrange(Predictor):
    """The polynomial of degree `order` through the last order + 1 values: exact on polynomials at any spacing."""

    order: int = 2

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        return tuple(lagrange_weights(nodes[: self.depth], at).tolist())


@dataclass(frozen=True, slots=True)
class Taylor(Predictor):
    """TaylorSeer (arXiv 2503.06923): sum_i D^i k^i / i!, with k the distance to the newest remembered value.

    D^0 is the newest value and D^i the difference of two neighbouring D^(i-1), divided by their distance; see
    `differences`. At equal distances N this is the paper's sum of (backward difference)_i / (i! N^i) k^i.
    """

    order: int = 1

    @property
    def depth(self) -> int:
        return self.order + 1

    def basis(self, i: int, k: float) -> float:
        """Factor of D^i at distance `k`."""
        return k**i / math.factorial(i)

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        n = min(len(nodes), self.depth)
        k = at - nodes[0]
        total = [0.0] * n
        for i, row in enumerate(differences(nodes[:n])):
            factor = self.basis(i, k)
            for j, d in enumerate(row):
                total[j] += factor * d
        return tuple(total)


@dataclass(frozen=True, slots=True)
class Hermite(Taylor):
    """HiCache (arXiv 2508.16984): Taylor's powers replaced by contracted Hermite polynomials.

    k^i becomes s^i H_i(s k) with the physicists' Hermite polynomial H_i and a contraction s < 1; k is counted in
    steps and the differences are those of `Taylor`.
    """

    order: int = 2
    contraction: float = 0.5

    def basis(self, i: int, k: float) -> float:
        return self.contraction**i * hermite(i, self.contraction * k) / math.factorial(i)


def differences(nodes: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Weights of the values whose sums are D^0, D^1, ... at the newest node, one row for each order.

    D^i_j = (D^(i-1)_j - D^(i-1)_(j+1)) / (t_j - t_(j+1)): what is known when differences are renewed at every computed
    step. They are i-th derivatives where the nodes are equally far apart.
    """
    n = len(nodes)
    level = [[1.0 if i == j else 0.0 for i in range(n)] for j in range(n)]
    out = [tuple(level[0])]
    for _ in range(1, n):
        level = [
            [(a - b) / (nodes[j] - nodes[j + 1]) for a, b in zip(level[j], level[j + 1], strict=True)]
            for j in range(len(level) - 1)
        ]
        out.append(tuple(level[0]))
    return tuple(out)


def hermite(order: int, x: float) -> float:
    """Physicists' Hermite polynomial H_order(x): H_0 = 1, H_1 = 2x, H_(n+1) = 2x H_n - 2n H_(n-1)."""
    before, now = 0.0, 1.0
    for n in range(order):
        before, now = now, 2.0 * x * now - 2.0 * n * before
    return now


@dataclass(frozen=True, slots=True)
class Momentum(Predictor):
    """FasterCache (arXiv 2410.19355, eq. 4): V_1 + (V_1 - V_2) w, whatever the distances."""

    weight: float = 0.5

    @property
    def depth(self) -> int:
        return 2

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        return (1.0,) if len(nodes) < 2 else (1.0 + self.weight, -self.weight)


@dataclass(frozen=True, slots=True)
class Bdf(Predictor):
    """FoCa's forecast and calibration (arXiv 2508.16211): a BDF2 forecast, calibrated by Heun's trapezium.

    The value is taken as the solution of an ODE. Forecast: P = V_0 + k f_0, where f_0 is the slope that the BDF2
    formula (variable step) gives at the newest of three values. Calibration: V_0 + k (f_0 + f_P) / 2, where f_P is the
    BDF2 slope of P, V_0, V_1 at the target. With two values it is their straight line, with one reuse.

    On a curved trajectory with computed steps h apart, the error is k^2 F'' / 2 before calibration and
    (1 + k / (k + h)) k^2 F'' / 4 after it.
    """

    calibrate: bool = True

    @property
    def depth(self) -> int:
        return 3

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        n = min(len(nodes), 3)
        k = at - nodes[0]
        if n == 1 or k == 0.0:
            return (1.0,) + (0.0,) * (n - 1)
        slope = derivative(nodes[:n], nodes[0])
        forecast = [(1.0 if i == 0 else 0.0) + k * s for i, s in enumerate(slope)]
        if n < 3 or not self.calibrate:
            return tuple(forecast)
        ahead = derivative((at, nodes[0], nodes[1]), at)
        known = (ahead[1], ahead[2], 0.0)
        steep = [ahead[0] * f + d for f, d in zip(forecast, known, strict=True)]
        return tuple(
            (1.0 if i == 0 else 0.0) + 0.5 * k * (a + b)
            for i, (a, b) in enumerate(zip(slope, steep, strict=True))
        )


def derivative(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights of the values whose sum is the derivative at `at` of the polynomial through them."""
    n, out = len(nodes), []
    for k in range(n):
        total = 0.0
        for skip in range(n):
            if skip == k:
                continue
            term = 1.0 / (nodes[k] - nodes[skip])
            for j in range(n):
                if j not in (k, skip):
                    term *= (at - nodes[j]) / (nodes[k] - nodes[j])
            total += term
        out.append(total)
    return tuple(out)
