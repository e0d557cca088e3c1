"""Guidance gate against a denoising loop with the gate written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from guidance_oracle import Loop

from vivace.plans.plan import Plan
from vivace.techniques.trajectory.guidance_gate import GuidanceGate
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.testing.guided import GuidedLoop, fused_family
from vivace.testing.models import pipeline
from vivace.testing.subjects import Subject, distance


def by_hand(guided, mode):
    """The rule of a gate: u is evaluated at the steps of `guided`, and made from the last differences elsewhere."""

    def make():
        past = []

        def rule(step, sigma, c, evaluate):
            if step in guided:
                u = evaluate()
                past.append((sigma, c - u))
                return u
            if mode == "none":
                return c
            (s1, d1) = past[-1]
            if mode == "stored" or len(past) < 2:
                return c - d1
            (s0, d0) = past[-2]
            # A straight line through both points, held at one gap.
            end = s1 + (s1 - s0)
            s = max(sigma, end)
            return c - (d0 * (s - s1) + d1 * (s0 - s)) / (s0 - s1)

        return rule

    return make


@pytest.mark.parametrize("mode", ["stored", "extrapolated", "none"])
@pytest.mark.parametrize(
    ("gate", "every", "guided"),
    [
        (0.5, 0, {0, 1, 2, 3}),
        (0.3, 0, {0, 1, 2}),
        (0.25, 2, {0, 1, 3, 5, 7}),
        (0.25, 3, {0, 1, 4, 7}),
    ],
)
def test_equals_the_gate_by_hand(mode, gate, every, guided):
    pipe = pipeline("wan2.1")
    loop = Loop(pipe)
    expected, calls = loop(by_hand(guided, mode))
    latents, receipt = loop.ours(pipe, GuidanceGate(gate=gate, delta=mode, every=every))
    assert distance(latents, expected) < 1e-5
    assert receipt.nfe == calls == 8 + len(guided)
    assert receipt.techniques[0].effects["evaluations_skipped"] == 8 - len(guided)
    assert {s.index for s in receipt.steps if s.branches[-1].action == "computed"} == {
        s.index for i, s in enumerate(receipt.steps) if i in guided
    }


def test_without_a_difference_the_first_step_is_guided():
    pipe = pipeline("wan2.1")
    loop = Loop(pipe)
    expected, _ = loop(by_hand({0}, "stored"))
    latents, receipt = loop.ours(pipe, GuidanceGate(gate=0.0))
    assert distance(latents, expected) < 1e-5
    assert receipt.nfe == 9
    # An extrapolation has nothing but that one difference either.
    assert torch.equal(loop.ours(pipe, GuidanceGate(gate=0.0, delta="extrapolated"))[0], latents)


def test_no_difference_is_the_guidance_interval():
    pipe = pipeline("wan2.1")
    loop = Loop(pipe, samples=2)
    one = loop.ours(pipe, GuidanceGate(gate=0.4, delta="none"))
    other = loop.ours(pipe, GuidanceInterval(high=0.4))
    assert torch.equal(one[0], other[0])
    assert one[1].counts == other[1].counts


@pytest.mark.parametrize("setting", [{"every": 1}, {"gate": 1.0}])
def test_guided_everywhere_is_the_exact_run(setting):
    pipe = pipeline("wan2.1")
    loop = Loop(pipe)
    technique = GuidanceGate(**setting)
    assert technique.is_identity
    assert torch.equal(loop.ours(pipe, technique)[0], loop.ours(pipe)[0])


@pytest.mark.parametrize("mode", ["stored", "extrapolated", "none"])
def test_fused_is_separate(mode):
    with fused_family():
        separate, fused = (GuidedLoop(Subject("wan2.1"), fused=f) for f in (False, True))
        technique = GuidanceGate(gate=0.4, delta=mode, every=3)
        two, one = separate.run(technique), fused.run(technique)
    assert distance(one.latents, two.latents) < 1e-4
    for name, count in two.receipt.counts.items():
        assert one.receipt.counts[name] == pytest.approx(count), name


def test_a_second_expert_has_its_own_difference():
    subject = Subject("wan2.2")
    run = subject.run(GuidanceGate(gate=0.25))
    branches = [(b.expert, b.branch, b.action) for s in run.receipt.steps for b in s.branches]
    second = [
        action for expert, branch, action in branches if expert == "transformer_2" and branch == "uncond"
    ]
    assert second[0] == "computed"
    assert set(second[1:]) == {"skipped"}
    estimate = GuidanceGate(gate=0.25).estimate(subject.model, subject.workload(), subject.base_estimate())
    assert estimate.problems(run.receipt.counts) == []
    assert estimate.nfe[0] < estimate.nfe[1]


@pytest.mark.parametrize("name", ["cogvideox-i2v", "ltx", "hunyuan"])
def test_counts_are_what_was_estimated(name):
    subject, technique = Subject(name), GuidanceGate(gate=0.3, delta="extrapolated", every=4)
    run = subject.run(technique)
    steps = len(run.receipt.steps)
    first = math.ceil(0.3 * steps)
    assert run.receipt.nfe == 2 * steps - sum((k + 1) % 4 != 0 for k in range(steps - first))
    assert torch.isfinite(run.latents).all()
    estimate = technique.estimate(subject.model, subject.workload(), subject.base_estimate())
    assert estimate.problems(run.receipt.counts) == []


def test_never_guiding_warns():
    problems = Plan([GuidanceGate(gate=0.0, delta="none")]).problems(Subject("wan2.1").model)
    assert [p.severity for p in problems] == ["warning"]
    assert "never guides" in str(problems[0])
