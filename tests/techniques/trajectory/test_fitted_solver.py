"""The fitted solver against diffusers' own Euler run. Its file: tests/calibration/test_solver_file.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
import torch

from vivace.core.errors import ConfigError, PlanError
from vivace.models.describe import describe_pipeline
from vivace.models.loading import describe
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.plans.solver_fitting import error_of, fit, place, record
from vivace.techniques.trajectory.fitted_solver import FittedSolver, euler, shipped
from vivace.testing import models
from vivace.testing.subjects import Subject, distance

NODES = (0, 1, 3, 6)
CALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 8}


@pytest.fixture
def file(tmp_path):
    made = euler(models.pipeline("wan2.1"), grid=8, nodes=NODES)
    assert made is not None
    return made.save(tmp_path / "solver.json")


class AtNodes(diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler's steps at chosen levels and timesteps."""

    chosen: Any = ()

    def set_timesteps(self, num_inference_steps=None, device: Any = None, **ignored: Any) -> None:
        sigmas, times = self.chosen
        self.sigmas, self.timesteps, self.num_inference_steps = sigmas, times, len(times)
        self._step_index = self._begin_index = None


def test_eulers_weights_are_diffusers_euler(file):
    run = Subject("wan2.1").run(FittedSolver(file=str(file)))
    plain = Subject("wan2.1")
    grid = plain.pipeline.scheduler
    grid.set_timesteps(8)
    where = torch.tensor([*NODES, 8])
    AtNodes.chosen = grid.sigmas[where], grid.timesteps[where[:-1]].float()
    plain.pipeline.scheduler = AtNodes()
    assert distance(run.latents, plain.plain()) < 1e-4
    assert run.receipt.nfe == 2 * len(NODES)
    assert run.receipt.techniques[0].effects == {"evaluations_saved": 4}


def test_a_fit_on_the_pipeline_beats_euler_and_is_what_the_technique_does(tmp_path):
    pipeline = models.pipeline("wan2.1")
    exact = record(pipeline, ["a", "b"], batch=2, **CALL)
    made, end = fit(exact, 4, nodes=NODES, rounds=1)
    path = made.save(tmp_path / "fitted.json")
    with accelerate(pipeline, Plan([FittedSolver(file=str(path))])) as session:
        run = session(["a", "b"], seed=0, output_type="latent", **CALL)
    assert distance(run.raw.frames.float(), end) < 1e-4
    plain = euler(pipeline, grid=8, nodes=NODES)
    assert plain is not None
    plain.save(tmp_path / "euler.json")
    with accelerate(pipeline, Plan([FittedSolver(file=str(tmp_path / "euler.json"))])) as session:
        worse = session(["a", "b"], seed=0, output_type="latent", **CALL)
    assert made.error < 0.7 * error_of(exact, worse.raw.frames.float())


def test_a_step_count_of_the_callers_own_leaves_the_scheduler_alone(file):
    plain = Subject("wan2.1").plain(num_inference_steps=5)
    run = Subject("wan2.1").run(FittedSolver(file=str(file)), num_inference_steps=5)
    assert torch.equal(run.latents, plain)
    assert "fitted_solver was in force and never acted in this run" in run.receipt.warnings


def test_other_weights_are_refused(tmp_path):
    pipeline = models.pipeline("wan2.1")
    made, _ = fit(record(pipeline, ["a"], **CALL), 3)
    path = made.save(tmp_path / "fitted.json")
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ConfigError, match="other weights"):
        accelerate(pipeline, Plan([FittedSolver(file=str(path))]))


def test_another_shift_is_refused(file):
    pipeline = models.pipeline("wan2.1")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=9.0)
    with pytest.raises(PlanError, match="noise schedule"):
        accelerate(pipeline, Plan([FittedSolver(file=str(file))]))


def test_another_guidance_scale_is_told(file):
    pipeline = models.pipeline("wan2.1")
    with accelerate(pipeline, Plan([FittedSolver(file=str(file))])) as session:
        run = session("a", seed=0, output_type="latent", guidance_scale=2.0, **CALL)
    assert run.receipt.techniques[0].effects["off_guidance"] == 1


def test_steps_that_are_not_the_files_are_refused(file):
    with pytest.raises(ConfigError, match=r"4 steps .* and not of 6"):
        FittedSolver(file=str(file), steps=6).solver(describe("wan2.1-1.3b"))
    with pytest.raises(ConfigError, match="whole number"):
        FittedSolver(steps=2.5)  # type: ignore[arg-type]


def test_shipped_solvers_are_for_the_embedded_model():
    found = shipped("tiny")
    assert {8, 10, 12, 14, 17, 19, 22, 25, 29, 33} == set(found)
    assert all(s.own >= 5 for k, s in found.items() if k >= 12)
    assert all(s.steps == k and s.key.steps == 50 for k, s in found.items())
    assert "make one" in FittedSolver(steps=12).missing(describe("wan2.1-1.3b"))
    assert "8, 10, 12" in FittedSolver(steps=9).missing(describe("tiny"))


def test_near_exact_takes_the_solver_where_one_is_fitted():
    plan = Plan.load("near-exact")
    assert next(t.card.name for t in plan.fitted(describe("tiny")).techniques) == "fitted_solver"
    assert "optimal_schedule" not in {t.card.name for t in plan.fitted(describe("tiny")).techniques}
    other = plan.fitted(describe("wan2.1-1.3b"))
    assert next(t.card.name for t in other.techniques) == "optimal_schedule"
    assert Plan.from_dict(plan.to_dict()).unless == plan.unless == {"optimal_schedule": "fitted_solver"}


def test_placed_steps_rise_within_the_grid():
    for grid in (8, 30, 50):
        for steps in range(1, grid + 1):
            nodes = place(steps, grid)
            assert len(set(nodes)) == steps
            assert nodes[0] == 0
            assert max(nodes) < grid
            assert list(nodes) == sorted(nodes)
            assert list(nodes[: min(round(0.2 * grid), steps // 2)]) == list(
                range(min(round(0.2 * grid), steps // 2))
            )
    assert place(6, 50, lead=4)[:4] == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match="does not fit"):
        place(9, 8)
    with pytest.raises(ConfigError, match="shorter lead"):
        place(3, 8, lead=4)


def test_the_shipped_file_is_for_the_shipped_weights():
    from vivace.calibration.artifact import model_hash
    from vivace.models.loading import load

    pipeline = load("tiny", dtype=None, device="cpu")
    assert describe_pipeline(pipeline).name == "tiny"
    assert {s.key.model_hash for s in shipped("tiny").values()} == {model_hash(pipeline)}
    assert dataclasses.is_dataclass(shipped("tiny")[12])


def test_kept_runs_count_only_for_what_they_were_made_of(tmp_path):
    pipeline = models.pipeline("wan2.1")
    made = record(pipeline, ["a", "b"], part=tmp_path / "part", **CALL)
    (tmp_path / "part" / "1.pt").write_bytes(b"cut off")
    seen: list[int] = []
    again = record(pipeline, ["a", "b"], part=tmp_path / "part", on_prompt=seen.append, **CALL)
    assert seen == [1]
    assert torch.equal(again.states, made.states)
    assert again.sigmas == made.sigmas
    first, second = (fit(e, 3)[0] for e in (made, again))
    assert first.weights == second.weights
    record(pipeline, ["a", "c"], part=tmp_path / "part", on_prompt=seen.append, **CALL)
    assert seen == [1, 0, 1]
