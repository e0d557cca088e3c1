"""Students that come with the package: they fit the embedded model, and `turbo` samples its own as it was trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vivace
from vivace.models.loading import describe
from vivace.models.student import shipped_students
from vivace.models.student_artifact import Artifact
from vivace.plans.plan import Plan
from vivace.techniques.distillation.student import plan_of

STEPS = {"1-step": 1, "2-step": 2, "4-step": 4, "4-step-sparse": 4}
LARGEST = 10 * 2**20
"""Bytes of all of them."""


def test_these_come_with_the_package() -> None:
    files = shipped_students()
    assert sorted(files) == sorted(STEPS)
    assert sum(f.stat().st_size for f in files.values()) <= LARGEST


@pytest.mark.parametrize("name", STEPS)
def test_a_student_fits_the_embedded_model_and_no_other(name) -> None:
    plan = Plan(plan_of(name), name)
    assert plan.problems(describe("tiny")) == []
    assert plan.steps(describe("tiny")) == STEPS[name]
    told = plan.problems(describe("wan2.1-1.3b"))
    assert any(p.technique == "student_checkpoint" and p.severity == "error" for p in told)


def test_turbo_is_what_its_student_asks_for_with_a_dense_first_step() -> None:
    wanted = {t.card.name: t for t in plan_of("4-step-sparse")}
    wanted["vsa"] = dataclasses.replace(wanted["vsa"], dense_steps=1)
    preset = {t.card.name: t for t in Plan.load("turbo").techniques}
    assert {name: preset[name] for name in wanted} == wanted


@pytest.mark.parametrize(("name", "parts"), [("4-step", ["pcm", "dmd2"]), ("4-step-sparse", ["tdm", "pcm"])])
def test_a_merged_student_says_what_it_is_made_of(name: str, parts: list[str]) -> None:
    said = Artifact.of(shipped_students()[name])
    assert said is not None
    assert said.recipe == "merge"
    assert [r["recipe"] for r in said.settings["recipes"]] == parts


def test_one_step_makes_a_clip_and_the_teacher_comes_back() -> None:
    pipeline = vivace.load("tiny")
    before = pipeline.transformer.blocks[0].attn1.to_q.weight.clone()
    with vivace.accelerate(pipeline, Plan(plan_of("1-step"), "1-step")) as fast:
        out = fast("a red sphere", seed=1, num_frames=9, height=64, width=64)
    assert out.receipt.nfe == 1
    assert torch.as_tensor(out.frames).float().std() > 0
    assert torch.equal(pipeline.transformer.blocks[0].attn1.to_q.weight, before)
