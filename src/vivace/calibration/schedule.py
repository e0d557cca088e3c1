"""Which steps to compute: shortest paths over computed steps, then a local search on the error of the final latent.

For the sum (OptimalSteps, arXiv 2503.21774) and the maximum (LeMiCa, arXiv 2511.00090) of the steps' errors a
path's cost depends on its last order + 1 computed steps only, so dynamic programming is exact for each stream; from
order 2 on a beam keeps the cheapest states. The error of the final latent is the length of a vector sum, in which
errors may cancel: it has no such shape, so the path for the sum is where a local search starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vivace.calibration.gram import (
    coordinates,
    error_rows,
    lagrange_weights,
    mask,
    step_errors,
    vector_errors,
)
from vivace.core.errors import ConfigError

OBJECTIVES = ("end", "sum", "max")
_BEAM = 12
"""States kept for each number of computed steps and last computed step, from order 2 on."""
_TRIALS = {"end": 3000, "sum": 700, "max": 700}
"""Most schedules a local search looks at; those of the final latent are quick to price."""
_SPLITS = 3
"""Splits of a budget that are searched further."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Computed steps of both streams and what they are predicted to cost (`sum`, `max`, `end`).

    The guidance delta needs both branches, so its steps are among the conditional ones. It is empty without guidance.
    """

    cond: tuple[int, ...]
    delta: tuple[int, ...]
    errors: tuple[tuple[str, float], ...] = ()

    @property
    def nfe(self) -> int:
        """Network evaluations."""
        return len(self.cond) + len(self.delta)

    def error(self, objective: str) -> float:
        """One of the predicted errors."""
        return dict(self.errors)[objective]


class Problem:
    """A trajectory and the rules its schedules obey.

    Args:
        gram: (2n, 2n) Gram matrix.
        sigmas: (n + 1,) noise levels.
        order: degree of the extrapolation, 0 to 2.
        guidance: the guidance scale; 1 for none.
        objective: one of `OBJECTIVES`.
        first, last: steps at the ends that are always computed (in both streams).
        max_gap: longest run of skipped steps of the conditional stream; None for no limit.
        coordinate: in what the predictor extrapolates.

    Raises:
        ConfigError: an unknown objective, or an order that is not simulated.
    """

    def __init__(
        self,
        gram: np.ndarray,
        sigmas: np.ndarray | list[float],
        *,
        order: int = 0,
        guidance: float = 1.0,
        objective: str = "end",
        first: int = 1,
        last: int = 0,
        max_gap: int | None = None,
        coordinate: str = "sigma",
    ) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(f"'{objective}' is no objective; the objectives are {', '.join(OBJECTIVES)}.")
        if not 0 <= order <= 2:
            raise ConfigError(f"order {order} is not simulated; the orders are 0, 1 and 2.")
        self.gram, self.n = np.asarray(gram, dtype=np.float64), len(gram) // 2
        self.x = coordinates(sigmas, coordinate)
        self.strides = np.diff(np.asarray(sigmas, dtype=np.float64))
        self.order, self.objective, self.guidance = order, objective, guidance
        self.guided = guidance != 1.0
        first = max(1, first)
        self.forced = frozenset(range(min(first, self.n))) | frozenset(range(self.n - last, self.n))
        self.max_gap = self.n if max_gap is None else max_gap
        self._runs: dict[int, _Runs] = {}
        self._parts: dict[tuple[int, ...], np.ndarray] = {}
        self._drifts: dict[frozenset[int], np.ndarray] = {}

    def runs(self, stream: int) -> _Runs:
        """Costs of runs of predicted steps in a stream (0 or n), kept between searches."""
        if stream not in self._runs:
            self._runs[stream] = _Runs(self, stream)
        return self._runs[stream]

    def errors(self, cond: frozenset[int], delta: frozenset[int]) -> dict[str, float]:
        """All predicted errors of a schedule."""
        rows = [error_rows(mask(s, self.n), self.x, self.order) for s in (cond, delta)[: 1 + self.guided]]
        return vector_errors(
            self.gram, self.strides, rows[0], rows[1] if self.guided else None, self.guidance
        )

    def value(self, cond: frozenset[int], delta: frozenset[int]) -> float:
        """The objective alone, quickly."""
        if self.objective != "end":
            return self.errors(cond, delta)[self.objective]
        whole = np.zeros(2 * self.n)
        whole[: self.n] = self._drift(cond)
        if self.guided:
            whole[self.n :] = (self.guidance - 1.0) * self._drift(delta)
        return float(np.sqrt(max(float(whole @ self.gram @ whole), 0.0)))

    def _drift(self, computed: frozenset[int]) -> np.ndarray:
        """(n,): the weights of a stream's outputs in the error of the final latent, put together run by run."""
        if (out := self._drifts.get(computed)) is not None:
            return out
        out, steps = np.zeros(self.n), [*sorted(computed), self.n]
        for i in range(1, len(steps)):
            if steps[i] - steps[i - 1] > 1:
                key = (*steps[max(0, i - self.order - 1) : i], -1, steps[i])
                if (part := self._parts.get(key)) is None:
                    part = self._parts[key] = self._part(key[:-2], steps[i])
                out += part
        self._drifts[computed] = out
        return out

    def _part(self, nodes: tuple[int, ...], stop: int) -> np.ndarray:
        out, at = np.zeros(self.n), np.arange(nodes[-1] + 1, stop)
        near = np.array(nodes)
        weights = lagrange_weights(np.tile(self.x[near], (len(at), 1)), self.x[at])
        out[near] = self.strides[at] @ weights
        out[at] -= self.strides[at]
        return out

    def gaps_fit(self, cond: frozenset[int]) -> bool:
        """Whether no run of skipped steps is too long."""
        steps = [*sorted(cond), self.n]
        return all(b - a - 1 <= self.max_gap for a, b in itertools.pairwise(steps))

    def made(self, cond: frozenset[int], delta: frozenset[int]) -> Schedule:
        """The schedule with its errors."""
        chosen = tuple(sorted(delta)) if self.guided else ()
        return Schedule(tuple(sorted(cond)), chosen, tuple(self.errors(cond, delta).items()))


