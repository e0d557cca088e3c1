"""Weights of a solver, fitted in closed loop so that every step lands on the model's own exact trajectory.

A multistep solver that evaluates the network at the noise levels t_0 > ... > t_(K-1) makes each sample a weighted sum

    x_(k+1) = a_k x_0 + sum_(i <= k) b_ki v_i,      v_i the network's output at (x_i, t_i)

(non-stationary solvers: Shaul et al., "Bespoke Non-Stationary Solvers", arXiv 2403.01329, eq. 7). Here the weights are
not trained by gradients: step k takes those of least squares to the exact run's latent at t_(k+1), over the outputs
that the fitted solver itself has met so far, so that a step also mends what the steps before it left wrong.

Steps before the first gap are the exact run's own: nothing is fitted there, the run's scheduler takes them, and x_0
above is the sample that the first fitted step starts from.

Legend: B samples; latents are (B, C, ...), the exact run's (n + 1, B, C, ...) over its grid; F features a step.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vivace.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

Pair = Callable[["torch.Tensor", "torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]
"""(sample, timestep) to the network's (conditional, unconditional) outputs."""

KINDS = ("guided", "pair")
_RIDGE = 1e-10
"""Of the mean diagonal of the normal equations: features are nearly parallel, and rounding must not be fitted."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What a step is a sum of: the starting noise and the guided outputs, or both branches' outputs apart.

    Attributes:
        kind: one of `KINDS`.
    """

    kind: str = "guided"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"'{self.kind}' is no basis; choose from {', '.join(KINDS)}.")

    def features(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> list[torch.Tensor]:
        """What one evaluation adds."""
        if self.kind == "pair":
            return [cond, uncond]
        return [uncond + guidance * (cond - uncond)]


def own_steps(nodes: Sequence[int], grid: int) -> int:
    """How many steps at the beginning are the exact run's own: from one step of its grid to the next."""
    return next((k for k, to in enumerate((*nodes[1:], grid)) if to != k + 1), len(nodes))


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted solver.

    Attributes:
        nodes: steps of the exact grid that are computed.
        basis: what a fitted step is a sum of.
        own: steps at the beginning that the exact run's scheduler takes.
        weights: (F_k,) float64 of every other step: of the sample the first of them starts from, and of all outputs.
    """

    nodes: tuple[int, ...]
    basis: Basis
    own: int
    weights: tuple[torch.Tensor, ...]

    def run(self, pair: Pair, states: torch.Tensor, times: torch.Tensor, guidance: float) -> torch.Tensor:
        """The final latent of a run whose first `own` + 1 samples are the exact run's `states`."""
        outputs, x = begun(pair, states, times, self.own, guidance, self.basis), states[self.own]
        features = [x, *outputs]
        for node, weights in zip(self.nodes[self.own :], self.weights, strict=True):
            features += self.basis.features(*pair(x, times[node]), guidance)
            x = combined(weights, features)
        return x


def begun(
    pair: Pair, states: torch.Tensor, times: torch.Tensor, own: int, guidance: float, basis: Basis
) -> list[torch.Tensor]:
    """What the evaluations of the exact run's own steps add."""
    return [f for k in range(own) for f in basis.features(*pair(states[k], times[k]), guidance)]


@dataclass(frozen=True, slots=True)
class Fit:
    """What a fit gives: the solver, the latent it ends on, and the relative error of every fitted step's latent."""

    fitted: Fitted
    end: torch.Tensor
    errors: tuple[float, ...]


def combined(weights: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_f w_f features_f with weights (F,), in the features' type."""
    out = float(weights[0]) * features[0]
    for weight, value in zip(weights.tolist()[1:], features[1:], strict=True):
        out = out + weight * value
    return out


def least_squares(
    features: Sequence[torch.Tensor], goal: torch.Tensor, ridge: float = _RIDGE
) -> torch.Tensor:
    """(F,) float64 weights on the CPU: the least squares fit of `goal` by `features`, all (B, C, ...)."""
    import torch

    table = torch.stack([f.flatten() for f in features]).double()
    normal, right = (table @ table.T).cpu(), (table @ goal.flatten().double()).cpu()
    # Features of unit length, so that the ridge weighs all of them alike.
    scale = normal.diagonal().clamp_min(1e-300).sqrt()
    normal = normal / (scale[:, None] * scale) + ridge * torch.eye(len(scale), dtype=normal.dtype)
    return torch.linalg.solve(normal, right / scale) / scale


def fit_along(
    pair: Pair,
    states: torch.Tensor,
    times: torch.Tensor,
    nodes: Sequence[int],
    guidance: float,
    basis: Basis,
    *,
    cache: MutableMapping[Any, Any] | None = None,
) -> Fit:
    """Fit a solver that computes the steps `nodes` of the exact run's grid.

    Args:
        pair: the network on these samples.
        states: (n + 1, B, C, ...) the exact run's latents, the noise first.
        times: (n,) its timesteps.
        nodes: computed steps, rising, 0 first.
        guidance: the guidance scale.
        basis: what the steps are sums of.
        cache: evaluations by the steps before them: candidates that begin alike share them.

    Raises:
        ConfigError: the nodes do not rise from 0 within the grid.
    """
    n = len(times)
    if not nodes or nodes[0] != 0 or any(a >= b for a, b in zip(nodes, [*nodes[1:], n], strict=True)):
        raise ConfigError(f"computed steps must rise from 0 to below {n}.")
    own = own_steps(nodes, n)
    outputs, x, weights, errors = list[Any](), states[own], [], []
    for k, node in enumerate(nodes):
        key = tuple(nodes[: k + 1])
        known = None if cache is None else cache.get(key)
        if known is None:
            known = basis.features(*pair(states[k] if k < own else x, times[node]), guidance)
            if cache is not None:
                cache[key] = known
        outputs += known
        if k < own:
            continue
        features = [states[own], *outputs]
        goal = states[nodes[k + 1] if k + 1 < len(nodes) else n]
        w = least_squares(features, goal)
        x = combined(w, features)
        weights.append(w)
        errors.append(float((x - goal).norm() / goal.norm()))
    return Fit(Fitted(tuple(nodes), basis, own, tuple(weights)), x, tuple(errors))


def refine(
    pair: Pair,
    states: torch.Tensor,
    times: torch.Tensor,
    fitted: Fitted,
    guidance: float,
    *,
    together: int = 4,
    damping: float = 1e-2,
) -> tuple[Fitted, float, float]:
    """One Gauss-Newton step on the error of the final latent, over all weights at once.

    The Jacobian is measured: every weight direction is moved by as much as its step was off, and the run is followed to
    its end. Directions are those in which a step's features are uncorrelated.

    Args:
        pair: the network on these samples; it is called with `together` copies of them.
        states, times: see `fit_along`.
        together: directions that run side by side.
        damping: of the mean diagonal of the normal equations (Levenberg).

    Returns:
        The better of the old solver and the moved ones (a whole step, a half, a quarter), and both errors.
    """
    import torch

    goal = states[-1]
    norm = goal.flatten(1).norm(dim=1).reshape(-1, *[1] * (goal.ndim - 1))
    base = _Walk(pair, times, fitted, guidance, states)
    residual = ((base.end - goal) / norm).flatten().double()
    before = float(residual.norm())
    if not fitted.weights:
        return fitted, before, before
    turns = [base.directions(k) for k in range(len(fitted.weights))]
    columns: list[torch.Tensor] = []
    for k, turn in enumerate(turns):
        for i in range(0, len(turn), together):
            moved = base.moved(k, list(turn[:, i : i + together].T))
            columns += [((end - base.end) / norm).flatten().float() for end in moved]
    jacobian = torch.stack(columns, 1)
    normal = (jacobian.T @ jacobian).double().cpu()
    right = (jacobian.T @ residual.float()).double().cpu()
    normal += damping * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    step = -torch.linalg.solve(normal, right)
    best, best_error = fitted, before
    for share in (1.0, 0.5, 0.25):
        at, weights = 0, []
        for old, turn in zip(fitted.weights, turns, strict=True):
            weights.append(old + share * (turn @ step[at : at + len(turn)]))
            at += len(turn)
        trial = replace(fitted, weights=tuple(weights))
        end = trial.run(pair, states, times, guidance)
        error = float(((end - goal) / norm).flatten().double().norm())
        if error < best_error:
            best, best_error = trial, error
            break
    return best, before, best_error


class _Walk:
    """A run of a fitted solver that remembers its features, so that it can be left at any fitted step."""

    def __init__(
        self, pair: Pair, times: torch.Tensor, fitted: Fitted, guidance: float, states: torch.Tensor
    ) -> None:
        self.pair, self.times, self.fitted, self.guidance, self.states = pair, times, fitted, guidance, states
        x = states[fitted.own]
        features = [x, *begun(pair, states, times, fitted.own, guidance, fitted.basis)]
        self.nodes = (*fitted.nodes[fitted.own :], len(times))
        self.samples, self.known = [x], []
        for node, weights in zip(self.nodes, fitted.weights, strict=False):
            features = features + fitted.basis.features(*pair(x, times[node]), guidance)
            x = combined(weights, features)
            self.known.append(features)
            self.samples.append(x)
        self.end = x

    def directions(self, k: int) -> torch.Tensor:
        """(F, F), moves of fitted step k's weights as columns: uncorrelated, each as large as the step is off."""
        import torch

        off = (self.samples[k + 1] - self.states[self.nodes[k + 1]]).double().norm()
        table = torch.stack([f.flatten() for f in self.known[k]]).double()
        values, vectors = torch.linalg.eigh((table @ table.T).cpu())
        values = values.clamp_min(values.max() * _RIDGE)
        return vectors / values.sqrt() * off.cpu()

    def moved(self, k: int, moves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Final latents of runs whose fitted step k has weights moved by each of `moves` (F,)."""
        import torch

        fitted, count = self.fitted, len(moves)
        x = torch.cat([combined(fitted.weights[k] + m, self.known[k]) for m in moves])
        features = [torch.cat([f] * count) for f in self.known[k]]
        for node, weights in zip(self.nodes[k + 1 :], fitted.weights[k + 1 :], strict=False):
            features = features + fitted.basis.features(*self.pair(x, self.times[node]), self.guidance)
            x = combined(weights, features)
        return list(x.chunk(count))
