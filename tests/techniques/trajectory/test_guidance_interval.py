"""Guidance interval against plain diffusers with its guidance switched by hand."""

from __future__ import annotations

import pytest
import torch

from vivace.core.errors import PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Estimate
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.testing.models import call, pipeline

FAMILIES = ["wan2.1", "wan2.2", "wan2.1-i2v", "cogvideox", "ltx", "hunyuan"]


def generate(pipe, name, *techniques, prompt="a red ball", seed=3, **changes):
    with accelerate(pipe, Plan(techniques)) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **{**call(name), **changes})
    return out.raw.frames, out.receipt


def test_equals_diffusers_with_guidance_switched_off_by_hand():
    def switch(pipe, step, timestep, tensors):
        pipe._guidance_scale = 5.0 if 1 <= step < 4 else 1.0  # in force from the next step on
        return tensors

    pipe = pipeline("wan2.1")
    generator = torch.Generator().manual_seed(3)
    settings = GuidanceInterval(low=0.25, high=0.625)
    latents, receipt = generate(pipeline("wan2.1"), "wan2.1", settings)
    # The first step, too, is unguided: the scale is the pipeline's argument, so it is switched from within.
    inner = pipe.scheduler.set_timesteps

    def begin(*args, **kwargs):
        pipe._guidance_scale = 1.0
        return inner(*args, **kwargs)

    pipe.scheduler.set_timesteps = begin
    expected = pipe(
        prompt="a red ball",
        generator=generator,
        output_type="latent",
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["latents"],
        **call("wan2.1"),
    ).frames
    assert torch.equal(latents, expected)
    assert receipt.nfe == 8 + 3
    assert [s.index for s in receipt.steps if s.branches[-1].action == "computed"] == [2, 3, 4]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.6), (0.3, 1.0), (0.2, 0.5)])
def test_counts_are_what_was_estimated(name, low, high):
    settings, pipe = GuidanceInterval(low=low, high=high), pipeline(name)
    exact = generate(pipe, name)[1]
    latents, receipt = generate(pipe, name, settings)
    assert torch.isfinite(latents).all()
    base = Estimate.exact(exact.nfe, exact.blocks_run, exact.attention_pairs, exact.flops)
    model = describe_pipeline(pipe)
    assert settings.estimate(model, model.workload(steps=8), base).problems(receipt.counts) == []
    assert receipt.nfe_requested == 16
    assert receipt.techniques[0].effects["evaluations_skipped"] == 16 - receipt.nfe
    assert receipt.flops_dense == pytest.approx(exact.flops)


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx", "hunyuan"])
def test_an_empty_interval_is_the_conditional_model(name):
    unguided = generate(pipeline(name), name, **call(name, guided=False))[0]
    latents, receipt = generate(pipeline(name), name, GuidanceInterval(low=0.0, high=0.0))
    assert torch.allclose(latents, unguided, atol=1e-5)
    assert receipt.nfe == 8
    assert "guidance never acts" in receipt.warnings[0]


@pytest.mark.parametrize("name", ["wan2.1", "ltx"])
def test_whole_interval_is_the_exact_run(name):
    exact, receipt = generate(pipeline(name), name)
    same, other = generate(pipeline(name), name, GuidanceInterval(low=0.0, high=1.0))
    assert torch.equal(exact, same)
    assert receipt.counts == other.counts


@pytest.mark.parametrize("name", ["wan2.1", "cogvideox", "ltx"])
def test_batch_mates_do_not_matter(name):
    prompts, seeds = ["a red ball", "zzz 99 !!"], [3, 11]
    settings = GuidanceInterval(low=0.25, high=0.5)
    together = generate(pipeline(name), name, settings, prompt=prompts, seed=seeds)[0]
    for i in range(2):
        alone = generate(pipeline(name), name, settings, prompt=prompts[i], seed=seeds[i])[0]
        assert torch.allclose(together[i], alone[0], atol=1e-4)


@pytest.mark.parametrize("name", ["wan2.1", "ltx"])
def test_without_guidance_it_never_acts(name):
    unguided = call(name, guided=False)
    expected = generate(pipeline(name), name, **unguided)[0]
    latents, receipt = generate(pipeline(name), name, GuidanceInterval(), **unguided)
    assert torch.equal(latents, expected)
    assert receipt.nfe == 8
    assert "guidance_interval was in force and never acted in this run" in receipt.warnings


def test_a_model_without_guidance_is_refused():
    import dataclasses

    model = describe_pipeline(pipeline("wan2.1"))
    bare = dataclasses.replace(model, offers=frozenset())
    with pytest.raises(PlanError, match="needs classifier-free guidance"):
        Plan([GuidanceInterval()]).check(bare)
