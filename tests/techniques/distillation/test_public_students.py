"""Public students: their facts are whole, they are found in the local cache only, and the way to them is told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from vivace.core.errors import ConfigError, WeightsError
from vivace.models import student as student_files
from vivace.models.describe import describe_pipeline
from vivace.models.student_artifact import noise_levels
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.techniques.distillation import public
from vivace.techniques.distillation.lora import Lora
from vivace.techniques.distillation.public import PublicStudent, place_of, public_students
from vivace.techniques.distillation.student import StudentCheckpoint, plan_of
from vivace.techniques.distillation.student_sampler import StudentSampler
from vivace.testing.models import CALL, pipeline

FACTS = {
    "title": "A student",
    "base": "somebody/base",
    "repo": "somebody/student",
    "format": "diffusers",
    "steps": 3,
    "sigmas": (1.0, 0.757, 0.522),
    "solver": "consistency",
}
CHECKPOINT = PublicStudent(
    name="their-student", kind="checkpoint", file="transformer/", attention="VSA", ignore=("gate",), **FACTS
)
ADAPTER = PublicStudent(name="their-lora", kind="lora", file="lora.safetensors", **FACTS)


def latents(pipe, *techniques):
    with accelerate(pipe, Plan(techniques)) as fast:
        return fast("a red ball", seed=3, output_type="latent", **CALL).raw.frames


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and a function that puts files of a repository into it."""
    hub, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(public, "public_students", lambda: {s.name: s for s in (CHECKPOINT, ADAPTER)})
    monkeypatch.chdir(tmp_path)

    def put(file, tensors=None, text=""):
        folder = hub / "models--somebody--student"
        place = folder / "snapshots" / commit / file
        place.parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        place.write_text(text) if tensors is None else save_file(tensors, place)
        return place

    return put


def test_the_facts_are_whole():
    known = public_students()
    assert {"fastwan2.1-1.3b", "lightx2v-wan2.1-4step", "rcm-wan2.1-1.3b", "accvideo-hunyuan"} <= set(known)
    for name, student in known.items():
        assert name == student.name
        assert "/" in student.base
        assert "/" in student.repo
        assert student.source.startswith("https://"), name
        assert student.license
        assert student.confidence in ("checked", "unverified")
        assert student.format in ("diffusers", "original", "pickle")
        assert len(student.artifact.sampler.levels()) == student.steps
        # A file that is no safetensors file is not called one.
        assert (student.format == "pickle") == student.file.endswith((".pt", ".pth")), name
        if student.expert == "transformer":
            assert StudentSampler.of(student.artifact.sampler).steps == student.steps


def test_levels_are_those_of_the_published_schedules():
    known = public_students()
    angles = (math.atan(80.0), 1.3, 1.0, 0.6)
    levels = [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles]
    assert known["rcm-wan2.1-1.3b"].sigmas == pytest.approx(levels, abs=1e-6)
    # LightX2V's entries 1000, 750, 500, 250 of a thousand levels under shift 5.
    thousand = noise_levels(1000, 5.0)
    entries = [thousand[1000 - n] for n in (1000, 750, 500, 250)]
    assert known["lightx2v-wan2.1-4step"].artifact.sampler.levels() == pytest.approx(entries)


def test_what_is_not_in_the_cache_is_told_and_not_fetched(cache, monkeypatch):
    import socket

    def closed(*args, **kwargs):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", closed)
    pipe = describe_pipeline(pipeline("wan2.1"))
    told = {
        StudentCheckpoint(path="their-student"): "hf download somebody/student --include 'transformer/*'",
        Lora(path="their-lora"): "hf download somebody/student lora.safetensors",
    }
    for technique, command in told.items():
        [problem] = [p for p in Plan([technique]).problems(pipe) if p.kind == "file"]
        assert problem.message == f"{technique.path} is not on this machine; download it with `{command}`."
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    cache("transformer/model.safetensors.index.json", text=json.dumps(index))
    cache("transformer/one.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="is not on this machine"):
        place_of("their-student", "student", "checkpoint")


def test_a_checkpoint_in_the_cache_runs_without_what_only_its_own_attention_uses(cache):
    pipe, generator = pipeline("wan2.1"), torch.Generator().manual_seed(0)
    state = {
        k: (v + 0.05 * torch.randn(v.shape, generator=generator)).contiguous()
        for k, v in pipe.transformer.state_dict().items()
    }
    cache("transformer/model.safetensors", state | {"blocks.0.gate.weight": torch.zeros(2, 2)})
    plan = plan_of("their-student")
    assert plan[1] == StudentSampler(sigmas=(1.0, 0.757, 0.522), solver="consistency")
    found = Plan(plan).problems(describe_pipeline(pipe))
    assert [p.kind for p in found] == ["attention"]
    ours = latents(pipe, *plan)
    pipe.transformer.load_state_dict(state)
    assert torch.equal(latents(pipe, plan[1]), ours)


def test_a_lora_in_the_cache_is_merged(cache):
    pipe = pipeline("wan2.1")
    linear: nn.Linear = pipe.transformer.blocks[0].attn1.to_q
    down, up = 0.3 * torch.ones(1, linear.in_features), torch.ones(linear.out_features, 1)
    names = ("blocks.0.self_attn.q.lora_down.weight", "blocks.0.self_attn.q.lora_up.weight")
    cache("lora.safetensors", dict(zip((f"diffusion_model.{n}" for n in names), (down, up), strict=True)))
    plan = plan_of("their-lora")
    assert plan[0] == Lora(path="their-lora")
    ours = latents(pipe, *plan)
    with torch.no_grad():
        linear.weight += up @ down
    assert torch.allclose(latents(pipe, plan[1]), ours, atol=1e-5)


def test_wrong_names_and_kinds_are_refused(cache, monkeypatch):
    for path, kind, words in (
        ("their-studnet", "checkpoint", "did you mean their-student"),
        ("their-student", "lora", "is a checkpoint; give it to student_checkpoint"),
        ("their-lora", "checkpoint", "is a lora; give it to lora"),
    ):
        with pytest.raises(WeightsError, match=words):
            place_of(path, "student", kind)
    for path in ("./their-student", "a/their-student", "their-student.safetensors", ""):
        assert place_of(path, "student", "checkpoint") == path
    Path("their-student").mkdir()
    assert place_of("their-student", "student", "checkpoint") == "their-student"
    Path("their-student").rmdir()
    monkeypatch.setattr(public, "public_students", public_students)
    with pytest.raises(WeightsError, match=r"published as rCM.*pt.*does not open"):
        place_of("rcm-wan2.1-1.3b", "student", "checkpoint")
    monkeypatch.setattr(student_files, "shipped_students", lambda: {"fasthunyuan": Path("ours.safetensors")})
    assert place_of("fasthunyuan", "student", "checkpoint") == "ours.safetensors"


@pytest.mark.parametrize(
    "change",
    [{"steps": 4}, {"kind": "model"}, {"solver": "magic"}, {"colour": "red"}, {"sigmas": [0.5, 0.7, 0.1]}],
)
def test_facts_that_contradict_themselves_are_refused(change):
    item = {**FACTS, "name": "x", "kind": "lora", "file": "f", "sigmas": [1.0, 0.757, 0.522]} | change
    with pytest.raises(ConfigError, match="the public student x is wrong"):
        public._student(item)
