"""SmoothCache: curves against errors computed from recorded outputs, masks worked out by hand."""

from __future__ import annotations

from collections import defaultdict

import pytest
from modules_by_hand import cache_by_hand, parts_of, record_runs

from vivace.core.errors import PlanError
from vivace.techniques.caching.module_errors import ModuleErrors, curves
from vivace.techniques.caching.smoothcache import SmoothCache
from vivace.testing.subjects import Subject, distance

CURVES = {"self_errors": (0.1, 0.2, 0.3), "cross_errors": (0.3, 0.01), "ffn_errors": (0.05, 0.15)}


def test_a_kind_is_reused_until_its_curve_reaches_alpha():
    settings = SmoothCache(alpha=0.25, warmup=1, tail=1, **CURVES)
    subject = Subject("wan2.1")
    ran = record_runs(subject.pipeline, subject.pipeline.scheduler)
    subject.run(settings)
    steps = {kind: {s for s, k, _ in ran if k == kind} for kind in ("self", "cross", "ffn")}
    # A later point below alpha does not help cross-attention, whose first one is above.
    assert steps == {"self": {0, 3, 6, 7}, "cross": set(range(8)), "ffn": {0, 3, 6, 7}}
    assert SmoothCache(alpha=0.15, **CURVES).longest("ffn") == 1


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "hunyuan"])
def test_equals_the_modules_cached_by_hand(name):
    computed = {"self": {0, 2, 4, 6, 7}, "cross": set(range(8)), "ffn": {0, 3, 6, 7}}
    subject = Subject(name)
    cache_by_hand(subject.pipeline, lambda kind, step: step in computed[kind])
    expected = subject.plain()
    run = Subject(name).run(SmoothCache(alpha=0.18, warmup=1, tail=1, **CURVES))
    assert distance(run.latents, expected) < 1e-5


def test_measured_curves_are_the_errors_of_recorded_outputs():
    subject = Subject("wan2.1")
    recorded = defaultdict(list)
    for block, kind, module in parts_of(subject.pipeline.transformer):
        module.register_forward_hook(lambda _m, _i, out, key=(kind, block): recorded[key].append(out.clone()))
    run = subject.run(ModuleErrors(oldest=3))
    assert run.latents.equal(Subject("wan2.1").exact().latents)
    found = curves(run.receipt)
    assert {k: len(v) for k, v in found.items()} == {"self_errors": 3, "cross_errors": 3, "ffn_errors": 3}
    for age in (1, 3):
        errors = []
        for (kind, _), outputs in recorded.items():
            if kind == "ffn":
                for branch in (outputs[0::2], outputs[1::2]):
                    pairs = zip(branch, branch[age:], strict=False)
                    errors += [float((b - a).abs().sum() / a.abs().sum()) for a, b in pairs]
        assert len(errors) == 4 * 2 * (8 - age)
        assert found["ffn_errors"][age - 1] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_measured_curves_serve_as_settings():
    subject = Subject("cogvideox")
    found = curves(subject.run(ModuleErrors()).receipt)
    assert sorted(found) == ["ffn_errors", "self_errors"]
    alpha = 1.01 * max(e[0] for e in found.values())
    run = subject.run(SmoothCache(alpha=min(alpha, 1.0), warmup=1, **found))
    assert run.receipt.cache_hits > 0


def test_without_curves_it_is_refused_with_the_way_to_get_them():
    with pytest.raises(PlanError, match=r"cross_errors.*ModuleErrors"):
        Subject("wan2.1").open(SmoothCache(self_errors=(0.1,), ffn_errors=(0.1,)))
    assert not SmoothCache(self_errors=(0.1,), ffn_errors=(0.1,)).check(Subject("cogvideox").model)
    assert curves(Subject("wan2.1").exact().receipt) == {}
