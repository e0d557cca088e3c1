"""Student sampler against loops written by hand and against diffusers' own LCM steps, on tiny real pipelines."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from vivace.core.errors import ConfigError, PlanError
from vivace.core.seeding import generators
from vivace.models import second_time
from vivace.models.describe import describe_pipeline
from vivace.models.student import save_student
from vivace.models.student_artifact import Artifact, Sampler, architecture
from vivace.models.student_scheduler import StudentScheduler, first_seeds, fresh_noise, stretched
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.distillation.student import StudentCheckpoint, plan_of
from vivace.techniques.distillation.student_sampler import StudentSampler
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.testing import models
from vivace.testing.models import CALL, pipeline

SHAPE = {k: v for k, v in CALL.items() if k != "num_inference_steps"}
LEVELS = (1.0, 0.9375, 5 / 6, 0.625)
"""1, 3/4, 1/2, 1/4 under a shift of 5."""


def generate(pipe, *techniques, prompt="a red ball", seed=3, **call):
    with accelerate(pipe, Plan(techniques)) as fast:
        out = fast(prompt, seed=seed, output_type="latent", **(SHAPE | call))
    return out.raw.frames, out.receipt


def noise_of(pipe, seed):
    """The latents that the pipeline starts from."""
    return pipe.prepare_latents(1, 16, 32, 32, 9, torch.float32, "cpu", generators(seed, 1)[0])


@torch.no_grad()
def by_hand(pipe, levels, solver, seed=3):
    """The conditional trajectory of a Wan pipeline, step by step."""
    text = pipe.encode_prompt("a red ball", do_classifier_free_guidance=False, max_sequence_length=16)[0]
    x = noise_of(pipe, seed)
    first, second = x.clone(), second_time.of(pipe.transformer)
    for i, (s, t) in enumerate(zip(levels, (*levels[1:], 0.0), strict=True)):
        if second is not None:
            second.gap = s - t
        time = torch.tensor([1000.0 * s])
        v = pipe.transformer(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
        if solver == "consistency":
            x = x - s * v
            if t > 0:
                x = (1 - t) * x + t * fresh_noise(first_seeds(first), i, x)
        else:
            x = x + (t - s) * v
    return x


@pytest.mark.parametrize("solver", ["flow", "consistency"])
def test_is_the_loop_written_by_hand(solver):
    pipe = pipeline("wan2.1")
    exact, _ = generate(pipe, num_inference_steps=4)
    for technique in (
        StudentSampler(steps=4, shift=5.0, solver=solver),
        StudentSampler(sigmas=(*LEVELS, 0.0), solver=solver),
    ):
        ours, receipt = generate(pipe, technique)
        assert torch.allclose(ours, by_hand(pipe, LEVELS, solver), atol=1e-4)
        assert receipt.nfe == 4
        assert receipt.nfe_requested == 8
        assert [s.sigma for s in receipt.steps] == pytest.approx(LEVELS)
    assert torch.equal(generate(pipe, num_inference_steps=4)[0], exact)


def test_a_consistency_step_is_the_one_of_diffusers_own_scheduler():
    ours = StudentScheduler("consistency", levels=LEVELS)
    theirs = FlowMatchLCMScheduler()
    ours.set_timesteps(4)
    theirs.set_timesteps(sigmas=list(LEVELS))
    x = y = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for i in range(4):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + i))
        x = ours.step(v, ours.timesteps[i], x, generator=a, return_dict=False)[0]
        y = theirs.step(v, theirs.timesteps[i], y, generator=b, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-5)
    assert torch.allclose(ours.timesteps, theirs.timesteps)


def test_fresh_noise_is_normal_new_in_every_step_and_sample_and_not_the_first():
    first = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seeds = first_seeds(first)
    draws = [fresh_noise(seeds, i, first) for i in range(3)]
    rows = [first[0], first[1], *(d[i] for d in draws for i in range(2))]
    flat = torch.stack([r.flatten() for r in rows])
    assert (torch.corrcoef(flat) - torch.eye(len(rows))).abs().max() < 0.02
    assert flat.mean().abs() < 0.01
    assert (flat.std(dim=1) - 1.0).abs().max() < 0.01
    assert torch.equal(fresh_noise(first_seeds(first[1:]), 2, first[1:])[0], draws[2][1])
    assert first_seeds(first) == first_seeds(first.clone())


@pytest.mark.parametrize("solver", ["flow", "consistency"])
def test_two_in_a_batch_are_the_two_alone(solver):
    pipe, technique = pipeline("wan2.1"), StudentSampler(steps=3, solver=solver)
    prompts = ["a red ball", "two blue cones"]
    both, _ = generate(pipe, technique, prompt=prompts, seed=[3, 8])
    for i, (prompt, seed) in enumerate(zip(prompts, (3, 8), strict=True)):
        one, _ = generate(pipe, technique, prompt=prompt, seed=seed)
        assert torch.allclose(one[0], both[i], atol=1e-4)
        assert torch.equal(one, generate(pipe, technique, prompt=prompt, seed=seed)[0])


def test_the_callers_number_of_steps_wins():
    pipe = pipeline("wan2.1")
    technique = StudentSampler(sigmas=(1.0, 0.757, 0.522), solver="consistency")
    _, receipt = generate(pipe, technique, num_inference_steps=6)
    wanted = (1.0, (1.0 + 0.757) / 2, 0.757, (0.757 + 0.522) / 2, 0.522, 0.261)
    assert [s.sigma for s in receipt.steps] == pytest.approx(wanted)
    with accelerate(pipe, Plan([technique])) as fast:
        pipe("a red ball", output_type="latent", generator=generators(3, 1)[0], **CALL)
        assert len(fast.receipt().steps) == 3  # driven directly, the pipeline's 8 are no wish of the caller's
    assert stretched((1.0, 0.5), 2) == (1.0, 0.5)
    assert stretched((1.0, 0.5), 1) == (1.0,)


@pytest.mark.parametrize("name", ["wan2.2", "ltx", "hunyuan"])
def test_other_flow_pipelines(name):
    pipe, call = pipeline(name), models.call(name)
    call.pop("num_inference_steps")
    for solver in ("flow", "consistency"):
        latents, receipt = generate(pipe, StudentSampler(steps=3, shift=2.0, solver=solver), **call)
        assert torch.isfinite(latents).all()
        assert receipt.nfe == 3
        assert [s.sigma for s in receipt.steps] == pytest.approx((1.0, 0.8, 0.5))


def test_a_shift_by_resolution_stays_where_none_is_given():
    pipe, call = pipeline("ltx"), models.call("ltx") | {"num_inference_steps": 4}
    exact = generate(pipe, **call)[1]
    ours = generate(pipe, StudentSampler(steps=4), **call)[1]
    assert [s.sigma for s in ours.steps] == pytest.approx([s.sigma for s in exact.steps], abs=1e-4)


def test_guidance_stays_where_the_student_wants_it():
    pipe = pipeline("wan2.1")
    plain, guided = (generate(pipe, StudentSampler(steps=2, guided=g)) for g in (False, True))
    assert (plain[1].nfe, guided[1].nfe) == (2, 4)
    alone, _ = generate(pipe, StudentSampler(steps=2, guided=True), guidance_scale=1.0)
    assert torch.allclose(alone, plain[0], atol=1e-6)
    assert not torch.allclose(guided[0], plain[0], atol=1e-3)


def test_what_cannot_be_sampled_so_is_refused():
    model = describe_pipeline(pipeline("cogvideox"))
    [problem] = Plan([StudentSampler()]).problems(model)
    assert "student_sampler: needs a flow-matching scheduler" in str(problem)
    wan = describe_pipeline(pipeline("wan2.1"))
    [problem] = Plan([StudentSampler(solver="flow_map")]).problems(wan)
    assert (problem.kind, "student_checkpoint" in problem.message) == ("second_time", True)
    assert [p.kind for p in Plan([StudentSampler(), FewSteps()]).problems(wan)] == ["conflict"]
    for wrong in (
        {"sigmas": (0.5, 0.7)},
        {"sigmas": (1.2, 0.5)},
        {"sigmas": (1.0, 0.5), "steps": 4},
        {"steps": 2.5},
    ):
        with pytest.raises(ConfigError, match=r"sigmas|whole number"):
            StudentSampler(**wrong)
    assert StudentSampler().steps == 4
    assert StudentSampler(sigmas=(1.0, 0.5, 0.0)).steps == 2


def flow_map_student(pipe, folder, sampler=None):
    """A file with new weights and a second time embedding that matters."""
    trained, generator = pipeline("wan2.1"), torch.Generator().manual_seed(2)
    base = pipe.transformer.state_dict()
    second_time.attach(trained.transformer)
    with torch.no_grad():
        for p in trained.transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    said = Artifact(base=architecture(pipe.transformer.config), sampler=sampler or Sampler())
    path = save_student(folder / "map.safetensors", trained.transformer.state_dict(), base, said)
    return trained, str(path)


def test_a_flow_map_knows_how_far_its_steps_go(tmp_path):
    pipe = pipeline("wan2.1")
    exact = generate(pipe, num_inference_steps=2)[0]
    keys = list(pipe.transformer.state_dict())
    sampler = Sampler(steps=2, shift=5.0, guidance=1.0, solver="flow_map")
    trained, path = flow_map_student(pipe, tmp_path, sampler)
    plan = plan_of(path)
    assert plan == [StudentCheckpoint(path=path), StudentSampler(steps=2, shift=5.0, solver="flow_map")]
    ours, receipt = generate(pipe, *plan)
    assert not receipt.warnings
    levels = (1.0, 5 / 6)
    # The deltas are rounded to int8.
    assert torch.allclose(ours, by_hand(trained, levels, "flow_map"), atol=0.02)
    without = generate(pipe, StudentCheckpoint(path=path), StudentSampler(steps=2, shift=5.0))[0]
    assert not torch.allclose(ours, without, atol=0.05)
    assert torch.equal(generate(pipe, num_inference_steps=2)[0], exact)
    assert list(pipe.transformer.state_dict()) == keys
    assert second_time.of(pipe.transformer) is None


def test_a_flow_map_that_does_not_fit_is_refused(tmp_path):
    pipe = pipeline("wan2.1")
    state = pipe.transformer.state_dict() | {"second_time.linear_1.weight": torch.zeros(3, 3)}
    path = save_student(tmp_path / "s.safetensors", state, None, Artifact(), "int8")
    [problem] = Plan([StudentCheckpoint(path=str(path))]).problems(describe_pipeline(pipe))
    assert "second_time" in problem.message
    with pytest.raises(PlanError, match="does not fit"):
        accelerate(pipe, Plan([StudentCheckpoint(path=str(path))]))


def test_a_contract_becomes_a_plan_file(tmp_path):
    pipe = pipeline("wan2.1")
    base = pipe.transformer.state_dict()
    student = {k: v * 1.01 if v.is_floating_point() else v for k, v in base.items()}
    sampler = Sampler(3, (1.0, 0.757, 0.522), 8.0, 1.0, "consistency")
    path = str(save_student(tmp_path / "s.safetensors", student, base, Artifact(sampler=sampler)))
    plan = Plan(plan_of(path), "student")
    plan.save(tmp_path / "plan.yaml")
    again = Plan.load(tmp_path / "plan.yaml")
    assert again.techniques == plan.techniques
    assert again.problems(describe_pipeline(pipe)) == []
    line = again.techniques[1].line()
    assert line == "- {technique: student_sampler, solver: consistency, sigmas: [1, 0.757, 0.522]}"
    text = f"vivace_plan: 1\ntechniques:\n{line}\n"
    (tmp_path / "line.yaml").write_text(text)
    assert Plan.load(tmp_path / "line.yaml").techniques == again.techniques[1:]
    assert plan_of(str(save_student(tmp_path / "t.safetensors", student, base, Artifact())))[1:] == []
