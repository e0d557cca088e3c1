"""Pyramid attention broadcast: which modules run at which step, worked out by hand, on tiny real pipelines."""

from __future__ import annotations

import pytest
from modules_by_hand import cache_by_hand, record_runs, wan_flops

from vivace.techniques.attention.sliding_tile import SlidingTile
from vivace.techniques.caching.pyramid_attention_broadcast import PyramidAttentionBroadcast as Pab
from vivace.testing.subjects import Subject, distance

OPEN = {"low": 0.0, "high": 1000.0}
# Timesteps of the tiny Wan at twelve steps, above 850 up to step 4 and below 600 from step 8 on.
TWELVE = [999, 970, 937, 899, 856, 807, 750, 681, 600, 499, 374, 214]


def runs(settings, kind, steps=12):
    subject = Subject("wan2.1")
    ran = record_runs(subject.pipeline, subject.pipeline.scheduler)
    receipt = subject.run(settings, num_inference_steps=steps).receipt
    return {step for step, k, _ in ran if k == kind}, receipt


def test_only_timesteps_inside_the_window_reuse():
    settings = Pab(self_interval=2, cross_interval=6, low=400.0, high=850.0)
    ran, receipt = runs(settings, "self")
    assert [round(s.timestep) for s in receipt.steps] == pytest.approx(TWELVE, abs=3)
    # In the window lie 5 to 9. Step 4 is computed before it; from there every second step.
    assert ran == set(range(12)) - {5, 7, 9}
    ran, _ = runs(settings, "cross")
    assert ran == set(range(12)) - {5, 6, 7, 8, 9}
    ran, _ = runs(settings, "ffn")
    assert ran == set(range(12))


def test_intervals_run_from_the_last_computed_step():
    settings = Pab(self_interval=3, cross_interval=4, warmup=2, tail=1, **OPEN)
    assert runs(settings, "self")[0] == {0, 1, 4, 7, 10, 11}
    assert runs(settings, "cross")[0] == {0, 1, 5, 9, 11}


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "hunyuan"])
def test_equals_the_modules_cached_by_hand(name):
    computed = {"self": {0, 2, 4, 6}, "cross": {0, 3, 6}, "ffn": set(range(8))}
    subject = Subject(name)
    cache_by_hand(subject.pipeline, lambda kind, step: step in computed[kind])
    expected = subject.plain()
    run = Subject(name).run(Pab(self_interval=2, cross_interval=3, **OPEN))
    assert distance(run.latents, expected) < 1e-5
    assert distance(run.latents, Subject(name).exact().latents) > 1e-4


def test_flops_are_the_formula():
    subject = Subject("wan2.1")
    run = subject.run(Pab(self_interval=2, cross_interval=3, **OPEN)).receipt
    cost = wan_flops(subject.pipeline.transformer.config, 12, 16)
    assert run.flops == pytest.approx(
        subject.exact().receipt.flops - 2 * 4 * (4 * cost["self"] + 5 * cost["cross"])
    )


def test_sparse_attention_stays_sparse_where_it_is_computed():
    subject = Subject("wan2.1", {"num_frames": 33, "height": 128, "width": 128})
    sparse, cache = SlidingTile(block=64), Pab(self_interval=2, cross_interval=1, **OPEN)
    exact, alone = subject.exact().receipt, subject.run(sparse).receipt
    both = subject.run(sparse, cache).receipt
    assert alone.attention_pairs < exact.attention_pairs
    grid = subject.model.grid(subject.workload())
    cross = 8 * 2 * 4 * 2 * grid.video * 16
    assert both.attention_pairs - cross == pytest.approx((alone.attention_pairs - cross) / 2)


def test_an_empty_window_is_told():
    subject = Subject("wan2.1")
    assert "no step may reuse" in str(Pab(low=500.0, high=400.0).check(subject.model)[0])
    run = subject.run(Pab(low=500.0, high=400.0))
    assert run.latents.equal(subject.exact().latents)
