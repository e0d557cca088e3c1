"""The Frechet distance against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.evaluation.metrics import frechet_distance


def test_equal_sets_are_at_zero():
    x = np.random.default_rng(0).normal(size=(200, 6))
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(torch.tensor(x), x) == pytest.approx(0.0, abs=1e-9)


def test_shift_and_scale_have_a_closed_form():
    x = np.random.default_rng(1).normal(size=(500, 4))
    shift = np.array([1.0, -2.0, 0.5, 0.0])
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-9)
    # Scaling by c: the means differ by (c - 1) m, and tr(S + c^2 S - 2 c S) = (1 - c)^2 tr S.
    mean, trace = x.mean(axis=0), float(np.trace(np.cov(x, rowvar=False)))
    assert frechet_distance(x, 3.0 * x) == pytest.approx(4.0 * float(mean @ mean) + 4.0 * trace, rel=1e-9)


def test_rotation_of_correlated_features_matters_and_is_symmetric():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(400, 2)) @ np.array([[3.0, 0.0], [0.0, 0.2]])
    y = x[:, ::-1].copy()
    assert frechet_distance(x, y) > 1.0
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (np.zeros((5, 4)), np.zeros((50, 4)), "at least 8 clips"),
        (np.zeros((50, 4)), np.zeros((50, 3)), "one width"),
        (np.full((50, 4), np.nan), np.zeros((50, 4)), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, says):
    with pytest.raises(ConfigError, match=says):
        frechet_distance(a, b)
