"""Fitting a solver: against numpy, and on trajectories whose exact solver is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.calibration.fitting import Basis, Fitted, combined, fit_along, least_squares, own_steps, refine
from vivace.core.errors import ConfigError

N = 8
SIGMAS = torch.linspace(1.0, 0.0, N + 1).double()
TIMES = SIGMAS[:-1]
GUIDANCE = 3.0


def network(x, t):
    """A field that bends: both branches differ, and neither is linear in x."""
    return torch.tanh(1.5 * x + t.to(x)), 0.3 * x - torch.sin(2.0 * x)


def trajectory(samples: int = 6):
    """Euler's steps over the whole grid: (N + 1, B, C, T, H, W) float32."""
    x = torch.randn(samples, 2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    states = [x]
    for i in range(N):
        c, u = network(x, TIMES[i])
        x = x + float(SIGMAS[i + 1] - SIGMAS[i]) * (u + GUIDANCE * (c - u))
        states.append(x)
    return torch.stack(states)


def test_least_squares_is_numpys():
    make = torch.Generator().manual_seed(2)
    features = [torch.randn(4, 3, 2, 2, 2, generator=make) for _ in range(4)]
    goal = torch.randn(4, 3, 2, 2, 2, generator=make)
    table = np.stack([f.double().numpy().ravel() for f in features], 1)
    expected = np.linalg.lstsq(table, goal.double().numpy().ravel(), rcond=None)[0]
    assert least_squares(features, goal).numpy() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", ["guided", "pair"])
def test_all_steps_computed_are_the_exact_run(kind):
    """No step has a gap to bridge, so nothing is fitted and nothing is lost."""
    states = trajectory()
    fit = fit_along(network, states, TIMES, range(N), GUIDANCE, Basis(kind))
    assert fit.fitted.own == N
    assert fit.fitted.weights == fit.errors == ()
    assert torch.equal(fit.end, states[-1])
    assert torch.equal(fit.fitted.run(network, states, TIMES, GUIDANCE), states[-1])
    assert refine(network, states, TIMES, fit.fitted, GUIDANCE) == (fit.fitted, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["guided", "pair"])
def test_steps_before_the_first_gap_are_the_exact_runs(kind):
    states, nodes = trajectory(12), (0, 1, 2, 3, 4, 6)
    fit = fit_along(network, states, TIMES, nodes, GUIDANCE, Basis(kind))
    assert fit.fitted.own == own_steps(nodes, N) == 4
    assert [len(w) for w in fit.fitted.weights] == ([11, 13] if kind == "pair" else [6, 7])
    assert torch.allclose(fit.fitted.run(network, states, TIMES, GUIDANCE), fit.end)
    plain = euler(nodes).run(network, states, TIMES, GUIDANCE)
    assert fit.errors[-1] < 0.8 * float((plain - states[-1]).norm() / states[-1].norm())


@pytest.mark.parametrize("kind", ["guided", "pair"])
def test_a_known_linear_flow_is_landed_on_in_few_steps(kind):
    """dx/dt = x - 1 from t = 1 down: at all times x - 1 is a multiple of where it began, so one evaluation spans it.

    The trajectory is written down in closed form, not integrated.
    """

    def flow(x, t):
        return x - 1.0, x - 1.0

    x = trajectory()[0].double()
    states = torch.stack([1.0 + torch.exp(s - 1.0) * (x - 1.0) for s in SIGMAS])
    fit = fit_along(flow, states, TIMES, (0, 3, 6), GUIDANCE, Basis(kind))
    assert max(fit.errors) < 1e-6
    fresh = torch.randn(2, 2, 2, 3, 3, generator=torch.Generator().manual_seed(9)).double()
    end = fit.fitted.run(flow, fresh[None], TIMES, GUIDANCE)
    assert torch.allclose(end, 1.0 + float(np.exp(-1.0)) * (fresh - 1.0), atol=1e-6)


def euler(nodes):
    row, out = [1.0], []
    for here, there in zip(nodes, [*nodes[1:], N], strict=True):
        row = [*row, float(SIGMAS[there] - SIGMAS[here])]
        out.append(torch.tensor(row, dtype=torch.float64))
    return Fitted(tuple(nodes), Basis("guided"), 0, tuple(out))


def test_fitted_steps_beat_eulers_on_samples_they_have_not_seen():
    states, nodes = trajectory(24), (0, 2, 5)
    fitted = fit_along(network, states[:, :12], TIMES, nodes, GUIDANCE, Basis("guided")).fitted
    seen, goal = states[:, 12:], states[-1, 12:]

    def off(solver):
        return float((solver.run(network, seen, TIMES, GUIDANCE) - goal).norm() / goal.norm())

    assert off(fitted) < 0.5 * off(euler(nodes))


def test_a_cache_changes_nothing_and_saves_evaluations():
    states, cache, calls = trajectory(), {}, []

    def counted(x, t):
        calls.append(float(t))
        return network(x, t)

    for nodes in ((0, 2, 5), (0, 2, 6)):
        with_cache = fit_along(counted, states, TIMES, nodes, GUIDANCE, Basis("pair"), cache=cache)
        without = fit_along(network, states, TIMES, nodes, GUIDANCE, Basis("pair"))
        assert torch.equal(with_cache.end, without.end)
    assert len(calls) == 4  # the second candidate shares two of its three evaluations


@pytest.mark.parametrize("together", [1, 3])
def test_refining_never_makes_it_worse(together):
    states = trajectory()
    fitted = fit_along(network, states, TIMES, (0, 2, 5), GUIDANCE, Basis("pair")).fitted
    better, before, after = refine(network, states, TIMES, fitted, GUIDANCE, together=together)
    assert after <= before
    end = better.run(network, states, TIMES, GUIDANCE)
    goal = states[-1]
    norm = goal.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1, 1)
    assert float(((end - goal) / norm).norm()) == pytest.approx(after, rel=1e-4)


def test_combined_is_a_weighted_sum():
    features = [torch.ones(1, 2, 1, 1, 1), 10.0 * torch.ones(1, 2, 1, 1, 1)]
    assert combined(torch.tensor([3.0, 0.5]), features).flatten().tolist() == [8.0, 8.0]


@pytest.mark.parametrize("nodes", [(), (1, 2), (0, 3, 3), (0, 8)])
def test_steps_that_do_not_rise_within_the_grid_are_refused(nodes):
    with pytest.raises(ConfigError, match="rise from 0"):
        fit_along(network, trajectory(), TIMES, nodes, GUIDANCE, Basis("guided"))


def test_an_unknown_basis_is_refused():
    with pytest.raises(ConfigError, match="guided"):
        Basis("both")
