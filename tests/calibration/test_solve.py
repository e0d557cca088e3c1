"""Thresholds on curves whose answers are known."""

from __future__ import annotations

import pytest

from vivace.calibration import solve
from vivace.calibration.solve import Guard
from vivace.core.errors import ConfigError


def share(skipped: list[bool]) -> float:
    return sum(skipped) / len(skipped)


def test_accumulated_change_by_hand() -> None:
    # 0.1 + 0.1 < 0.25, a third would reach it; the step that breaks the bound is computed and starts anew.
    assert solve.accumulated([0.0] + [0.1] * 6, 0.25, Guard()) == [
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    assert solve.accumulated([0.0] + [0.1] * 6, 9.0, Guard(first=2, last=1)) == [False] * 2 + [True] * 4 + [
        False
    ]
    assert solve.accumulated([0.0] + [0.1] * 6, 9.0, Guard(max_skip=1)) == [False, True] * 3 + [False]


def test_magcache_by_hand() -> None:
    # Ratios 0.9: errors 0.1, then 0.1 + 0.19, then 0.29 + 0.271.
    ratio = [1.0] + [0.9] * 9
    assert solve.magcache(ratio, 0.3, 5, 0.2) == [
        False,
        False,
        True,
        True,
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert solve.magcache(ratio, 0.3, 1, 0.2) == [False, False] + [True, False] * 4
    # A ratio above one makes up for one below: the product, not the sum, is compared with one.
    assert solve.magcache([1.0, 0.5, 2.0], 0.6, 5, 0.0) == [False, True, True]


def test_what_dips_below_zero_is_taken_away() -> None:
    assert solve.accumulated([0.0] + [-0.2] * 5, 0.45, Guard(last=1)) == [False] + [True] * 4 + [False]
    assert solve.accumulated([0.0, 0.3, -0.2, 0.3, 0.3], 0.45, Guard()) == [False, True, True, True, False]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.66])
def test_threshold_reaches_the_share(target: float) -> None:
    change = [0.0] + [0.05 + 0.001 * i for i in range(99)]
    found = solve.threshold_for(lambda t: share(solve.accumulated(change, t, Guard())), target, 0.1)
    assert abs(share(solve.accumulated(change, found, Guard())) - target) < 0.1
    # It does not sit on the edge of its stair.
    for near in (0.999, 1.001):
        assert solve.accumulated(change, found * near, Guard()) == solve.accumulated(change, found, Guard())


def test_the_middle_of_a_narrow_stair() -> None:
    found = solve.threshold_for(lambda t: 0.0 if t < 0.1 else 0.4 if t < 0.1004 else 1.0, 0.41)
    assert found == pytest.approx((0.1 * 0.1004) ** 0.5, rel=1e-6)


def test_the_fastest_within_a_bound() -> None:
    steps = {0.1: (0.2, 0.01), 0.2: (0.5, 0.05), 0.4: (0.6, 0.2)}

    def simulate(t: float) -> tuple[float, float]:
        return max((v for k, v in steps.items() if k <= t), default=(0.0, 0.0))

    assert 0.2 <= solve.threshold_within(simulate, 0.1) < 0.4
    with pytest.raises(ConfigError, match=r"keeps the loss at 0\.001; the least is 0\.01"):
        solve.threshold_within(simulate, 0.001)
    with pytest.raises(ConfigError, match="no threshold skips anything"):
        solve.threshold_within(lambda t: (0.0, 0.0), 1.0)


def test_easycache_by_hand() -> None:
    # Inputs move by 1 a step, outputs by 0.5: the rate is 0.5, and each skipped step adds 0.5 / size.
    n = 7
    inputs = [[float(t - s) for s in range(t)] for t in range(n)]
    outputs = [[0.5 * (t - s) for s in range(t)] for t in range(n)]
    found = solve.easycache(inputs, outputs, [2.0] * n, 0.6, Guard())
    # The first two steps are computed whatever the warm-up: before, there is no rate. Then 0.25 + 0.25 < 0.6.
    assert found == [False, False, True, True, False, True, True]


def test_first_block_by_hand() -> None:
    change = [[0.1 * (t - s) for s in range(t)] for t in range(8)]
    found = solve.first_block(change, 0.25, Guard(1, 1, 4, (0, 4)))
    assert found == [False, True, True, False, False, True, True, False]


def test_threshold_of_a_known_curve() -> None:
    assert solve.threshold_for(lambda t: t / (1 + t), 0.75, 1e-6) == pytest.approx(3.0, rel=1e-5)


def test_an_unreachable_share_is_refused_with_the_nearest() -> None:
    ratio = [1.0] + [0.99] * 19
    with pytest.raises(ConfigError, match="nearest is 40%"):
        solve.threshold_for(lambda t: share(solve.magcache(ratio, t, 1, 0.2)), 0.8, 0.05)


def test_speedup_as_a_share() -> None:
    assert solve.share_for_speedup(4.0) == 0.75
    with pytest.raises(ConfigError, match="starts at 1"):
        solve.share_for_speedup(0.5)