def optimal(problem: Problem, budget_cond: int, budget_delta: int | None = None) -> Schedule:
    """The best schedule with `budget_cond` conditional and `budget_delta` guided steps (as many when left out).

    Raises:
        ConfigError: the budgets do not fit the rules; the sentence says why.
    """
    most = budget_cond if budget_delta is None else budget_delta
    cond = _paths(problem, 0, budget_cond).get(budget_cond)
    if cond is None:
        raise ConfigError(_unfit(problem, budget_cond))
    return _solve(problem, cond, most)


def split(problem: Problem, nfe: int) -> Schedule:
    """The best schedule of `nfe` evaluations in all, shared out between the two streams.

    Raises:
        ConfigError: the budget does not fit the rules.
    """
    objective = problem.objective
    if not problem.guided:
        return optimal(problem, nfe)
    paths = _paths(problem, 0, problem.n)
    least = len(problem.forced)
    starts = []
    for b, cond in paths.items():
        d = nfe - b
        if least <= d <= b:
            delta = _paths(problem, problem.n, d, cond)[d]
            starts.append((problem.errors(cond, delta)[objective], b, cond, d))
    if not starts:
        raise ConfigError(
            f"{nfe} evaluations cannot be shared out over {problem.n} steps of two branches under these rules; "
            f"give between {2 * min(paths, default=least)} and {2 * problem.n}."
        )
    solved = [_solve(problem, cond, d) for _, _, cond, d in sorted(starts, key=lambda s: s[:2])[:_SPLITS]]
    return min(solved, key=lambda s: s.error(objective))


