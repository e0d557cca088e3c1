"""The solvers as solvers: order of convergence on a flow whose solution is known, and against diffusers' own."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch

from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.trajectory._res_scheduler import FlowRESMultistepScheduler
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.techniques.trajectory.solver import Solver, build, recipes_for
from vivace.testing.models import pipeline
from vivace.testing.subjects import Subject

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MEAN = torch.tensor([[1.5, -0.4, 0.2]], dtype=torch.float64)
WIDTH = torch.tensor([[0.3, 0.8, 1.7]], dtype=torch.float64)
NOISE = torch.tensor([[0.7, -1.1, 0.5]], dtype=torch.float64)


def exact(sigma):
    """The flow of data N(mean, width^2): every quantile keeps its place while mean and deviation move."""
    return (1 - sigma) * MEAN + NOISE * ((1 - sigma) ** 2 * WIDTH**2 + sigma**2).sqrt()


def velocity(x, sigma):
    """E[noise - x0 | x] of that data, the regression of (noise - x0) on x."""
    variance = (1 - sigma) ** 2 * WIDTH**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * WIDTH**2) / variance * (x - (1 - sigma) * MEAN)


def solve(scheduler, stop=None):
    """Distance of the solver from the exact flow after its last step, or at the last level before it."""
    scheduler.set_begin_index(0)
    levels = scheduler.sigmas.double()
    x = exact(levels[0])
    for i, t in enumerate(scheduler.timesteps[:stop]):
        # Heun's second evaluation is at the level where its first one ended.
        v = velocity(x, scheduler.timesteps[i].double() / 1000 if scheduler.order == 2 else levels[i])
        x = scheduler.step(v, t, x, return_dict=False)[0].double()
    return float((x - exact(levels[len(scheduler.timesteps[:stop])])).norm())


def inner(scheduler, steps):
    """Error of a number of steps of equal log-SNR from sigma 0.95 to 0.05."""
    odds = np.exp(np.linspace(np.log(19.0), -np.log(19.0), steps + 1))
    levels = torch.from_numpy(odds / (1 + odds))
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=levels.numpy().copy())
        return solve(scheduler, 2 * steps if scheduler.order == 2 else steps)
    scheduler.set_timesteps(steps + 1)
    scheduler.sigmas = torch.cat([levels, levels.new_zeros(1)])
    scheduler.timesteps = levels * 1000
    return solve(scheduler, steps)


def whole(scheduler, steps):
    """Error at sigma 0 of a number of steps of the even schedule."""
    scheduler.set_timesteps(steps)
    return solve(scheduler)


def solver(name, family="wan2.1"):
    """The scheduler that the technique would put into a pipeline of a family, with an even schedule."""
    pipe = pipeline(family)
    model = Subject(family).model
    config = dict(pipe.scheduler.config) | {"flow_shift": 1.0}
    return build(recipes_for(model)[name], config)


ORDERS = {"euler": 1, "heun": 2, "res2m": 2, "dpm++2m": 2, "dpm++3m": 2, "unipc": 3}
"""A first step of Euler's leaves h^2, so a third order shows only where a corrector mends it: in UniPC of order 2."""


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    scheduler = solver(name)
    errors = [inner(scheduler, n) for n in (10, 20, 40)]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert orders[-1] == pytest.approx(ORDERS[name], abs=0.3)


@pytest.mark.parametrize("name", [n for n in ORDERS if n != "euler"])
def test_the_whole_schedule_is_solved_better_than_by_euler(name):
    assert whole(solver(name), 40) < 0.1 * whole(solver("euler"), 40)


def test_res_is_dpm_solver_in_its_heun_form():
    """Another author's code for the same coefficients, on its own schedule down to 0."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="heun", flow_shift=3.0, **FLOW
    )
    theirs.set_timesteps(9)
    ours = FlowRESMultistepScheduler()
    ours.set_timesteps(sigmas=theirs.sigmas[:-1].numpy())
    assert torch.equal(ours.sigmas, theirs.sigmas)
    generator = torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 4, generator=generator)
    for t, u in zip(ours.timesteps, theirs.timesteps, strict=True):
        v = torch.randn(2, 4, generator=generator)
        x = ours.step(v, t, x, return_dict=False)[0]
        y = theirs.step(v, u, y, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["wan2.1", "ltx", "hunyuan"])
@pytest.mark.parametrize("name", ["heun", "res2m"])
def test_the_noise_levels_are_the_pipelines_own(family, name):
    subject = Subject(family)
    before = [s.sigma for s in subject.run(num_inference_steps=5).receipt.steps]
    receipt = subject.run(Solver(solver=name), num_inference_steps=5).receipt
    seen = [s.sigma for s in receipt.steps]
    # Heun's loop visits every level but the first twice: the end of a step, then the start of the next.
    if name == "heun":
        assert seen[1::2] == seen[2::2]
        seen_once = [*seen[:1], *seen[1::2]]
    else:
        seen_once = seen
    assert seen_once == pytest.approx(before, abs=2e-6)
    assert receipt.nfe == 2 * len(seen) == (18 if name == "heun" else 10)
    assert receipt.completed
    estimate = Solver(solver=name).estimate(
        subject.model, subject.workload(num_inference_steps=5), subject.base_estimate(num_inference_steps=5)
    )
    assert estimate.problems(receipt.counts) == []


def test_heun_in_a_pipeline_by_hand():
    """x' = x + (dt / 2) (v(x) + v(x + dt v(x))) on the levels 1, 0.75 (shift 3 of an even grid), and Euler to 0."""
    pipe = pipeline("wan2.1")
    with accelerate(pipe, Plan([Solver(solver="heun"), FewSteps(steps=2)])) as fast:
        call = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 16}
        out = fast("a red ball", seed=3, output_type="latent", **call)
    latents = out.raw.frames
    levels = [1.0, out.receipt.steps[1].sigma, 0.0]
    assert levels[1] == pytest.approx(0.75, abs=1e-3)
    with torch.no_grad():
        text, negative = pipe.encode_prompt("a red ball", "", max_sequence_length=16)

        def guided(x, sigma):
            t = torch.tensor([1000.0 * sigma])
            c, u = (pipe.transformer(x, t, e, return_dict=False)[0] for e in (text, negative))
            return u + 5.0 * (c - u)

        x = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        v = guided(x, 1.0)
        step = levels[1] - levels[0]
        x = x + step / 2 * (v + guided(x + step * v, levels[1]))
        x = x - levels[1] * guided(x, levels[1])
    assert torch.allclose(latents, x, atol=2e-4)


def test_few_steps_shifts_our_schedulers():
    for name, places in (("res2m", [0, 1, 2]), ("heun", [0, 1, 1, 2, 2])):
        receipt = Subject("ltx").run(Solver(solver=name), FewSteps(steps=3, shift=6.0)).receipt
        even = np.array([1.0, 2 / 3, 1 / 3])[places]
        assert [s.sigma for s in receipt.steps] == pytest.approx(list(6 * even / (1 + 5 * even)), abs=2e-3)


def test_one_step_is_eulers():
    for name in ("heun", "res2m"):
        scheduler = solver(name)
        scheduler.set_timesteps(1)
        x, v = torch.ones(1, 3), torch.full((1, 3), 0.25)
        assert torch.allclose(scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0], x - v)
