"""MeanFlow and composed maps, against the exact map of a Gaussian teacher."""

from __future__ import annotations

import pytest
import torch
from gaussian import Gaussian, Off, numbers, size, times, train, untouched, wide

from vivace.core.errors import ConfigError
from vivace.training.losses import flow_map
from vivace.training.losses.paths import flow_matching_loss, interpolate

DATA, OTHER = Gaussian(), Gaussian(mean=0.1, deviation=0.9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def three_times(count):
    """r <= middle <= s."""
    return times(3 * count, 0.02, 0.98).view(3, count).sort(0).values


def test_mean_flow_at_equal_times_is_flow_matching():
    s, clean, noise = times(32), DATA.clean(32), torch.randn(32, 4)
    weight = torch.rand(32, 1)
    x, velocity = flow_map.instantaneous_velocity(clean, noise, s)
    torch.testing.assert_close(x, interpolate(clean, noise, s))
    grads, losses = [], []
    for mean in (True, False):
        student = Off(DATA.map, 0.3, 0.2)
        if mean:
            loss = flow_map.mean_flow_loss(student, x, s, s, velocity, power=0.0, weight=weight)[0]
        else:
            loss = flow_matching_loss(lambda y, t, u=student: u(y, t, t), clean, noise, s, weight=weight)
        loss.backward()
        losses.append(loss.detach())
        grads.append([float(p.grad) for p in student.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_the_exact_map_has_no_loss(derivative):
    r, _, s = three_times(64)
    x = DATA.point(64, s)
    v = DATA.velocity(x, s)
    options = {"power": 0.0, "derivative": derivative, "step": 3e-3}
    best, off = Off(DATA.map), Off(DATA.map, 0.3, -0.2)
    loss, told = flow_map.mean_flow_loss(best, x, s, r, v, **options)
    loss.backward()
    assert loss.detach() < 1e-5
    assert size(best) < 3e-3
    assert not any(value.requires_grad for value in told.values())
    loss, told = flow_map.mean_flow_loss(off, x, s, r, v, **options)
    # u - (v - (s - r) du/ds) is the error and (s - r) times its derivative along the trajectory.
    expected = 0.3 - 0.2 * x + wide(s - r, x) * -0.2 * v
    torch.testing.assert_close(loss.detach(), expected.square().mean(), rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(told["error"], expected.square().mean(), rtol=5e-3, atol=1e-3)
    loss.backward()
    assert float(off.shift.grad) == pytest.approx(float(2 * expected.mean()), abs=2e-3)


def test_the_derivative_is_taken_between_the_two_times_only():
    asked = []

    def student(x, s, r):
        asked.append((s - r).min())
        return x * wide(s - r, x)

    s = torch.tensor([0.5, 1.0])
    flow_map.mean_flow_loss(student, torch.randn(2, 4), s, s, torch.randn(2, 4), derivative="difference")
    assert min(asked) >= 0


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_mean_flow_students_converge_to_the_teachers_map(power):
    student, teacher = Off(DATA.map, 0.3, 0.2), Off(DATA.velocity)

    def loss(_):
        r, _, s = three_times(32)
        clean, noise = DATA.clean(32), torch.randn(32, 4)
        x, v = flow_map.instantaneous_velocity(clean, noise, s, teacher=teacher)
        return flow_map.mean_flow_loss(student, x, s, r, v, power=power)[0]

    train(loss, student.parameters(), steps=100)
    assert untouched(teacher)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.02)


def test_adaptive_weights():
    error = torch.randn(3, 2, 4) * torch.tensor([1e-3, 1.0, 100.0]).view(3, 1, 1)
    square = error.square().mean((1, 2))
    torch.testing.assert_close(flow_map.adaptive_weight(error, 0.0), torch.ones(3, 1, 1))
    torch.testing.assert_close(flow_map.adaptive_weight(error, 1.0).flatten(), 1 / (square + 1e-3))
    half = flow_map.adaptive_weight(error.requires_grad_(), 0.5, c=0.1)
    torch.testing.assert_close(half.flatten(), (square + 0.1) ** -0.5)
    assert not half.requires_grad
    r, _, s = three_times(3)
    output = torch.randn(3, 4, requires_grad=True)
    loss, _ = flow_map.mean_flow_loss(lambda x, s, r: output + 0.0 * x, output.detach(), s, r, 0 * output)
    loss.backward()  # the target is 0
    square = output.detach().square().mean(1, keepdim=True)
    torch.testing.assert_close(output.grad, 2 * output.detach() / (square + 1e-3) / 12)


def test_velocities_of_data_and_teacher_mix():
    s, clean, noise = times(4), DATA.clean(4), torch.randn(4, 4)
    x, pair = flow_map.instantaneous_velocity(clean, noise, s, teacher=DATA.velocity, share=0.0)
    torch.testing.assert_close(pair, noise - clean)
    whole = flow_map.instantaneous_velocity(clean, noise, s, teacher=DATA.velocity)[1]
    torch.testing.assert_close(whole, DATA.velocity(x, s))
    part = flow_map.instantaneous_velocity(clean, noise, s, teacher=DATA.velocity, share=0.25)[1]
    torch.testing.assert_close(part, 0.75 * pair + 0.25 * whole)
    with pytest.raises(ConfigError, match="0 to 1"):
        flow_map.instantaneous_velocity(clean, noise, s, share=1.5)


def test_exact_maps_compose():
    r, middle, s = three_times(64)
    x = DATA.point(64, s)
    torch.testing.assert_close(
        flow_map.composed_map(DATA.map, x, s, middle, r), DATA.map(x, s, r), rtol=1e-4, atol=1e-4
    )
    equal = flow_map.composed_map(DATA.map, x, s, s, s)
    torch.testing.assert_close(equal, DATA.velocity(x, s))
    short = flow_map.composed_map(DATA.map, x, s, s - 1e-3, 0 * s, velocity=DATA.velocity(x, s))
    torch.testing.assert_close(short, DATA.map(x, s, 0 * s), rtol=1e-3, atol=1e-3)


def test_only_the_tie_to_the_teacher_tells_a_wrong_map():
    r, middle, s = three_times(64)
    x = DATA.point(64, s)
    average = Off(OTHER.map)
    student = Off(OTHER.map)
    wrong = flow_map.composition_loss(student, average, x, s, middle, r)
    wrong.backward()
    assert wrong.detach() < 1e-9
    assert size(student) < 1e-4
    assert untouched(average)
    loss, parts = flow_map.any_step_loss(student, average, DATA.velocity, x, s, middle, r, boundary=2.0)
    assert parts["boundary"] > 0.01
    torch.testing.assert_close(loss.detach(), parts["composition"] + 2 * parts["boundary"])
    gap = (OTHER.velocity(x, s) - DATA.velocity(x, s)).square()
    torch.testing.assert_close(parts["boundary"], gap.mean())
    mask = torch.zeros(1, 4)
    mask[:, 1] = 1.0
    tied = flow_map.any_step_loss(student, average, DATA.velocity, x, s, middle, r, weight=mask)[1]
    torch.testing.assert_close(tied["boundary"], gap[:, 1].mean())


class FarOff(Off):
    """Right at equal times, so that only composition can mend the rest."""

    def forward(self, x, s, r):
        return self.truth(x, s, r) + wide(s - r, x) * (self.shift + self.scale * x)


@pytest.mark.parametrize("kind", [Off, FarOff])
def test_any_step_students_converge(kind):
    student, average, teacher = kind(DATA.map, 0.4, 0.3), kind(DATA.map, 0.4, 0.3), Off(DATA.velocity)

    def loss(_):
        average.load_state_dict(student.state_dict())
        r, middle, s = three_times(32)
        return flow_map.any_step_loss(student, average, teacher, DATA.point(32, s), s, middle, r)[0]

    train(loss, student.parameters(), steps=200)
    assert untouched(average, teacher)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.02)
