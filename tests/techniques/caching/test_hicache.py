"""HiCache against a sampler loop with numpy's Hermite polynomials, written out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from numpy.polynomial import hermite

from vivace.techniques.caching.hicache import HiCache
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.testing.subjects import PROMPT, Subject


def in_numpys_basis(contraction):
    """Order 2 over the last three computed steps, which must be equally far apart."""

    def forecast(memory, step):
        values, times = [v for _, v in memory[:-4:-1]], [t for t, _ in memory[:-4:-1]]
        gap = times[0] - times[1] if len(times) > 1 else 1
        assert all(a - b == gap for a, b in itertools.pairwise(times))
        slopes = [values[0]]
        if len(values) > 1:
            slopes.append((values[0] - values[1]) / gap)
        if len(values) > 2:
            slopes.append((values[0] - 2 * values[1] + values[2]) / gap**2)
        out = 0
        for i, slope in enumerate(slopes):
            basis = float(hermite.hermval(contraction * (step - times[0]), [0.0] * i + [1.0]))
            out = out + slope * basis * contraction**i / math.factorial(i)
        return out

    return forecast


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        (HiCache(), {0, 1, 2, 7}),
        (HiCache(interval=2, warmup=0, contraction=0.8), {0, 2, 4, 6}),
        (HiCache(interval=3, warmup=0, tail=1, contraction=0.3), {0, 3, 6, 7}),
    ],
)
def test_equals_the_loop_written_by_hand(settings, computed, forecasting_by_hand):
    expected = forecasting_by_hand(computed, in_numpys_basis(settings.contraction), prompt=PROMPT, seed=7)
    run = Subject("wan2.1").run(settings)
    assert {s.index for s in run.receipt.steps if s.branches[0].blocks_run} == computed
    assert torch.allclose(run.latents, expected, atol=2e-4)


def test_order_one_with_contraction_of_the_root_of_a_half_is_taylorseer():
    subject = Subject("wan2.1")
    straight = subject.run(TaylorSeer(order=1)).latents
    assert torch.allclose(subject.run(HiCache(order=1, contraction=0.5**0.5)).latents, straight, atol=2e-4)
    assert not torch.allclose(subject.run(HiCache(order=1)).latents, straight, atol=1e-2)


def test_order_zero_repeats_whatever_the_contraction():
    subject = Subject("wan2.1")
    repeated = subject.run(TaylorSeer(order=0)).latents
    assert torch.equal(subject.run(HiCache(order=0, contraction=0.9)).latents, repeated)