def _unfit(problem: Problem, budget: int) -> str:
    return (
        f"{budget} computed of {problem.n} steps do not fit: {len(problem.forced)} are always computed and at most "
        f"{problem.max_gap} in a row may be skipped."
    )


def _solve(problem: Problem, cond: frozenset[int], most: int) -> Schedule:
    """Guided steps for a conditional path, and the local search from there."""
    if not problem.guided:
        return _best(problem, [(cond, cond), *((e, e) for e in _even(problem, len(cond)))])
    if not len(problem.forced) <= most <= len(cond):
        raise ConfigError(
            f"{most} guided steps do not fit: {len(problem.forced)} are always computed, and all lie among the "
            f"{len(cond)} conditional ones."
        )
    starts = [(c, _paths(problem, problem.n, most, c)[most]) for c in (cond, *_even(problem, len(cond)))]
    return _best(problem, starts)


def _best(problem: Problem, starts: list[tuple[frozenset[int], frozenset[int]]]) -> Schedule:
    return min((_search(problem, *s) for s in starts), key=lambda s: s.error(problem.objective))


def _even(problem: Problem, count: int) -> list[frozenset[int]]:
    """Evenly spread steps beside the forced ones, as another place to start from; empty where rules forbid them."""
    free = sorted(set(range(problem.n)) - problem.forced)
    places = np.linspace(0, len(free), count - len(problem.forced) + 2)[1:-1].astype(int)
    out = problem.forced | {free[i] for i in places.tolist() if i < len(free)}
    return [out] if len(out) == count and problem.gaps_fit(out) else []


def _search(problem: Problem, cond: frozenset[int], delta: frozenset[int]) -> Schedule:
    """Move one computed step at a time as long as the objective falls, nearest moves first."""
    best, value, trials = (cond, delta), problem.value(cond, delta), 0
    most = _TRIALS[problem.objective]
    if not problem.guided and problem.objective != "end" and problem.order < 2:
        return problem.made(cond, delta)  # the path is exact
    places = sorted(set(range(problem.n)) - problem.forced)
    pairs = sorted(itertools.permutations(places, 2), key=lambda p: (abs(p[0] - p[1]), p))
    improved = True
    while improved and trials < most:
        improved = False
        for old, new in pairs:
            for move in _moves(problem, *best, old, new):
                trials += 1
                found = problem.value(*move)
                if found < value * (1.0 - 1e-6) - 1e-15:
                    best, value, improved = move, found, True
                    break
            if trials >= most:
                break
    return problem.made(*best)


