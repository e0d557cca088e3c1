"""TaylorSeer inside the blocks against a Taylor series of every module's output written out by hand."""

from __future__ import annotations

import math

import pytest
from modules_by_hand import cache_by_hand

from vivace.techniques.caching.fora import Fora
from vivace.techniques.caching.taylorseer_modules import TaylorSeerModules
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.testing.subjects import Subject, distance

STEPS = {0, 1, 4, 7}


def series(order, most=math.inf):
    """Forecast whose differences are renewed at every computed step, kept as a running list.

    Where a straight line's weights, 1 + r and -r, are larger than `most` in sum, the newest value is reused.
    """

    def predict(values, step):
        known, before = [values[0][1]], values[0][0]
        for now, value in values[1:]:
            renewed = [value]
            for i in range(min(order, len(known))):
                renewed.append((renewed[i] - known[i]) / (now - before))
            known, before = renewed, now
        ahead = step - before
        if len(values) > 1 and 1 + 2 * ahead / (before - values[-2][0]) > most:
            return known[0]
        return sum(d * ahead**i / math.factorial(i) for i, d in enumerate(known))

    return predict


@pytest.mark.parametrize(
    ("name", "order"),
    [("wan2.1", 0), ("wan2.1", 1), ("wan2.1", 2), ("cogvideox", 1), ("hunyuan", 1), ("ltx", 2)],
)
def test_equals_the_series_by_hand(name, order):
    subject = Subject(name)
    cache_by_hand(subject.pipeline, lambda kind, step: step in STEPS, series(order))
    expected = subject.plain()
    run = Subject(name).run(TaylorSeerModules(warmup=2, interval=3, tail=1, order=order))
    assert distance(run.latents, expected) < 1e-5
    assert run.receipt.cache_hits == 8


def test_order_zero_is_fora_and_higher_orders_remember_more():
    subject = Subject("wan2.1")
    plain = subject.run(Fora(warmup=2, interval=3))
    runs = [subject.run(TaylorSeerModules(warmup=2, interval=3, order=n)) for n in range(3)]
    assert runs[0].latents.equal(plain.latents)
    sizes = [r.receipt.cache_bytes for r in runs]
    assert sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]
    assert len({r.receipt.flops for r in runs}) == 1


def test_quantised_weights_do_not_follow_a_line_that_amplifies():
    """One step ahead of two neighbouring ones a line has the weights 2 and -1; two steps ahead 3 and -2: too much."""
    latents = {}
    for most in (math.inf, 4.0):
        subject = Subject("wan2.1")
        cache_by_hand(subject.pipeline, lambda kind, step: step < 2, series(1, most))
        latents[most] = subject.run(Int8Linear(), num_inference_steps=4).latents
    settings = TaylorSeerModules(warmup=2, interval=8, tail=0)
    run = Subject("wan2.1").run(settings, Int8Linear(), num_inference_steps=4)
    assert distance(run.latents, latents[4.0]) < 1e-3
    assert distance(run.latents, latents[math.inf]) > 1e-2
