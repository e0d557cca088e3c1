"""What the recipes do beyond their objectives: where they draw times, what they weigh, and that they learn at all."""

from __future__ import annotations

import math

import pytest
import torch
from distilling import HERE, distil, samples, team_of

from vivace.core.errors import ConfigError
from vivace.training.chance import Chance
from vivace.training.distillation.recipe import Turn
from vivace.training.distillation.recipes import RECIPES, find
from vivace.training.distillation.trainer import DistillationTrainer

NEW = ("dcm", "rewarded", "phased_dmd")


def turn_of(name: str, update: int = 1, clean: torch.Tensor | None = None) -> Turn:
    batch = samples().rows(range(4))
    if clean is not None:
        batch = batch | {"latents": clean}
    team = team_of(find(name).roles)
    return Turn(team, batch, Chance(torch.device("cpu"), 0, update, "student"), update, 0.5)


@pytest.mark.parametrize("name", NEW)
def test_the_student_learns_and_the_teacher_does_not(name) -> None:
    recipe = RECIPES[name](steps=2)
    for update in range(1, 7):  # both experts of `dcm` have a turn
        turn = turn_of(name, update)
        loss, _ = recipe.student(turn)
        loss.backward()
        moved = [p.grad for p in turn.team.student.module.parameters() if p.grad is not None]
        assert sum(float(g.abs().sum()) for g in moved) > 0
        assert all(p.grad is None for p in turn.team.teacher.module.parameters())
        assert all(math.isfinite(float(g.abs().max())) for g in moved)


@pytest.mark.parametrize("name", NEW)
def test_the_critic_learns_from_the_students_clips(name) -> None:
    recipe = RECIPES[name](steps=2)
    turn = turn_of(name)
    loss, _ = recipe.critic(turn)
    loss.backward()
    assert (
        sum(float(p.grad.abs().sum()) for p in turn.team.critic.module.parameters() if p.grad is not None) > 0
    )
    assert all(p.grad is None or not p.grad.any() for p in turn.team.student.module.parameters())
    if turn.team.head is not None:
        assert all(p.grad is not None for p in turn.team.head.parameters())


@pytest.mark.parametrize("name", NEW)
def test_every_role_has_its_turns(name) -> None:
    recipe = RECIPES[name](steps=2)
    trainer = DistillationTrainer(HERE, team_of(recipe.roles), recipe, samples(), batch=2)
    before = {r: [p.clone() for m in ms for p in m.parameters()] for r, ms in trainer.learners.items()}
    for update in range(1, 5):
        trainer.update(update, 0.1)
    for role, modules in trainer.learners.items():
        now = [p for m in modules for p in m.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before[role], now, strict=True)), role


@pytest.mark.parametrize("semantic", [True, False])
def test_the_two_experts_of_dcm_learn_on_their_side_of_the_boundary(semantic) -> None:
    recipe, turn = RECIPES["dcm"](steps=4, boundary=0.6), turn_of("dcm")
    for update in range(1, 9):
        turn = turn._replace(chance=Chance(torch.device("cpu"), 0, update, "student"))
        s, r, end = recipe._points(turn, semantic=semantic)
        assert bool((s > 0.6).all()) == semantic
        assert ((r < s) & (end < s)).all()


def test_a_boundary_outside_of_all_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="move the boundary"):
        RECIPES["dcm"](steps=4, boundary=1.0)._points(turn_of("dcm"), semantic=True)


def test_lively_clips_weigh_more_until_they_are_as_lively_as_real_ones() -> None:
    clean = torch.randn(4, 8, 3, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    turn, recipe = turn_of("rewarded", clean=clean), RECIPES["rewarded"](beta=0.5)
    mean = clean.float().mean(2, keepdim=True)
    shares = torch.tensor([0.0, 0.5, 1.0, 3.0]).view(4, 1, 1, 1, 1)
    weights = recipe.scale(turn, mean + shares * (clean.float() - mean))
    reward = torch.tensor([0.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(weights, ((reward - reward.mean()) / 0.5).exp(), rtol=0.02, atol=0.01)
    with pytest.raises(ConfigError, match="no motion to reward"):
        recipe.scale(turn, clean[:, :, :1].float())


def test_phased_matching_differs_from_trajectory_matching_in_its_times_alone() -> None:
    s = torch.tensor([0.9, 0.5])
    assert torch.equal(RECIPES["tdm"]().latest(s), s)
    assert torch.equal(RECIPES["phased_dmd"]().latest(s), torch.ones(2))


@pytest.mark.parametrize("name", NEW)
def test_a_run_writes_a_student(name, small, tmp_path) -> None:
    record = distil(name, small, tmp_path / "s.safetensors", steps=3, settings={"steps": 2})
    assert record["sampler"]["solver"] == RECIPES[name].solver
    assert (tmp_path / "s.safetensors").is_file()
