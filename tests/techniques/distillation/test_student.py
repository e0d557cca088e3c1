"""Student checkpoint against the same weights loaded straight into the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vivace.calibration.artifact import model_hash
from vivace.core.errors import PlanError, WeightsError
from vivace.models import student as student_files
from vivace.models.describe import describe_pipeline
from vivace.models.pruned_file import base_hash
from vivace.models.student import merge_students, save_student, student_tensors
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.distillation.artifact import Artifact, Sampler, architecture
from vivace.techniques.distillation.student import StudentCheckpoint, plan_of
from vivace.techniques.distillation.student_sampler import StudentSampler
from vivace.techniques.trajectory.few_steps import FewSteps
from vivace.techniques.trajectory.guidance_interval import GuidanceInterval
from vivace.testing.models import CALL, pipeline


def perturbed(module, seed=0):
    """A student's state: the teacher's with noise on it."""
    generator = torch.Generator().manual_seed(seed)
    noise = {k: torch.randn(v.shape, generator=generator) for k, v in module.state_dict().items()}
    return {k: (v + 0.05 * noise[k].to(v)).contiguous() for k, v in module.state_dict().items()}


def latents(pipe, *techniques):
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red ball", seed=3, output_type="latent", **CALL).raw.frames


def problems(technique, pipe, *others):
    found = Plan([technique, *others]).problems(describe_pipeline(pipe))
    return [(p.kind, p.severity, p.message) for p in found if p.technique == "student_checkpoint"]


@pytest.mark.parametrize("name", ["wan2.1", "ltx"])
def test_equals_the_weights_loaded_by_hand_and_comes_back_bit_for_bit(name, tmp_path):
    pipe = pipeline(name)
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    parameters = dict(pipe.transformer.named_parameters())
    state = perturbed(pipe.transformer)
    save_file(state, tmp_path / "student.safetensors")
    teacher = latents(pipe)
    student = latents(pipe, StudentCheckpoint(path=str(tmp_path / "student.safetensors")))
    assert not torch.equal(teacher, student)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(parameters[k] is v for k, v in pipe.transformer.named_parameters())
    assert torch.equal(latents(pipe), teacher)
    pipe.transformer.load_state_dict(state)
    assert torch.equal(latents(pipe), student)


def test_shards_and_both_experts(tmp_path):
    pipe = pipeline("wan2.2")
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        state = perturbed(getattr(pipe, name), seed=len(name))
        keys = sorted(state)
        for i, part in enumerate((keys[::2], keys[1::2])):
            save_file({k: state[k] for k in part}, tmp_path / name / f"weights-{i}.safetensors")
    student = latents(pipe, StudentCheckpoint(path=str(tmp_path)))
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).load_state_dict(perturbed(getattr(pipe, name), seed=len(name)))
    assert torch.equal(latents(pipe), student)


def test_weights_of_another_type_take_the_models(tmp_path):
    pipe = pipeline("wan2.1")
    state = {k: v.bfloat16() for k, v in perturbed(pipe.transformer).items()}
    save_file(state, tmp_path / "student.safetensors")
    student = latents(pipe, StudentCheckpoint(path=str(tmp_path)))
    pipe.transformer.load_state_dict({k: v.float() for k, v in state.items()})
    assert torch.equal(latents(pipe), student)


def test_files_that_cannot_be_used_are_named_before_anything_changes(tmp_path):
    pipe = pipeline("wan2.1")
    [(kind, _, message)] = problems(StudentCheckpoint(), pipe)
    assert (kind, "path=" in message) == ("file", True)
    missing = tmp_path / "none.safetensors"
    [(_, _, message)] = problems(StudentCheckpoint(path=str(missing)), pipe)
    assert message.startswith(f"{missing} is missing")
    [(_, _, message)] = problems(StudentCheckpoint(path=str(tmp_path)), pipe)
    assert f"the folder {tmp_path} holds no .safetensors file" in message

    good = tmp_path / "good.safetensors"
    save_file(perturbed(pipe.transformer), good)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(good.read_bytes()[:-100])
    [(_, _, message)] = problems(StudentCheckpoint(path=str(broken)), pipe)
    assert f"{broken} cannot be read as safetensors" in message
    with pytest.raises(PlanError, match="cannot be read"):
        accelerate(pipe, Plan([StudentCheckpoint(path=str(broken))]))

    [(kind, _, message)] = problems(StudentCheckpoint(path=str(good)), pipeline("wan2.1", layers=2))
    assert kind == "shapes"
    assert f"{good} does not fit WanPipeline" in message
    [(kind, _, message)] = problems(StudentCheckpoint(path=str(good), expert="transformer_2"), pipe)
    assert (kind, "has none" in message) == ("expert", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("proj_out.bias"), "proj_out.bias missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra unknown to the model"),
        (lambda s: s.update({"proj_out.bias": torch.zeros(3)}), "proj_out.bias of another shape (3 for 64)"),
    ],
)
def test_weights_that_do_not_fit_say_which(change, words, tmp_path):
    pipe = pipeline("wan2.1")
    state = perturbed(pipe.transformer)
    change(state)
    save_file(state, tmp_path / "student.safetensors")
    [(kind, _, message)] = problems(StudentCheckpoint(path=str(tmp_path)), pipe)
    assert kind == "shapes"
    assert words in message


def write_student(folder: Path, pipe, **facts) -> StudentCheckpoint:
    save_file(perturbed(pipe.transformer), folder / "student.safetensors")
    Artifact(**facts).write(folder)
    return StudentCheckpoint(path=str(folder / "student.safetensors"))


def test_artifact_round_trip_and_damage(tmp_path):
    sampler = Sampler(steps=4, sigmas=(1.0, 0.9, 0.75, 0.5), shift=3.0, guidance=1.0)
    artifact = Artifact("dmd2", "f00", sampler)
    artifact.write(tmp_path)
    assert Artifact.beside(tmp_path) == artifact
    assert Artifact.beside(tmp_path / "weights.safetensors") == artifact
    (tmp_path / "artifact.json").write_text(json.dumps({"sampler": {"speed": 3}}))
    with pytest.raises(WeightsError, match=r"artifact\.json is not a valid artefact"):
        Artifact.beside(tmp_path)
    pipe = pipeline("wan2.1")
    save_file(perturbed(pipe.transformer), tmp_path / "student.safetensors")
    [(kind, _, message)] = problems(StudentCheckpoint(path=str(tmp_path)), pipe)
    assert (kind, "artifact.json" in message) == ("file", True)


def test_a_student_of_another_base_is_refused(tmp_path):
    pipe = pipeline("wan2.1")
    base = architecture(pipe.transformer.config)
    assert problems(write_student(tmp_path, pipe, base=base), pipe) == []
    [(kind, severity, _)] = problems(write_student(tmp_path, pipe, base="0" * 64), pipe)
    assert (kind, severity) == ("base", "error")


def test_the_sampler_it_was_trained_for_is_asked_for(tmp_path):
    pipe = pipeline("wan2.1")
    student = write_student(tmp_path, pipe, sampler=Sampler(steps=4, shift=5.0, guidance=1.0))
    found = problems(student, pipe)
    assert [k for k, _, _ in found] == ["steps", "shift", "guidance"]
    assert all(severity == "warning" for _, severity, _ in found)
    assert problems(student, pipe, FewSteps(steps=4, shift=5.0), GuidanceInterval(high=0.0))[0:] == []
    even = tuple(5 * s / (1 + 4 * s) for s in (1.0, 0.75, 0.5, 0.25))
    student = write_student(tmp_path, pipe, sampler=Sampler(sigmas=(*even, 0.0)))
    assert problems(student, pipe, FewSteps(steps=4, shift=5.0)) == []
    assert [k for k, _, _ in problems(student, pipe)] == ["sigmas"]


@pytest.mark.parametrize("store", ["int8-delta", "int8", "bf16", "lora:4", "int8-lora:4"])
def test_every_way_of_storing_runs_and_comes_back_bit_for_bit(store, tmp_path):
    pipe = pipeline("wan2.1")
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    parameters = dict(pipe.transformer.named_parameters())
    teacher = latents(pipe)
    path = save_student(tmp_path / "s.safetensors", perturbed(pipe.transformer), before, Artifact(), store)
    student = latents(pipe, StudentCheckpoint(path=str(path)))
    assert all(torch.equal(before[k], v) for k, v in pipe.transformer.state_dict().items())
    assert all(parameters[k] is v for k, v in pipe.transformer.named_parameters())
    assert torch.equal(latents(pipe), teacher)
    pipe.transformer.load_state_dict({k: v.float() for k, v in student_tensors([path], before.__getitem__)})
    assert torch.equal(latents(pipe), student)
    assert not torch.equal(student, teacher)
    if store == "int8-delta":
        pipe.transformer.load_state_dict(perturbed(pipeline("wan2.1").transformer))
        assert (latents(pipe) - student).norm() < 0.05 * (teacher - student).norm()


def test_a_delta_adds_to_a_base_in_bfloat16(tmp_path):
    pipe = pipeline("wan2.1")
    pipe.transformer.load_state_dict(
        {k: v.bfloat16().float() for k, v in pipe.transformer.state_dict().items()}
    )
    base = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    path = save_student(tmp_path / "s.safetensors", perturbed(pipe.transformer), base, Artifact())
    half = pipeline("wan2.1")
    half.transformer.load_state_dict(base)
    half.transformer.to(torch.bfloat16)
    with accelerate(half, Plan([StudentCheckpoint(path=str(path))])):
        found = {k: v.clone() for k, v in half.transformer.state_dict().items()}
    expected = dict(student_tensors([path], base.__getitem__))
    assert all(torch.equal(v, expected[k].bfloat16()) for k, v in found.items())


def test_a_merged_student_runs(tmp_path):
    pipe = pipeline("wan2.1")
    base = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    states = [perturbed(pipe.transformer, seed) for seed in (1, 2)]
    files = [save_student(tmp_path / f"{i}.safetensors", s, base, Artifact()) for i, s in enumerate(states)]
    path = merge_students(files, [0.5, 0.5], tmp_path / "both.safetensors")
    ours = latents(pipe, StudentCheckpoint(path=str(path)))
    pipe.transformer.load_state_dict({k: (states[0][k] + states[1][k]) / 2 for k in base})
    assert (latents(pipe) - ours).norm() < 0.05 * ours.norm()


def test_gates_of_sparse_students_are_averaged_over_those_that_have_them(tmp_path):
    pipe = pipeline("wan2.1")
    base = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    name, files = "sparse_attention.transformer.blocks.0.attn1.gate", []
    for seed, gate in enumerate(([1.0, 0.0], [3.0, 2.0], None)):
        state = perturbed(pipe.transformer, seed) | ({} if gate is None else {name: torch.tensor(gate)})
        files.append(save_student(tmp_path / f"{seed}.safetensors", state, base, Artifact()))
    path = merge_students(files, [0.25, 0.5, 0.25], tmp_path / "all.safetensors")
    found = dict(student_tensors([path], base.__getitem__))
    torch.testing.assert_close(found[name], torch.tensor([7.0, 4.0]) / 3.0)
    with pytest.raises(WeightsError, match="add up to 0"):
        merge_students(files[:2], [0.5, -0.5], tmp_path / "none.safetensors")


def test_a_delta_on_other_weights_is_refused_and_nothing_changes(tmp_path):
    pipe, other = pipeline("wan2.1"), pipeline("wan2.1", seed=1)
    state = pipe.transformer.state_dict()
    path = save_student(tmp_path / "s.safetensors", perturbed(pipe.transformer), state, Artifact())
    before = {k: v.clone() for k, v in other.transformer.state_dict().items()}
    with pytest.raises(WeightsError, match="trained from other weights than those of WanPipeline"):
        accelerate(other, Plan([StudentCheckpoint(path=str(path))]))
    assert all(torch.equal(before[k], v) for k, v in other.transformer.state_dict().items())


def test_the_teacher_that_it_names_is_asked_for(tmp_path):
    pipe, other = pipeline("wan2.1"), pipeline("wan2.1", seed=1)
    two = pipeline("wan2.2")
    for teacher, good in (
        (model_hash(pipe), pipe),
        (base_hash(two.transformer), two),
        (model_hash(two), two),
    ):
        state = perturbed(good.transformer)
        path = save_student(tmp_path / "s.safetensors", state, None, Artifact(teacher=teacher), "int8")
        technique = StudentCheckpoint(path=str(path))
        accelerate(good, Plan([technique])).close()
        with pytest.raises(WeightsError, match="from other weights"):
            accelerate(other, Plan([technique]))
    path = save_student(tmp_path / "s.safetensors", state, None, Artifact(teacher=model_hash(pipe)), "int8")
    known = dataclasses.replace(describe_pipeline(other), weights=model_hash(other))
    assert [p.kind for p in Plan([StudentCheckpoint(path=str(path))]).problems(known)] == ["teacher"]
    known = dataclasses.replace(describe_pipeline(pipe), weights=model_hash(pipe))
    assert Plan([StudentCheckpoint(path=str(path))]).problems(known) == []


def test_an_architecture_named_inside_the_file_is_checked(tmp_path):
    pipe = pipeline("wan2.1")
    state = pipe.transformer.state_dict()
    said = Artifact(base=architecture(pipe.transformer.config))
    path = save_student(tmp_path / "s.safetensors", perturbed(pipe.transformer), state, said)
    assert problems(StudentCheckpoint(path=str(path)), pipe) == []
    [(kind, severity, _)] = problems(StudentCheckpoint(path=str(path)), pipeline("wan2.1", layers=2))
    assert (kind, severity) == ("base", "error")


def test_a_student_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(student_files, "students_folder", lambda: tmp_path / "students")
    pipe = pipeline("wan2.1")
    [(kind, _, message)] = problems(StudentCheckpoint(path="4-step"), pipe)
    assert (kind, message.startswith("no student is called '4-step'")) == ("file", True)
    sampler, base = Sampler(4, None, 5.0, 1.0, "consistency"), pipe.transformer.state_dict()
    file = tmp_path / "students" / "4-step.safetensors"
    save_student(file, perturbed(pipe.transformer), base, Artifact(sampler=sampler))
    by_name = plan_of("4-step")
    assert by_name == [
        StudentCheckpoint(path="4-step"),
        StudentSampler(steps=4, shift=5.0, solver="consistency"),
    ]
    assert problems(by_name[0], pipe, by_name[1]) == []
    assert torch.equal(latents(pipe, *by_name), latents(pipe, *plan_of(str(file))))
    [(_, _, message)] = problems(StudentCheckpoint(path="4-stepp"), pipe)
    assert "did you mean 4-step" in message


def test_the_line_to_add_is_told_and_silences_the_warnings(tmp_path):
    pipe = pipeline("wan2.1")
    for sampler, kinds in (
        (Sampler(4, None, 5.0, 1.0, "consistency"), {"steps", "shift", "solver", "guidance"}),
        (Sampler(3, (1.0, 0.757, 0.522), None, 1.0, "flow"), {"steps", "sigmas", "solver", "guidance"}),
    ):
        student = write_student(tmp_path, pipe, sampler=sampler)
        found = problems(student, pipe)
        assert {k for k, _, _ in found} == kinds
        line = StudentSampler.of(sampler).line()
        assert all(message.endswith(f"in the plan: {line}") for _, _, message in found)
        assert problems(student, pipe, StudentSampler.of(sampler)) == []
    found = problems(student, pipe, StudentSampler(steps=4, solver="consistency", guided=True))
    assert {k for k, _, _ in found} == {"steps", "sigmas", "solver", "guidance"}


def test_a_contract_that_no_sampler_can_keep_is_told(tmp_path):
    pipe = pipeline("wan2.1")
    student = write_student(tmp_path, pipe, sampler=Sampler(steps=400))
    [(kind, severity, message)] = problems(student, pipe)
    assert (kind, severity) == ("file", "error")
    assert "student_sampler: steps must be from 1 to 50" in message
