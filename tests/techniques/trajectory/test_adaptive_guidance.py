"""Adaptive guidance against a denoising loop with its decision written out by hand, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from guidance_oracle import Loop

from vivace.plans.plan import Plan
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.trajectory.adaptive_guidance import AdaptiveGuidance
from vivace.testing.case import in_force
from vivace.testing.guided import GuidedLoop, fused_family
from vivace.testing.models import pipeline
from vivace.testing.subjects import Subject, distance


def by_hand(threshold, mode, guided):
    """The rule for one sample; `guided` receives how many steps each sample was guided."""

    def make():
        state = {"over": False, "d": None}
        guided.append(0)
        mine = len(guided) - 1

        def rule(step, sigma, c, evaluate):
            if state["over"]:
                return c if mode == "none" else c - state["d"]
            u = evaluate()
            guided[mine] += 1
            cosine = (c.double() * u.double()).sum() / (c.double().norm() * u.double().norm())
            state["over"], state["d"] = bool(cosine > threshold), c - u
            return u

        return rule

    return make


@pytest.mark.parametrize("mode", ["none", "stored"])
@pytest.mark.parametrize(
    ("threshold", "guided"),
    # The cosines of this loop start at 0.825, 0.825, 0.864 for one sample, and at 0.936, 0.938 for the other.
    [(0.5, [1, 1]), (0.85, [3, 1]), (0.97, [8, 8])],
)
def test_a_batch_equals_its_samples_by_hand(mode, threshold, guided):
    pipe, seen = pipeline("wan2.1"), []
    loop = Loop(pipe, samples=2)
    expected, calls = loop(by_hand(threshold, mode, seen))
    assert seen == guided, "the loop is not the one the thresholds were chosen for"
    latents, receipt = loop.ours(pipe, AdaptiveGuidance(threshold=threshold, delta=mode))
    assert distance(latents[:1], expected[:1]) < 1e-5
    assert distance(latents[1:], expected[1:]) < 1e-5
    # Work is counted by rows: a row that has stopped is not evaluated.
    exact = loop.ours(pipe)[1]
    assert receipt.flops / exact.flops == pytest.approx(calls / 32, rel=1e-6)
    skipped = receipt.techniques[0].effects.get("evaluations_skipped", 0)
    assert skipped == pytest.approx((32 - calls) / 2)


def test_never_is_the_exact_run_even_when_both_branches_are_one():
    pipe = pipeline("wan2.1")
    loop = Loop(pipe)
    loop.uncond = loop.cond
    exact, counts = loop.ours(pipe)
    never = AdaptiveGuidance(threshold=1.0)
    assert never.is_identity
    same, other = loop.ours(pipe, in_force(never))
    assert torch.equal(exact, same)
    assert other.counts == counts.counts
    # The branches agree from the first step on, which any other threshold sees.
    assert loop.ours(pipe, AdaptiveGuidance(threshold=0.9999))[1].nfe == 9


class Batched(GuidedLoop):
    """Two samples that stop at different steps."""

    def __init__(self, subject, *, fused):
        super().__init__(subject, fused=fused)
        loop = Loop(subject.pipeline, samples=2)
        self._noise, self._text = loop.noise, [loop.cond, loop.uncond]


@pytest.mark.parametrize("mode", ["none", "stored"])
def test_fused_is_separate_while_one_of_two_has_stopped(mode):
    with fused_family():
        separate, fused = (Batched(Subject("wan2.1"), fused=f) for f in (False, True))
        technique = AdaptiveGuidance(threshold=0.85, delta=mode)
        two, one = separate.run(technique), fused.run(technique)
    assert distance(one.latents, two.latents) < 1e-4
    shares = {round(b.blocks_run / b.blocks_total, 3) for s in one.receipt.steps for b in s.branches}
    assert shares == {1.0, 0.75, 0.5}
    for name in ("blocks_run", "attention_pairs", "flops"):
        assert one.receipt.counts[name] == pytest.approx(two.receipt.counts[name]), name


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_counts_lie_in_the_estimate(name):
    subject, technique = Subject(name), AdaptiveGuidance(threshold=0.0)
    run = subject.run(technique)
    assert torch.isfinite(run.latents).all()
    estimate = technique.estimate(subject.model, subject.workload(), subject.base_estimate())
    assert estimate.problems(run.receipt.counts) == []


def test_a_cache_below_is_warned_of():
    plan = Plan([AdaptiveGuidance(), FirstBlockCache()])
    assert ["a batch" in str(p) for p in plan.problems(Subject("wan2.1").model)] == [True]


def test_each_expert_decides_anew():
    run = Subject("wan2.2").run(AdaptiveGuidance(threshold=0.0))
    found = {}
    for step in run.receipt.steps:
        for branch in step.branches:
            if branch.branch == "uncond":
                found.setdefault(branch.expert, []).append(branch.action)
    assert set(found) == {"transformer", "transformer_2"}
    for actions in found.values():
        computed = actions.count("computed")
        assert 1 <= computed < len(actions)
        assert actions == ["computed"] * computed + ["skipped"] * (len(actions) - computed)
