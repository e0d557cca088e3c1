"""The Frechet distance against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.evaluation.metrics import frechet_distance
from vivace.evaluation.metrics.frechet import LEAST_CLIPS, FrechetFrames, frechet_value


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


def test_few_clips_are_refused_with_what_to_use():
    rows = np.random.default_rng(3).normal(size=(400, 8))
    with pytest.raises(
        ConfigError, match="mostly bias with 400 clips and is given for 2000 or more; use frame_mmd"
    ):
        FrechetFrames().distance(rows, rows, range(400))
    wide = np.zeros((10, 12))
    with pytest.raises(ConfigError, match="13 or more"):
        frechet_value("wide", wide, wide, range(10), least_clips=5)


def test_large_sets_get_a_value_an_interval_and_a_warning():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(LEAST_CLIPS, 5))
    y = rng.normal(size=(LEAST_CLIPS, 5)) + 0.3
    groups = [i // 2 for i in range(LEAST_CLIPS)]
    found = FrechetFrames().distance(x, y, groups)["frechet_frames"]
    assert found.value == pytest.approx(frechet_distance(x, y))
    assert found.low < 5 * 0.3**2 < found.high
    assert found.p is None
    assert "2000" in found.note
    assert FrechetFrames().distance(x, x, groups)["frechet_frames"].value == pytest.approx(0.0, abs=1e-9)


def test_the_interval_covers_and_the_bias_is_why_few_clips_are_refused():
    """Sets of one kind: the kernel distance is 0 on average, and this one is not, the less so the fewer the clips."""
    rng = np.random.default_rng(5)
    bias = {}
    for count in (40, 400):
        both = rng.normal(size=(20, 2, count, 16))
        bias[count] = np.mean([frechet_distance(a, b) for a, b in both])
    assert bias[40] > 5 * bias[400] > 0.1
    held = 0
    for _ in range(100):
        x, y = rng.normal(size=(2, 300, 2))
        found = frechet_value("small", x, y + 1.0, range(300), least_clips=100)
        held += found.low <= 2.0 <= found.high
    assert 85 <= held <= 100
