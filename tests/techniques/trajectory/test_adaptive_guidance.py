"""Adaptive guidance against a denoising loop with its decision written out by hand, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from guidance_oracle import Loop

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.caching.easycache import EasyCache
from vivace.techniques.caching.first_block_cache import FirstBlockCache
from vivace.techniques.trajectory.adaptive_guidance import AdaptiveGuidance
from vivace.testing.case import in_force
from vivace.testing.guided import GuidedLoop, fused_family
from vivace.testing.models import CALL, pipeline
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


@pytest.mark.parametrize(
    "cache", [FirstBlockCache(threshold=1.0, warmup=1), EasyCache(threshold=1.0, warmup=2)]
)
def test_a_cache_below_keeps_the_samples_apart(cache):
    """Two samples of which one stops: the rows that are left are still known by their own sample."""
    pipe = pipeline("wan2.1")
    prompts, seeds = ["a red ball", "zzz 99 !!"], [3, 11]

    def run(prompt, seed, *techniques):
        call = CALL | {"output_type": "latent", "negative_prompt": [""] * len(prompt)}
        with accelerate(pipe, Plan(techniques)) as fast:
            out = fast(prompt, seed=seed, **call)
        return out.raw.frames, out.receipt

    def highest(prompt, seed):
        """The running maximum of cos(c, u) over the steps of an exact run."""
        outputs = []
        hook = pipe.transformer.register_forward_hook(lambda m, a, out: outputs.append(out[0].flatten()))
        run([prompt], [seed])
        hook.remove()
        pairs = zip(outputs[::2], outputs[1::2], strict=True)
        return torch.stack([torch.cosine_similarity(c, u, dim=0) for c, u in pairs]).cummax(0).values

    # Between the two samples' maxima at an early step: one stops there and the other goes on.
    tops = [highest(p, s)[2] for p, s in zip(prompts, seeds, strict=True)]
    threshold = float(sum(tops)) / 2
    techniques = (AdaptiveGuidance(threshold=threshold), cache)
    both, receipt = run(prompts, seeds, *techniques)
    alone = [run([p], [s], *techniques) for p, s in zip(prompts, seeds, strict=True)]
    assert receipt.cache_hits > 0
    assert alone[0][1].counts["flops"] != alone[1][1].counts["flops"], "both stopped at the same step"
    for i, (single, _) in enumerate(alone):
        assert distance(both[i : i + 1], single) < 1e-4, i
    assert receipt.blocks_run == pytest.approx(sum(r.blocks_run for _, r in alone) / 2)


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
