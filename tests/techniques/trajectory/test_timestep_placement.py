"""Timestep placement against plain diffusers pipelines whose scheduler was set up by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError, PlanError
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.techniques.trajectory.solver import Solver
from vivace.techniques.trajectory.timestep_placement import TimestepPlacement
from vivace.testing.subjects import Subject, distance

LIST = (1.0, 0.9, 0.6, 0.25)


def levels(run):
    return [s.sigma for s in run.receipt.steps]


def test_listed_levels_are_the_pipelines_own_argument():
    """This pipeline takes noise levels; with a scheduler of shift 1 it is the same call."""
    run = Subject("hunyuan").run(TimestepPlacement(placement="explicit", sigmas=LIST))
    plain = Subject("hunyuan")
    plain.pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    expected = plain.plain(sigmas=list(LIST), num_inference_steps=None)
    assert torch.equal(run.latents, expected)
    assert levels(run) == pytest.approx(LIST)
    assert run.receipt.techniques[0].effects == {"levels_placed": 4}


class EvenUniPC(diffusers.UniPCMultistepScheduler):
    """UniPC that always starts from the even grid; the shift is its own."""

    def set_timesteps(self, num_inference_steps, device: Any = None):
        even: Any = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        super().set_timesteps(device=device, sigmas=even)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_shift_is_the_schedulers_own_shift(family):
    run = Subject(family).run(TimestepPlacement(placement="shift", shift=7.0, steps=5))
    plain = Subject(family)
    scheduler: Any = EvenUniPC.from_config(plain.pipeline.scheduler.config, flow_shift=7.0)
    plain.pipeline.scheduler = scheduler
    assert distance(run.latents, plain.plain(num_inference_steps=5)) < 1e-4
    assert levels(run) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=2e-6)


def test_multistep_dpm_takes_levels_too():
    """By hand on the listed levels: its first-order steps are Euler's, x + (sigma' - sigma) v."""
    subject = Subject("wan2.1")
    place = TimestepPlacement(placement="explicit", sigmas=LIST)
    with subject.open(Solver(solver="euler"), place) as session:
        run = subject.generate(session)
        assert isinstance(subject.pipeline.scheduler, diffusers.DPMSolverMultistepScheduler)
    pipe = subject.pipeline
    call = subject.defaults | subject.call
    with torch.no_grad():
        text, negative = pipe.encode_prompt("a red ball", "", max_sequence_length=call["max_sequence_length"])
        x = torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(7))
        for now, then in zip(LIST, [*LIST[1:], 0.0], strict=True):
            t = torch.tensor([int(1000 * min(now, 1 - 1e-6))])  # this scheduler's timesteps are whole
            c, u = (pipe.transformer(x, t, e, return_dict=False)[0] for e in (text, negative))
            x = x + (then - now) * (u + 5.0 * (c - u))
    assert distance(run.latents, x) < 1e-3


@pytest.mark.parametrize("solver", ["unipc", "heun", "res2m"])
def test_every_flow_solver_takes_levels(solver):
    run = Subject("ltx").run(Solver(solver=solver), TimestepPlacement(placement="explicit", sigmas=LIST))
    places = [0, 1, 1, 2, 2, 3, 3] if solver == "heun" else [0, 1, 2, 3]
    assert levels(run) == pytest.approx([LIST[i] for i in places], abs=2e-6)
    assert run.receipt.completed


def test_rules_and_their_shift():
    assert TimestepPlacement(placement="karras", rho=2.0).levels(4) == pytest.approx(
        [1, 9 / 16, 1 / 4, 1 / 16]
    )
    odds = lambda s: s / (1 - s)  # noqa: E731
    plain, bent = (TimestepPlacement(placement="ays", shift=s).levels(6)[1:] for s in (1.0, 5.0))
    assert odds(bent) == pytest.approx(5 * odds(plain))
    assert TimestepPlacement(placement="ays").levels(10)[4] == pytest.approx(1.886 / 2.886, abs=1e-3)


def test_the_number_of_steps():
    subject = Subject("wan2.1", {"num_inference_steps": 6})
    assert len(levels(subject.run(TimestepPlacement()))) == 6
    assert len(levels(subject.run(TimestepPlacement(steps=3)))) == 3
    # The caller's number wins, and the rule places it; a list has nothing to say about another number.
    three = TimestepPlacement(steps=3)
    run = subject.run(three, num_inference_steps=5)
    assert levels(run) == pytest.approx(three.levels(5), abs=2e-6)
    run = subject.run(TimestepPlacement(placement="explicit", sigmas=LIST), num_inference_steps=5)
    assert torch.equal(run.latents, subject.plain(num_inference_steps=5))
    assert "timestep_placement was in force and never acted in this run" in run.receipt.warnings


def test_the_callers_noise_levels_stay():
    subject = Subject("hunyuan")
    call = {"sigmas": [1.0, 0.8, 0.3], "num_inference_steps": None}
    run = subject.run(TimestepPlacement(steps=5), **call)
    assert torch.equal(run.latents, subject.plain(**call))
    assert len(run.receipt.steps) == 3


def test_the_search_on_a_real_trajectory():
    """A fine Euler run gives the velocities; four searched steps end nearer to its end than four even ones do."""
    subject = Subject("hunyuan")
    seen = []

    def keep(pipe, step, t, values):
        seen.append(values["latents"].double().flatten())
        return {}

    even = TimestepPlacement(placement="shift", steps=24)
    fine = subject.run(even, callback_on_step_end=keep)
    sigmas = np.array([*levels(fine), 0.0])
    start = torch.randn(fine.latents.shape, generator=torch.Generator().manual_seed(7)).double().flatten()
    points = torch.stack([start, *seen]).numpy()
    velocities = np.diff(points, axis=0) / np.diff(sigmas)[:, None]
    found = TimestepPlacement.from_trajectory(velocities, sigmas, 4)
    assert set(found.sigmas) <= set(sigmas)
    assert len(found.sigmas) == 4
    searched = distance(subject.run(found).latents, fine.latents)
    assert searched < distance(subject.run(even.replace(steps=4)).latents, fine.latents)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"placement": "explicit"}, "needs sigmas"),
        ({"placement": "ays", "sigmas": LIST}, "leave sigmas out"),
        ({"placement": "gits", "sigmas": (1.0, 0.5, 0.6)}, "must fall"),
        ({"placement": "gits", "sigmas": (1.0, 0.5, 0.0)}, "without the final 0"),
        ({"placement": "gits", "sigmas": (1.0, float("nan"))}, "must be numbers"),
        ({"placement": "gits", "sigmas": LIST, "steps": 3}, "leave steps out"),
        ({"steps": 2.5}, "whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TimestepPlacement(**settings)


def test_schedulers_that_take_no_levels_are_refused():
    with pytest.raises(PlanError, match="flow-matching scheduler"):
        Subject("cogvideox").open(TimestepPlacement())
    with pytest.raises(PlanError, match=r"sampler\.schedule"):
        Subject("wan2.1").open(TimestepPlacement(), FewSteps())
    for scheduler, sentence in [
        (diffusers.FlowMatchHeunDiscreteScheduler(), "takes no noise levels of ours"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "turn invert_sigmas off"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "without use_flow_sigmas"),
    ]:
        subject = Subject("ltx")
        subject.pipeline.scheduler = scheduler
        plan = Plan([TimestepPlacement()])
        with pytest.raises(PlanError, match=sentence):
            accelerate(subject.pipeline, plan)