def _moves(
    problem: Problem, cond: frozenset[int], delta: frozenset[int], old: int, new: int
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Neighbours: a computed step goes from `old` to `new`, with its guidance or without; or its guidance alone."""
    if old not in cond:
        return
    if new not in cond:
        moved = cond - {old} | {new}
        if not problem.gaps_fit(moved):
            return
        if not problem.guided:
            yield moved, moved
        elif old not in delta:
            yield moved, delta
        else:
            # The guidance goes with it, or to another conditional step that has none.
            for at in (new, *sorted(cond - delta, key=lambda s: (abs(s - old), s))[:2]):
                yield moved, delta - {old} | {at}
    elif problem.guided and old in delta and new not in delta:
        yield cond, delta - {old} | {new}


def _paths(
    problem: Problem, stream: int, most: int, among: frozenset[int] | None = None
) -> dict[int, frozenset[int]]:
    """Cheapest path of one stream for every number of computed steps up to `most`.

    Args:
        stream: 0 for the conditional outputs, n for the deltas (where they begin in the Gram matrix).
        among: the steps that may be computed; all by default.

    A state is the last order + 1 computed steps, -1 where there are fewer. Layer b holds the cheapest path to each
    state with b computed steps.
    """
    n, keep = problem.n, problem.order + 1
    runs = problem.runs(stream)
    allowed = np.array([among is None or i in among for i in range(n)])
    forced = np.array([i in problem.forced for i in range(n)])
    longest = problem.max_gap if not stream else n
    states = np.full((1, keep), -1)
    states[0, -1] = 0
    costs, routes = np.zeros(1), [(0,)]
    out: dict[int, frozenset[int]] = {}
    for count in range(1, most + 1):
        total = _joined(costs[:, None], runs(states), problem.objective == "max")
        last = states[:, -1]
        # Column j: the next computed step is j, and those between are predicted; column n: the path ends.
        steps = np.arange(n + 1)
        before = np.concatenate([[0], np.cumsum(forced)])
        legal = (
            (steps > last[:, None])
            & (steps - last[:, None] - 1 <= longest)
            & (before[steps] == before[last + 1][:, None])
            & np.append(allowed, True)
        )
        total = np.where(legal, total, np.inf)
        if np.isfinite(total[:, n]).any():
            out[count] = frozenset(routes[int(np.argmin(total[:, n]))])
        if count == most:
            break
        source, target = np.nonzero(np.isfinite(total[:, :n]))
        if not len(source):
            break
        cost = total[source, target]
        new = np.concatenate([states[source, 1:], target[:, None]], 1)
        # The cheapest way to each state.
        order = np.argsort(cost, kind="stable")
        order = order[np.sort(np.unique(runs.codes(new[order]), return_index=True)[1])]
        if problem.order >= 2:
            order = order[_ranks(new[order, -1]) < _BEAM]
        states, costs = new[order], cost[order]
        routes = [(*routes[source[i]], int(target[i])) for i in order]
    return out


def _ranks(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    out = np.empty(len(values), dtype=int)
    out[order] = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    return out


class _Runs:
    """Cost of predicting all steps after a state's last one and before step j; every state is worked out once."""

    def __init__(self, problem: Problem, stream: int) -> None:
        n = problem.n
        self._g = problem.gram[stream : stream + n, stream : stream + n]
        self._x, self._worst = problem.x, problem.objective == "max"
        self._scale = np.abs(problem.strides) * (abs(problem.guidance - 1.0) if stream else 1.0)
        self._base = (n + 1) ** np.arange(problem.order + 1)
        self._where = np.full((n + 1) ** (problem.order + 1), -1)
        self._rows = np.zeros((0, n + 1))

    def codes(self, states: np.ndarray) -> np.ndarray:
        """A number for each state."""
        return (states + 1) @ self._base

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """(states, n + 1); column n is the cost of predicting everything to the end."""
        codes = self.codes(states)
        if len(new := np.flatnonzero(self._where[codes] < 0)):
            self._where[codes[new]] = len(self._rows) + np.arange(len(new))
            self._rows = np.concatenate([self._rows, self._work_out(states[new])])
        return self._rows[self._where[codes]]

    def _work_out(self, states: np.ndarray) -> np.ndarray:
        n, keep = len(self._g), states.shape[1]
        local = np.zeros((len(states), n))
        known = (states >= 0).sum(1)
        for use in range(1, keep + 1):
            rows = np.flatnonzero(known == use)
            if len(rows):
                nodes = np.repeat(states[rows, None, keep - use :], n, axis=1)
                at = np.broadcast_to(np.arange(n), nodes.shape[:2])
                weights = lagrange_weights(self._x[nodes], self._x[at])
                local[rows] = np.sqrt(step_errors(self._g, nodes, at, weights)) * self._scale
        local[np.arange(n) <= states[:, -1:]] = 0.0
        summed = np.maximum.accumulate(local, 1) if self._worst else np.cumsum(local, 1)
        return np.concatenate([np.zeros((len(states), 1)), summed], 1)


def _joined(costs: np.ndarray, run: np.ndarray, worst: bool) -> np.ndarray:
    return np.maximum(costs, run) if worst else costs + run
