"""One plan file, every family: the presets run on all tiny pipelines, and the receipts add up."""

from __future__ import annotations

import dataclasses
import math

import pytest

from vivace.models.describe import describe_pipeline
from vivace.models.loading import describe
from vivace.plans.plan import Plan, preset_names
from vivace.plans.session import accelerate
from vivace.testing.models import BUILDERS, call, pipeline


@pytest.mark.parametrize("family", sorted(BUILDERS))
@pytest.mark.parametrize("preset", ["near-exact", "fast"])
def test_preset_runs_with_a_correct_receipt(preset, family):
    pipe, plan = pipeline(family), Plan.load(preset)
    arguments = {k: v for k, v in call(family).items() if k != "num_inference_steps"}
    settings = {t.card.name: t for t in plan.techniques}
    if preset == "near-exact":
        steps = 8
        arguments["num_inference_steps"] = steps
        computed, uncond = settings["optimal_schedule"].schedule(steps)
        # A second expert has nothing to forecast from at its first step.
        sure, most = len(computed) + len(uncond), len(computed) + len(uncond) + 2
        skipped_calls = 2 * steps - sure
    else:
        steps, interval = settings["few_steps"].steps, settings["guidance_interval"]
        sure = most = steps + math.ceil(interval.high * steps - 1e-9)
        skipped_calls = 2 * steps - sure
    with accelerate(pipe, plan) as fast:
        out = fast("a red sphere", seed=1, **arguments)
    r = out.receipt
    assert len(r.steps) == steps
    assert r.nfe_requested == 2 * steps
    assert sure <= r.nfe <= (most if pipe.config.get("transformer_2", (None,))[0] else sure)
    assert r.blocks_run <= r.nfe * r.blocks_total / r.nfe_requested
    assert 0 < r.flops < r.flops_dense
    assert sum(b.blocks_run for s in r.steps for b in s.branches) == pytest.approx(r.blocks_run)
    skipped = [b for s in r.steps for b in s.branches if b.action == "skipped"]
    if r.steps[0].branches[0].branch != "fused":
        assert len(skipped) == skipped_calls - (r.nfe - sure)
    assert r.completed
    decoder = [t for t in r.techniques if t.name == "whole_clip_decode"]
    assert bool(decoder) == family.startswith("wan")
    left = [w.partition(":")[0] for w in r.warnings if "left out" in w]
    assert any("whole_clip_decode" in w for w in left) != bool(decoder)
    # No solver is fitted for the tiny models; what is behind `unless` stands in.
    assert any("fitted_solver" in w for w in left)


@pytest.mark.parametrize("preset", sorted(set(preset_names()) - {"exact"}))
def test_presets_have_no_error_on_any_family(preset):
    for family in sorted(BUILDERS):
        Plan.load(preset).check(describe_pipeline(pipeline(family)))


@pytest.mark.parametrize(
    ("preset", "others"),
    [("near-exact", {"optimal_schedule"}), ("fast", {"few_steps", "guidance_interval"})],
)
def test_a_preset_has_the_solver_where_one_is_fitted(preset, others):
    plan = Plan.load(preset)
    for model, there, gone in (
        ("tiny", {"fitted_solver"}, others),
        ("wan2.1-1.3b", others, {"fitted_solver"}),
    ):
        described = describe(model)
        names = {t.card.name for t in plan.fitted(described).techniques}
        assert there <= names
        assert not gone & names
        told = [p for p in plan.check(described) if p.technique in gone]
        if gone == {"fitted_solver"}:
            assert ["left out" in p.message and "make one" in p.message for p in told] == [True]
        else:
            assert told == []


def test_turbo_is_the_student_where_there_is_one():
    plan = Plan.load("turbo")
    names = {t.card.name for t in plan.fitted(describe("tiny")).techniques}
    student = {"student_checkpoint", "student_sampler", "vsa", "tiny_decode"}
    assert names == student | {"int8_linear"}
    assert plan.steps(describe("tiny")) == 4
    assert plan.check(describe("tiny")) == []
    other = describe("wan2.1-1.3b")
    names = {t.card.name for t in plan.fitted(other).techniques}
    assert names == {"few_steps", "guidance_interval", "int8_linear"}
    (told,) = plan.check(other)
    assert told.technique == "student_checkpoint"
    assert "vivace distill" in told.message


def test_other_weights_of_the_same_model_get_the_stand_ins():
    """A solver fits one set of weights; a preset runs on a fine-tuned copy all the same, and says what it left out."""
    pipe = pipeline("wan2.1")
    model = dataclasses.replace(describe_pipeline(pipe), name="tiny", family="")
    model = dataclasses.replace(
        model, family=describe_pipeline(pipe).family, scheduler=describe("tiny").scheduler
    )
    with accelerate(pipe, Plan.load("fast"), model=model) as fast:
        names = {t.card.name for t in fast.plan.techniques}
    assert {"few_steps", "guidance_interval"} <= names
    assert "fitted_solver" not in names
    assert any("other weights" in w for w in fast.warnings)
