"""Few steps and solver against plain diffusers pipelines, bit for bit."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, PlanError
from vivace.models.describe import describe_pipeline
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.base import Estimate
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.techniques.trajectory.solver import Solver
from vivace.testing.models import call, pipeline

FAMILIES = ["wan2.1", "wan2.2", "cogvideox", "ltx", "hunyuan"]


def arguments(name, **changes):
    values = {**call(name), **changes}
    return {k: v for k, v in values.items() if v is not None}


def plain(pipe, name, **changes):
    """Latents of diffusers alone."""
    generator = torch.Generator().manual_seed(3)
    values = arguments(name, **changes)
    return pipe(prompt="a red ball", generator=generator, output_type="latent", **values).frames


def generate(pipe, name, *techniques, **changes):
    """(latents, receipt) under a plan; the number of steps is left to the plan."""
    values = arguments(name, **{"num_inference_steps": None, **changes})
    with accelerate(pipe, Plan(techniques)) as fast:
        out = fast("a red ball", seed=3, output_type="latent", **values)
    return out.raw.frames, out.receipt


@pytest.mark.parametrize("name", FAMILIES)
def test_few_steps_is_diffusers_with_fewer_steps(name):
    latents, receipt = generate(pipeline(name), name, FewSteps(steps=3))
    assert torch.equal(latents, plain(pipeline(name), name, num_inference_steps=3))
    assert (len(receipt.steps), receipt.nfe, receipt.completed) == (3, 6, True)
    assert receipt.techniques[0].effects == {"steps_saved": 47}
    model = describe_pipeline(pipeline(name))
    exact = generate(pipeline(name), name, num_inference_steps=4)[1]
    base = Estimate.exact(exact.nfe, exact.blocks_run, exact.attention_pairs, exact.flops)
    estimate = FewSteps(steps=3).estimate(model, model.workload(steps=4), base)
    assert estimate.problems(receipt.counts) == []


def test_the_callers_number_of_steps_wins():
    latents, receipt = generate(pipeline("ltx"), "ltx", FewSteps(steps=3), num_inference_steps=4)
    assert torch.equal(latents, plain(pipeline("ltx"), "ltx", num_inference_steps=4))
    assert "few_steps was in force and never acted in this run" in receipt.warnings


def test_the_callers_noise_levels_stay():
    sigmas = [1.0, 0.8, 0.3]
    changes = {"sigmas": sigmas, "num_inference_steps": None}
    latents, receipt = generate(pipeline("hunyuan"), "hunyuan", FewSteps(steps=5), **changes)
    assert torch.equal(latents, plain(pipeline("hunyuan"), "hunyuan", **changes))
    assert len(receipt.steps) == 3


@pytest.mark.parametrize(("name", "key"), [("wan2.1", "flow_shift"), ("hunyuan", "shift")])
def test_shift_is_the_schedulers_own(name, key):
    latents, receipt = generate(pipeline(name), name, FewSteps(steps=4, shift=11.0))
    pipe = pipeline(name)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{key: 11.0})
    assert torch.equal(latents, plain(pipe, name, num_inference_steps=4))
    assert receipt.steps[1].sigma > 0.9


def test_shift_takes_the_place_of_the_shift_by_resolution():
    _, receipt = generate(pipeline("ltx"), "ltx", FewSteps(steps=2, shift=3.0))
    assert [s.sigma for s in receipt.steps] == pytest.approx([1.0, 0.75])


def test_shift_alone_keeps_the_number_of_steps():
    assert FewSteps(steps=None).is_identity
    assert not FewSteps(steps=None, shift=2.0).is_identity
    _, receipt = generate(
        pipeline("wan2.1"), "wan2.1", FewSteps(steps=None, shift=2.0), num_inference_steps=2
    )
    assert len(receipt.steps) == 2
    assert receipt.steps[1].sigma == pytest.approx(2 / 3, abs=1e-3)


def test_refusals_say_what_to_do():
    with pytest.raises(PlanError, match="shift needs a flow-matching scheduler"):
        accelerate(pipeline("cogvideox"), Plan([FewSteps(shift=3.0)]))
    with pytest.raises(ConfigError, match="whole number"):
        FewSteps(steps=3.5)
    with pytest.raises(PlanError, match=r"dpm\+\+2m cannot take the place of .*; use unipc or euler"):
        accelerate(pipeline("ltx"), Plan([Solver()]))
    with pytest.raises(PlanError, match=r"unipc cannot take the place of CogVideoXDDIMScheduler"):
        accelerate(pipeline("cogvideox"), Plan([Solver(solver="unipc")]))
    bent = pipeline("wan2.1")
    bent.scheduler = type(bent.scheduler).from_config(bent.scheduler.config, use_karras_sigmas=True)
    with pytest.raises(PlanError, match="knows no solver that keeps the noise schedule"):
        accelerate(bent, Plan([Solver()]))


SWAPS = [
    ("wan2.1", "dpm++2m", "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("wan2.2", "dpm++3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("wan2.1", "euler", "DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("hunyuan", "unipc", "UniPCMultistepScheduler", {"flow_shift": 7.0}),
    ("ltx", "unipc", "UniPCMultistepScheduler", {}),
    ("cogvideox", "sde-dpm++2m", "CogVideoXDPMScheduler", {}),
]


@pytest.mark.parametrize(("name", "solver", "scheduler", "settings"), SWAPS)
def test_solver_is_the_plain_pipeline_with_that_scheduler(name, solver, scheduler, settings):
    pipe = pipeline(name)
    if "UniPC" in scheduler:
        settings = settings | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    expected = plain(pipe, name, num_inference_steps=5)
    changed = pipeline(name)
    before = changed.scheduler
    latents, receipt = generate(changed, name, Solver(solver=solver), num_inference_steps=5)
    assert torch.equal(latents, expected)
    assert receipt.warnings == []
    assert receipt.nfe == 10
    assert not torch.equal(latents, plain(pipeline(name), name, num_inference_steps=5))
    assert changed.scheduler is before


def test_first_order_dpm_is_euler_on_a_straight_path():
    """x' = x + (sigma' - sigma) v, by hand on the schedule that the solver announces."""
    pipe = pipeline("wan2.1")
    latents, _ = generate(pipe, "wan2.1", Solver(solver="euler"), num_inference_steps=4)
    reference = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    reference.set_timesteps(4)
    sigmas = reference.sigmas
    with torch.no_grad():
        text, negative = pipe.encode_prompt("a red ball", "", max_sequence_length=16)
        x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        for t, now, then in zip(reference.timesteps, sigmas, sigmas[1:], strict=False):
            c, u = (pipe.transformer(x, t.expand(1), e, return_dict=False)[0] for e in (text, negative))
            x = x + (then - now) * (u + 5.0 * (c - u))
    assert torch.allclose(latents, x, atol=2e-4)


@pytest.mark.parametrize(("name", "solver"), [("wan2.1", "dpm++2m"), ("ltx", "unipc")])
def test_fewer_steps_of_another_solver_with_another_shift(name, solver):
    pipe = pipeline(name)
    scheduler = pipe.scheduler
    signature = inspect.signature(scheduler.set_timesteps)
    plan = Plan([FewSteps(steps=4, shift=5.0), Solver(solver=solver)])
    with accelerate(pipe, plan) as fast:
        assert pipe.scheduler is not scheduler
        values = arguments(name, num_inference_steps=None)
        out = fast("a red ball", seed=3, output_type="latent", **values)
    assert len(out.receipt.steps) == 4
    assert out.receipt.warnings == []
    even = np.linspace(1.0, 0.0, 5)[:-1]
    assert [s.sigma for s in out.receipt.steps] == pytest.approx(list(5 * even / (1 + 4 * even)), abs=2e-3)
    assert pipe.scheduler is scheduler
    assert "set_timesteps" not in vars(scheduler)
    assert inspect.signature(scheduler.set_timesteps) == signature


def test_a_solver_that_is_there_already_is_told():
    problems = Plan([Solver(solver="unipc")]).problems(describe_pipeline(pipeline("wan2.1")))
    assert [(p.kind, p.severity) for p in problems] == [("pointless", "warning")]
