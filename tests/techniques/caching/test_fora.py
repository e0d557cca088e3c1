"""FORA against modules cached by hand, and its FLOPs against a formula, on tiny real pipelines."""

from __future__ import annotations

import pytest
import torch
from modules_by_hand import cache_by_hand, record_runs, wan_flops

from vivace.core.errors import ConfigError, PlanError
from vivace.plans.plan import Plan
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.caching.fora import Fora
from vivace.techniques.compression.int8_linear import Int8Linear
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.testing.subjects import Subject, distance

FAMILIES = ["wan2.1", "wan2.2-ti2v", "cogvideox", "ltx", "hunyuan"]
SETTINGS = [Fora(interval=3, warmup=1, tail=1), Fora(interval=2, warmup=0, tail=0)]
COMPUTED = [{0, 3, 6, 7}, {0, 2, 4, 6}]
"""Of eight steps."""


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_modules_cached_by_hand(name):
    settings, computed = SETTINGS[0], COMPUTED[0]
    subject = Subject(name)
    cache_by_hand(subject.pipeline, lambda kind, step: step in computed)
    expected = subject.plain()
    run = Subject(name).run(settings)
    assert distance(run.latents, expected) < 1e-5
    assert distance(run.latents, Subject(name).exact().latents) > 1e-4
    assert run.receipt.cache_hits == 8
    assert run.receipt.cache_bytes > 0


@pytest.mark.parametrize(("settings", "computed"), [(SETTINGS[0], COMPUTED[0]), (SETTINGS[1], COMPUTED[1])])
def test_flops_are_the_formula(settings, computed):
    subject = Subject("wan2.1")
    exact, run = subject.exact().receipt, subject.run(settings).receipt
    saved = sum(wan_flops(subject.pipeline.transformer.config, 12, 16).values())
    assert run.flops == pytest.approx(exact.flops - 2 * 4 * (8 - len(computed)) * saved)
    assert run.flops_dense == pytest.approx(exact.flops)
    assert run.attention_pairs == pytest.approx(exact.attention_pairs * len(computed) / 8)
    assert run.nfe == exact.nfe
    assert run.blocks_run == exact.blocks_run


def test_only_the_steps_of_the_mask_really_run():
    subject = Subject("wan2.1")
    ran = record_runs(subject.pipeline, subject.pipeline.scheduler)
    subject.run(SETTINGS[0])
    assert {(s, k) for s, k, _ in ran} == {(s, k) for s in COMPUTED[0] for k in ("self", "cross", "ffn")}


def test_the_second_expert_starts_with_its_own_values():
    subject = Subject("wan2.2")
    run = subject.run(Fora(interval=8, warmup=0, tail=0))
    experts = [s.branches[0].expert for s in run.receipt.steps]
    assert len(set(experts)) == 2
    assert run.receipt.cache_hits == 2 * (8 - 2)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_small_storage_is_smaller_and_close(storage):
    subject = Subject("wan2.1")
    same, small = subject.run(SETTINGS[0]), subject.run(SETTINGS[0].replace(storage=storage))
    # Scales of single tensors come on top.
    assert small.receipt.cache_bytes < same.receipt.cache_bytes * (0.51 if storage == "bf16" else 0.27)
    assert 0.0 < distance(small.latents, same.latents) < 0.05
    with pytest.raises(ConfigError, match="storage must be one of"):
        Fora(storage="int3")


def test_rows_stay_themselves_when_guidance_ends():
    for name in ("wan2.1", "ltx"):
        run = Subject(name).run(Fora(interval=4, warmup=1, tail=0), GuidanceInterval(high=0.5))
        # Steps 1 to 3 with both branches, 5 to 7 with the conditional one.
        assert run.receipt.cache_hits == 2 * 3 + 3, name
        assert torch.isfinite(run.latents).all()


def test_beside_int8_it_still_saves_what_it_saves_alone():
    subject = Subject("wan2.1")
    both, alone = subject.run(SETTINGS[0], Int8Linear()), subject.run(Int8Linear())
    exact, cached = subject.exact().receipt, subject.run(SETTINGS[0]).receipt
    assert exact.flops - cached.flops == pytest.approx(alone.receipt.flops - both.receipt.flops)


def test_two_caches_of_the_same_outputs_are_refused():
    with pytest.raises(PlanError, match="both own block"):
        Subject("wan2.1").open(Fora(), FirstBlockCache())


def test_a_plan_with_nothing_to_reuse_says_so():
    model = Subject("wan2.1").model
    found = Plan([Fora(warmup=7)]).problems(model)
    assert [p.severity for p in found] == ["warning"]
    assert "no module is ever reused" in found[0].message
