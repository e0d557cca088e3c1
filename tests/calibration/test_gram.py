"""The error algebra against explicit vectors of smooth random trajectories."""

from __future__ import annotations

import numpy as np
import pytest

from vivace.calibration.gram import (
    coordinates,
    gram,
    lagrange_weights,
    mean_gram,
    schedule_error,
    step_errors,
)
from vivace.core.errors import ConfigError

N, WIDE = 12, 40


def sigmas(n: int = N, shift: float = 3.0) -> np.ndarray:
    s = np.linspace(1.0, 0.0, n + 1)
    return shift * s / (1.0 + (shift - 1.0) * s)


def trajectory(seed: int, degree: int = 6, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Smooth conditional and unconditional outputs (n, WIDE), polynomials in sigma."""
    rng = np.random.default_rng(seed)
    powers = np.vander(sigmas(n)[:-1], degree + 1)
    c = powers @ rng.normal(size=(degree + 1, WIDE))
    return c, c - 0.3 * powers @ rng.normal(size=(degree + 1, WIDE))


def extrapolated(values: np.ndarray, x: np.ndarray, computed: list[int], order: int) -> np.ndarray:
    """The same schedule by fitting polynomials to the vectors themselves."""
    out = values.copy()
    for j in range(len(values)):
        if j not in computed:
            nodes = [k for k in computed if k < j][-(order + 1) :]
            fit = np.linalg.solve(np.vander(x[nodes]), values[nodes])
            out[j] = np.vander([x[j]], len(nodes))[0] @ fit
    return out


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("coordinate", ["sigma", "step"])
def test_schedule_error_is_that_of_the_vectors(order: int, coordinate: str) -> None:
    c, u = trajectory(order)
    cond, delta, g = [0, 1, 2, 4, 7, 9], [0, 1, 4, 9], 5.0
    x, a = coordinates(sigmas(), coordinate), np.diff(sigmas())
    exact = c + (g - 1) * (c - u)
    made = extrapolated(c, x, cond, order) + (g - 1) * extrapolated(c - u, x, delta, order)
    scale = np.sqrt((c**2).sum(1).mean())
    local = np.linalg.norm(a[:, None] * (made - exact), axis=1) / scale
    end = np.linalg.norm((a[:, None] * (made - exact)).sum(0)) / scale
    found = schedule_error(gram(c, u), sigmas(), cond, delta, order, g, coordinate)
    assert found["sum"] == pytest.approx(local.sum(), rel=1e-6)
    assert found["max"] == pytest.approx(local.max(), rel=1e-6)
    assert found["end"] == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_are_predicted_without_error_from_their_degree_on(order: int) -> None:
    c, u = trajectory(3, degree=order)
    steps = [0, 1, 2, 5]
    error = schedule_error(gram(c, u), sigmas(), steps, None, order, 4.0)["end"]
    assert error < 1e-6
    if order:
        assert schedule_error(gram(c, u), sigmas(), steps, None, order - 1, 4.0)["end"] > 1e-3


def test_step_errors_are_squared_lengths() -> None:
    c, _ = trajectory(4)
    nodes, at = np.array([[0, 3], [2, 4]]), np.array([5, 9])
    weights = np.array([[-0.5, 1.4], [0.2, 0.9]])
    explicit = [((w @ c[k] - c[j]) ** 2).sum() for w, k, j in zip(weights, nodes, at, strict=True)]
    assert step_errors(c @ c.T, nodes, at, weights) == pytest.approx(explicit)


def test_weights_reproduce_polynomials() -> None:
    nodes = np.array([0.9, 0.5, 0.2])
    weights = lagrange_weights(nodes, 0.05)
    for power in range(3):
        assert weights @ nodes**power == pytest.approx(0.05**power)
    assert weights @ nodes**3 != pytest.approx(0.05**3)


def test_gram_is_normalised_and_averaged_by_clip() -> None:
    (c, u), (c2, _) = trajectory(5), trajectory(6)
    g = gram(c.reshape(N, 4, 10), u.reshape(N, 4, 10))
    assert np.trace(g[:N, :N]) == pytest.approx(N)
    assert g == pytest.approx(gram(1000 * c, 1000 * u))
    assert mean_gram([g, gram(c2)])[:N, N:] == pytest.approx(g[:N, N:] / 2)


def test_a_schedule_must_start_with_the_first_step() -> None:
    c, u = trajectory(7)
    with pytest.raises(ConfigError, match="must hold 0"):
        schedule_error(gram(c, u), sigmas(), [1, 2], None)
    with pytest.raises(ConfigError, match="no coordinate"):
        schedule_error(gram(c, u), sigmas(), [0], None, coordinate="time")


@pytest.mark.parametrize("coordinate", ["sigma", "step", "log"])
def test_coordinates_never_coincide(coordinate: str) -> None:
    x = coordinates([1.0, 0.99999, 0.5, 0.00005, 0.0], coordinate)
    assert len(set(x.tolist())) == 4
