"""FoCa against a sampler loop that forecasts and calibrates in two stages, written out by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.techniques.caching.foca import FoCa
from vivace.testing.subjects import PROMPT, Subject


def slope(newest, middle, oldest):
    """BDF2 with variable steps: each argument is (time, value); the slope at the newest."""
    h, before = newest[0] - middle[0], middle[0] - oldest[0]
    ratio = h / before
    a = (1 + 2 * ratio) / (1 + ratio)
    b = -(1 + ratio)
    c = ratio**2 / (1 + ratio)
    return (a * newest[1] + b * middle[1] + c * oldest[1]) / h


def forecast_then_calibrate(memory, step):
    newest = memory[-1]
    if len(memory) == 1:
        return newest[1]
    k = step - newest[0]
    if len(memory) == 2:
        return newest[1] + k * (newest[1] - memory[0][1]) / (newest[0] - memory[0][0])
    first = slope(newest, memory[-2], memory[-3])
    forecast = newest[1] + k * first
    second = slope((step, forecast), newest, memory[-2])
    return newest[1] + k * 0.5 * (first + second)


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        (FoCa(), {0, 1, 2, 7}),
        (FoCa(interval=2), {0, 1, 2, 4, 6}),
        (FoCa(interval=3, warmup=1, tail=1), {0, 3, 6, 7}),
        (FoCa(interval=3, warmup=2), {0, 1, 4, 7}),
    ],
)
def test_equals_the_two_stages_written_by_hand(settings, computed, forecasting_by_hand):
    expected = forecasting_by_hand(computed, forecast_then_calibrate, prompt=PROMPT, seed=7)
    run = Subject("wan2.1").run(settings)
    assert {s.index for s in run.receipt.steps if s.branches[0].blocks_run} == computed
    assert torch.allclose(run.latents, expected, atol=5e-4)
