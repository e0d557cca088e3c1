"""SpeCa against a sampler loop that drafts and verifies, written out by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.techniques.caching.speca import SpeCa
from vivace.techniques.caching.taylorseer import TaylorSeer
from vivace.testing.subjects import PROMPT, Subject


def taylor(memory, step, order):
    """Order 0 or 1 over (step, value), oldest first."""
    time, value = memory[-1]
    if order == 0 or len(memory) == 1:
        return value
    before, older = memory[-2]
    return value + (value - older) / (time - before) * (step - time)


def drafting_by_hand(sampler, settings, steps):
    """(latents, steps computed, errors of the drafts): the method as one loop."""
    memory, state, computed, errors = {}, {"error": 0.0, "run": 0}, [], []

    def stack(step, branch, h, blocks):
        past = memory.setdefault(branch, {"input": [], "output": []})
        if branch == "cond":
            bound = settings.threshold * settings.decay ** (step / steps)
            good = state["run"] == 0 or state["error"] <= bound
            free = settings.warmup <= step < steps - settings.tail and state["run"] < settings.max_consecutive
            state["run"] = state["run"] + 1 if good and free else 0
            if not state["run"]:
                computed.append(step)
        if step in computed:
            for block in blocks[:-1]:
                h = block(h)
            out = blocks[-1](h)
            past["input"].append((step, h))
            past["output"].append((step, out))
            return out
        out = blocks[-1](taylor(past["input"], step, settings.order))
        if branch == "cond":
            error = torch.linalg.vector_norm(taylor(past["output"], step, settings.order) - out)
            state["error"] = float(error / torch.linalg.vector_norm(out))
            errors.append(state["error"])
        return out

    return sampler(stack, prompt=PROMPT, seed=7, steps=steps), computed, errors


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (SpeCa(threshold=1.0, decay=1.0, warmup=2, tail=1, max_consecutive=3), 8),
        (SpeCa(threshold=0.1, decay=0.5), 16),
        (SpeCa(threshold=0.05, decay=1.0, warmup=1), 20),
        (SpeCa(threshold=0.08, order=0, warmup=2, tail=2), 20),
    ],
)
def test_equals_the_loop_written_by_hand(settings, steps, sampler_by_hand):
    expected, computed, errors = drafting_by_hand(sampler_by_hand, settings, steps)
    run = Subject("wan2.1").run(settings, num_inference_steps=steps)
    blocks = [s.branches[0].blocks_run for s in run.receipt.steps]
    assert blocks == [4 if i in computed else 1 for i in range(steps)]
    assert run.receipt.nfe == run.receipt.nfe_requested
    assert torch.allclose(run.latents, expected, atol=3e-4)
    if settings.threshold < 1.0:
        # Verification matters: some drafts were good and some were not.
        bounds = settings.threshold
        assert min(errors) < bounds * settings.decay
        assert max(errors) > bounds * settings.decay


def test_a_wrong_draft_is_followed_by_a_computed_step():
    run = Subject("wan2.1").run(SpeCa(threshold=1e-6), num_inference_steps=12)
    drafted = [s.branches[0].blocks_run == 1 for s in run.receipt.steps]
    assert drafted == [False] * 3 + [True, False] * 4 + [True]


def test_threshold_zero_is_the_exact_run():
    subject = Subject("wan2.1")
    off = subject.run(SpeCa(threshold=0.0))
    assert torch.equal(off.latents, subject.exact().latents)
    assert off.receipt.blocks_run == off.receipt.blocks_total


def test_the_last_block_sees_the_step_unlike_a_forecast_of_the_output():
    subject = Subject("wan2.1")
    drafts = subject.run(SpeCa(threshold=1.0, decay=1.0, max_consecutive=4))
    forecasts = subject.run(TaylorSeer())
    assert drafts.receipt.cache_hits == forecasts.receipt.cache_hits == 8
    assert drafts.receipt.blocks_run == forecasts.receipt.blocks_run + 8
    assert not torch.allclose(drafts.latents, forecasts.latents, atol=1e-3)


def test_every_sample_is_verified_by_itself():
    subject, settings = Subject("wan2.1"), SpeCa(threshold=0.08, decay=1.0, warmup=2)
    prompts, seeds = [PROMPT, "zzz 99 !!", "two blue cones"], [7, 11, 5]
    options = {"num_inference_steps": 14}
    batch = subject.run(settings, prompt=prompts, seed=seeds, negative_prompt=[""] * 3, **options)
    alone = [
        subject.run(settings, prompt=p, seed=s, negative_prompt="", **options)
        for p, s in zip(prompts, seeds, strict=True)
    ]
    for i, one in enumerate(alone):
        assert torch.allclose(batch.latents[i], one.latents[0], atol=3e-4)
    assert batch.receipt.blocks_run == pytest.approx(sum(r.receipt.blocks_run for r in alone) / 3)
    assert len({r.receipt.blocks_run for r in alone}) > 1
