"""Predictors: how a value that is not computed is made from remembered ones.

Every predictor here is linear: the prediction at coordinate t is sum_k w_k(t) V_k over the remembered values, newest
first. The weights depend on coordinates only, so they are Python floats: no synchronisation with the device, and the
gain sum_k |w_k| tells how much noise of the values (quantisation) is amplified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
        n = min(len(nodes), self.depth)
        return tuple(
            math.prod((at - nodes[j]) / (nodes[k] - nodes[j]) for j in range(n) if j != k) for k in range(n)
        )


@dataclass(frozen=True, slots=True)
class Taylor(Predictor):
    """TaylorSeer (arXiv 2503.06923, eq. 5): sum_i D^i / i! * k^i with backward differences D^i per unit of N^i.

    N is the distance of the two newest computed steps, k the distance to the newest. Differences are taken as if the
    remembered steps were equally far apart, as in the paper.
    """

    order: int = 1

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        n = min(len(nodes), self.depth)
        w = [0.0] * n
        ratio = (at - nodes[0]) / (nodes[0] - nodes[1]) if n > 1 else 0.0
        for i in range(n):
            for j in range(i + 1):
                w[j] += ratio**i / math.factorial(i) * (-1) ** j * math.comb(i, j)
        return tuple(w)


@dataclass(frozen=True, slots=True)
class Hermite(Predictor):
    """HiCache (arXiv 2508.16984): Taylor's powers replaced by contracted Hermite polynomials.

    k^i becomes s^i H_i(s k) with the physicists' Hermite polynomial and contraction s < 1; differences as in `Taylor`.
    """

    order: int = 2
    contraction: float = 0.5

    @property
    def depth(self) -> int:
        return self.order + 1

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        n = min(len(nodes), self.depth)
        w = [0.0] * n
        ratio = (at - nodes[0]) / (nodes[0] - nodes[1]) if n > 1 else 0.0
        s = self.contraction
        for i in range(n):
            basis = 1.0 if i == 0 else s**i * hermite(i, s * ratio)
            for j in range(i + 1):
                w[j] += basis / math.factorial(i) * (-1) ** j * math.comb(i, j)
        return tuple(w)


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
    """FoCa's forecast and calibration (arXiv 2508.16211): a BDF2 predictor, corrected by Heun's trapezium.

    The feature is taken as the solution of an ODE F' = f(t). The slope f at the newest node is the one of the parabola
    (BDF2, variable step) through the last three values; the corrector averages it with the slope extrapolated to the
    target. Three nodes; with fewer it is a straight line or reuse.
    """

    corrector: bool = True

    @property
    def depth(self) -> int:
        return 3

    def weights(self, nodes: Sequence[float], at: float) -> tuple[float, ...]:
        n = min(len(nodes), 3)
        if n == 1:
            return (1.0,)
        k = at - nodes[0]
        slope = derivative(nodes[:n], nodes[0])
        if self.corrector and n == 3:
            ahead = derivative(nodes[:n], at)
            slope = tuple(0.5 * (a + b) for a, b in zip(slope, ahead, strict=True))
        return tuple((1.0 if i == 0 else 0.0) + k * s for i, s in enumerate(slope))


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
