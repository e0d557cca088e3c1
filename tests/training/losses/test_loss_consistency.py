"""LCM, PCM and DCM against a Gaussian teacher, whose trajectories are known."""

from __future__ import annotations

import pytest
import torch
from gaussian import Affine, Gaussian, Off, numbers, size, times, train, untouched, wide
from torch import nn

from vivace.core.errors import ConfigError
from vivace.training.losses import consistency

DATA = Gaussian()
EDGES = torch.tensor([0.0, 0.3, 0.7, 1.0])
VIDEO = (2, 3, 2, 2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def to_zero(x, s):
    return DATA.map(x, s, torch.zeros_like(s))


def to_phase(x, s):
    return DATA.map(x, s, consistency.phase_end(s, EDGES))


def exact_step(r):
    """A teacher whose Euler step from s to r is the exact solution."""
    return lambda x, s: DATA.map(x, s, r)


class Judge(nn.Module):
    """The logit is the mean of a hidden state that is linear in the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x, s):
        hidden = torch.einsum("bcthw,cd->bdthw", x, self.weight)
        return hidden.flatten(1).mean(1), [hidden, 10 * hidden]


def test_any_network_is_the_identity_at_the_end_of_its_phase():
    x, s = torch.randn(3, 4), torch.tensor([0.3, 0.7, 0.0])
    for network in (DATA.velocity, Affine(3.0, -2.0)):
        assert torch.equal(consistency.consistency_function(network, x, s, s), x)
        assert torch.equal(consistency.consistency_function(network, x[:1] * 0 + 1, s[2:]), torch.ones(1, 4))


def test_the_exact_student_has_no_loss_but_that_of_the_teachers_step():
    s = times(256, 0.3)
    x = DATA.point(256, s)
    losses = []
    for h in (0.2, 0.1, 0.05):
        r = s - h
        exact = consistency.consistency_loss(to_zero, to_zero, exact_step(r), x, s, r, huber=0.0)
        assert exact < 1e-12
        losses.append(
            float(consistency.consistency_loss(to_zero, to_zero, DATA.velocity, x, s, r, huber=0.0))
        )
    # One Euler step errs by h^2, so the loss by h^4.
    assert 10 < losses[0] / losses[1] < 22
    assert 10 < losses[1] / losses[2] < 22
    off = Off(to_zero, shift=0.1)
    assert consistency.consistency_loss(off, to_zero, exact_step(r), x, s, r, huber=0.0) > 1e-4


def test_the_gradient_moves_towards_the_target():
    s = times(64, 0.3)
    r, x = 0.5 * s, DATA.point(64, s)
    for shift in (0.2, -0.2):
        student = Off(to_zero, shift=shift)
        consistency.consistency_loss(student, to_zero, exact_step(r), x, s, r).backward()
        assert float(student.shift.grad) * shift > 0
    at_best = Off(to_zero)
    consistency.consistency_loss(at_best, to_zero, exact_step(r), x, s, r, huber=0.0).backward()
    assert size(at_best) < 1e-6


@pytest.mark.parametrize("kind", ["lcm", "pcm", "semantic", "detail"])
def test_students_converge_and_nothing_else_is_taught(kind):
    shape = VIDEO if kind in ("semantic", "detail") else (4,)
    truth = to_phase if kind == "pcm" else to_zero
    student, average, judge = Off(truth, 0.3, 0.2), Off(truth, 0.3, 0.2), Judge().requires_grad_(False)

    def lower(s):
        return torch.maximum(s - 0.15, consistency.phase_end(s, EDGES)) if kind == "pcm" else s - 0.15

    teacher = Off(lambda x, s: DATA.map(x, s, lower(s)))

    def loss(_):
        average.load_state_dict(student.state_dict())
        s = times(32, 0.2)
        r, x = s - 0.15, DATA.point(32, s, shape)
        if kind == "lcm":
            return consistency.consistency_loss(student, average, teacher, x, s, r)
        if kind == "pcm":
            return consistency.phased_consistency_loss(student, average, teacher, x, s, r, EDGES)
        if kind == "semantic":
            return consistency.semantic_expert_loss(student, average, teacher, x, s, r)[0]
        noise = torch.randn_like(x)
        return consistency.detail_expert_loss(
            student, average, teacher, judge, x, s, r, s, noise, adversarial=0.0
        )[0]

    train(loss, student.parameters(), steps=200)
    assert untouched(average, teacher, judge)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.03)


def test_phases_end_at_their_edges_and_the_teacher_does_not_step_beyond():
    s = torch.tensor([1.0, 0.71, 0.7, 0.2, 0.0])
    torch.testing.assert_close(consistency.phase_end(s, EDGES), torch.tensor([0.7, 0.7, 0.3, 0.0, 0.0]))
    s, r = torch.full((16,), 0.75), torch.full((16,), 0.4)
    x = DATA.point(16, s)
    edge = torch.full((16,), 0.7)
    args = (to_phase, to_phase, exact_step(edge), x, s, r, EDGES)
    assert consistency.phased_consistency_loss(*args, huber=0.0) < 1e-12
    with pytest.raises(ConfigError, match="ascend"):
        consistency.phase_end(s, torch.tensor([0.0, 0.9]))


def test_experts_share_the_times():
    got = consistency.is_semantic(torch.tensor([1.0, 0.91, 0.9, 0.1]), 0.9)
    assert got.tolist() == [True, True, False, False]


def test_coherence_sees_motion_only():
    s = times(8, 0.4)
    r, x = 0.5 * s, DATA.point(8, s, VIDEO)
    teacher = exact_step(r)
    _, best = consistency.semantic_expert_loss(to_zero, to_zero, teacher, x, s, r)
    assert best["consistency"] < 1e-6
    assert best["coherence"] < 1e-10
    loss, offset = consistency.semantic_expert_loss(Off(to_zero, 0.3), to_zero, teacher, x, s, r)
    assert offset["consistency"] > 0.05
    assert offset["coherence"] < 1e-10
    assert loss.requires_grad
    assert not offset["consistency"].requires_grad

    def drift(y, t):
        return to_zero(y, t) + 0.3 * torch.arange(3.0).view(1, 1, 3, 1, 1)

    for stride in (1, 2):
        _, moving = consistency.semantic_expert_loss(drift, to_zero, teacher, x, s, r, stride=stride)
        expected = (0.3 * stride * s).square().mean()
        torch.testing.assert_close(moving["coherence"], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="longer clip"):
        consistency.semantic_expert_loss(to_zero, to_zero, teacher, x, s, r, stride=3)


def test_the_detail_expert_is_judged_on_both_noised_ends():
    s, judge = times(8, 0.4), Judge()
    r, at = 0.5 * s, 0.8 * s
    x, noise = DATA.point(8, s, VIDEO), torch.randn(8, *VIDEO)
    student = Off(to_zero, shift=0.3)
    loss, fake, real, parts = consistency.detail_expert_loss(
        student, to_zero, exact_step(r), judge, x, s, r, at, noise, adversarial=0.5, features=0.25
    )
    total = parts["consistency"] + 0.5 * parts["adversarial"] + 0.25 * parts["features"]
    torch.testing.assert_close(loss.detach(), total)
    # Ends differ by 0.3 s before they are noised alike.
    torch.testing.assert_close(real - fake, (wide((1 - at) * 0.3 * s, x)).expand_as(x))
    hidden = [judge(fake, at)[1][0].detach(), judge(real, at)[1][0].detach()]
    gap = (hidden[0] - hidden[1]).square().mean()
    torch.testing.assert_close(parts["features"], 0.5 * (gap + 100 * gap))
    torch.testing.assert_close(parts["adversarial"], -judge(fake, at)[0].detach().mean())
    loss.backward()
    assert float(student.shift.grad) != 0
    assert judge.weight.grad is not None
    assert not fake.requires_grad
    assert not real.requires_grad

    judge.zero_grad()
    student.zero_grad()
    before = consistency.detail_discriminator_loss(judge, fake, real, at)
    before.backward()
    assert untouched(student)
    with torch.no_grad():
        judge.weight -= 0.1 * judge.weight.grad
    assert consistency.detail_discriminator_loss(judge, fake, real, at) < before


def test_the_average_is_the_student_itself_without_gradient():
    s = times(16, 0.4)
    r, x = 0.5 * s, DATA.point(16, s)
    student, frozen = Off(to_zero, 0.2, 0.1), Off(to_zero, 0.2, 0.1)
    consistency.consistency_loss(student, student, exact_step(r), x, s, r).backward()
    mine = [float(p.grad) for p in student.parameters()]
    student.zero_grad()
    consistency.consistency_loss(student, frozen, exact_step(r), x, s, r).backward()
    assert mine == pytest.approx([float(p.grad) for p in student.parameters()])
    assert untouched(frozen)
