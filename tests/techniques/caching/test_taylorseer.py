"""TaylorSeer against a sampler loop that holds and renews the differences, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Estimate
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.testing.models import call, pipeline
from vivace.testing.subjects import Subject


def generate(name, *techniques, prompt="a red ball", seed=3, **changes):
    """(latents, receipt) of a run under a plan."""
    with accelerate(pipeline(name), Plan(techniques)) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


def held_differences(order):
    """The published cache: differences are renewed at every computed step and summed between."""

    def forecast(memory, step):
        held = []
        for i, (time, value) in enumerate(memory):
            fresh = [value]
            for n in range(min(i, order)):
                fresh.append((fresh[n] - held[n]) / (time - memory[i - 1][0]))
            held = fresh
        k = step - memory[-1][0]
        return sum(d * k**i / math.factorial(i) for i, d in enumerate(held))

    return forecast


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        (TaylorSeer(), {0, 1, 2, 7}),
        (TaylorSeer(interval=3, order=2), {0, 1, 2, 5}),
        (TaylorSeer(interval=2, order=3, warmup=1, tail=2), {0, 2, 4, 6, 7}),
        (TaylorSeer(interval=4, order=0, warmup=0), {0, 4}),
        (TaylorSeer(interval=20, max_consecutive=2, warmup=2, tail=1), {0, 1, 4, 7}),
    ],
)
def test_equals_the_loop_written_by_hand(settings, computed, forecasting_by_hand):
    expected = forecasting_by_hand(computed, held_differences(settings.order))
    latents, receipt = generate("wan2.1", settings)
    assert {s.index for s in receipt.steps if s.branches[0].blocks_run} == computed
    assert receipt.blocks_run == 8 * len(computed)
    assert receipt.cache_hits == 2 * (8 - len(computed))
    # Forecasting and guidance amplify float32 rounding by about the gain and the scale.
    assert torch.allclose(latents, expected, atol=2e-4)


def test_interval_one_is_the_exact_run_and_longer_ones_run_less():
    exact, receipt = generate("wan2.1")
    same, off = generate("wan2.1", TaylorSeer(interval=1))
    assert torch.equal(exact, same)
    assert off.blocks_run == receipt.blocks_run
    runs = [generate("wan2.1", TaylorSeer(interval=n))[1].blocks_run for n in (1, 2, 3, 5)]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] == 8 * 4


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan"])
def test_the_estimate_is_exact_before_anything_is_loaded(name):
    settings = TaylorSeer(interval=3)
    subject = Subject(name)
    exact = subject.exact().receipt.counts
    run = subject.run(settings)
    base = Estimate.exact(exact["nfe"], exact["blocks_run"], exact["attention_pairs"], exact["flops"])
    estimate = settings.estimate(subject.model, subject.workload(), base)
    assert estimate.problems(run.receipt.counts) == []
    low, high = estimate.blocks_run
    assert run.receipt.cache_hits > 0
    assert (low == high) == (len(subject.experts) == 1)
    assert torch.isfinite(run.latents).all()


def test_memory_holds_one_output_more_than_the_order():
    sizes = [generate("wan2.1", TaylorSeer(interval=2, order=n, warmup=4))[1].cache_bytes for n in (0, 1, 2)]
    width = pipeline("wan2.1").transformer.config
    tokens, channels = 3 * 2 * 2, width["num_attention_heads"] * width["attention_head_dim"]
    assert sizes == [2 * (n + 1) * tokens * channels * 4 for n in (0, 1, 2)]
