"""Derivatives along trajectories, sCM and rCM, against closed forms."""

from __future__ import annotations

import pytest
import torch
from gaussian import Gaussian, Off, numbers, size, times, train, untouched, wide

from vivace.core.errors import ConfigError
from vivace.training.losses import continuous
from vivace.training.losses.derivative import derivative_gap, total_derivative

DATA = Gaussian()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def to_zero(x, s):
    return DATA.map(x, s, torch.zeros_like(s))


def test_the_derivative_along_a_trajectory():
    s = torch.tensor([0.2, 0.5, 0.9])
    x = DATA.point(3, s)
    v = DATA.velocity(x, s)
    # s u = x - x_0 on the trajectory, so that u + s du/ds = v.
    exact = (v - to_zero(x, s)) / wide(s, x)
    torch.testing.assert_close(total_derivative(to_zero, x, s, v), exact, rtol=1e-4, atol=1e-5)
    near = total_derivative(to_zero, x, s, v, derivative="difference", step=1e-2)
    torch.testing.assert_close(near, exact, rtol=1e-2, atol=1e-2)


def test_differences_stay_within_the_range_of_times():
    asked = []

    def f(x, s):
        asked.append(s.clone())
        return x.square() + wide(s, x) ** 2

    x, s, low = torch.randn(3, 4), torch.tensor([0.0, 1.0, 0.3]), torch.tensor([0.0, 0.0, 0.3])
    got = total_derivative(f, x, s, torch.ones_like(x), derivative="difference", step=1e-3, low=low)
    torch.testing.assert_close(got, 2 * x + 2 * wide(s, x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.stack(asked), torch.tensor([[1e-3, 1.0, 0.301], [0.0, 0.999, 0.3]]))
    one = torch.ones(3)
    alone = total_derivative(f, x, one, torch.ones_like(x), derivative="difference", low=one)
    assert not alone.any()  # r = s = 1: nothing to differ by, and the caller multiplies by 0


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@torch.library.custom_op("vivace_test_losses::silent", mutates_args=())
def silent(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


silent.register_autograd(lambda ctx, g: 2 * g)


def test_missing_forward_modes_are_told():
    x, s = torch.randn(3, 4), times(3)
    with pytest.raises(ConfigError, match="derivative='difference'"):
        total_derivative(lambda x, s: NoForward.apply(x), x, s, x)
    with pytest.raises(ConfigError, match="'jvp' or by 'difference'"):
        total_derivative(to_zero, x, s, x, derivative="reverse")
    with pytest.raises(RuntimeError, match="shapes"):  # other errors are not ours to explain
        total_derivative(lambda x, s: x @ x, x, s, x)
    assert derivative_gap(to_zero, x, s, x) < 0.02
    assert derivative_gap(lambda x, s: silent(x), x, s, x) > 0.9
    by_difference = total_derivative(lambda x, s: silent(x), x, s, x, derivative="difference", step=1e-2)
    torch.testing.assert_close(by_difference, 2 * x, rtol=1e-3, atol=1e-3)


def test_the_tangent_is_zero_at_the_optimum_and_known_beside_it():
    s = times(16)
    x = DATA.point(16, s)
    v = DATA.velocity(x, s)
    assert continuous.consistency_tangent(to_zero, v, x, s).abs().max() < 1e-4
    off = Off(to_zero, 0.3, 0.2)
    expected = -(0.3 + 0.2 * x) - wide(s, x) * 0.2 * v
    got = continuous.consistency_tangent(off, v, x, s)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    half = continuous.consistency_tangent(off, v, x, s, warmup=0.5)
    none = continuous.consistency_tangent(off, v, x, s, warmup=0.0)
    torch.testing.assert_close(none, v - off(x, s).detach())
    torch.testing.assert_close(half, 0.5 * (got + none), rtol=1e-3, atol=1e-4)


def test_normalisation_and_warm_up():
    g = torch.randn(3, 2, 5) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    n = continuous.normalised(g, 0.1)
    sizes = n.square().mean((1, 2)).sqrt()
    rms = g.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(sizes, rms / (rms + 0.1))
    assert [continuous.warm_up(k, 10) for k in (0, 5, 10, 20)] == [0.0, 0.5, 1.0, 1.0]
    assert continuous.warm_up(0, 0) == 1.0


def test_the_gradient_is_minus_twice_the_tangent():
    s = times(16)
    x = DATA.point(16, s)
    student, teacher = Off(to_zero, 0.3, 0.2), Off(DATA.velocity)
    loss, told = continuous.continuous_consistency_loss(student, teacher, x, s, normalise=None)
    loss.backward()
    tangent = continuous.consistency_tangent(student, DATA.velocity(x, s), x, s)
    assert float(student.shift.grad) == pytest.approx(float(-2 * tangent.mean()), rel=1e-4)
    assert float(student.scale.grad) == pytest.approx(float(-2 * (tangent * x).mean()), rel=1e-4)
    torch.testing.assert_close(loss.detach(), tangent.square().mean())
    torch.testing.assert_close(told["tangent"], tangent.square().mean().sqrt())
    assert untouched(teacher)
    assert not any(v.requires_grad for v in told.values())

    best = Off(to_zero)
    loss, _ = continuous.continuous_consistency_loss(best, DATA.velocity, x, s, normalise=None)
    loss.backward()
    assert size(best) < 1e-4
    assert float(loss.detach()) < 1e-8


@pytest.mark.parametrize(("derivative", "normalise"), [("jvp", 0.1), ("difference", None)])
def test_students_converge(derivative, normalise):
    student = Off(to_zero, 0.3, 0.2)

    def loss(k):
        s = times(32)
        return continuous.continuous_consistency_loss(
            student,
            DATA.velocity,
            DATA.point(32, s),
            s,
            warmup=continuous.warm_up(k, 20),
            normalise=normalise,
            derivative=derivative,
            step=1e-2,
        )[0]

    train(loss, student.parameters(), steps=100)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.02)


def test_a_weight_chooses_positions():
    s, mask = times(4), torch.zeros(1, 4)
    mask[:, 2] = 1.0
    output = torch.zeros(4, 4, requires_grad=True)

    def student(x, s):
        return output + 0.0 * x

    x = DATA.point(4, s)
    continuous.continuous_consistency_loss(student, DATA.velocity, x, s, normalise=None, weight=mask)[
        0
    ].backward()
    assert not output.grad[:, [0, 1, 3]].any()
    torch.testing.assert_close(output.grad[:, 2], -2 * DATA.velocity(x, s)[:, 2] / 4)


def rcm(student, fake, teacher=DATA.velocity, regularisation=0.01, batch=32):
    s, noise = times(batch), torch.randn(batch, 4)
    made = noise - student(noise, torch.ones(batch))
    return continuous.regularised_consistency_loss(
        student,
        teacher,
        fake,
        DATA.point(batch, s),
        s,
        made,
        times(batch),
        torch.randn(batch, 4),
        regularisation=regularisation,
    )


def test_rcm_is_the_sum_of_both():
    student, fake, teacher = Off(to_zero, 0.3, 0.2), Off(DATA.velocity, 0.1), Off(DATA.velocity)
    loss, told = rcm(student, fake, teacher, regularisation=0.5)
    torch.testing.assert_close(loss.detach(), told["consistency"] + 0.5 * told["divergence"])
    loss.backward()
    assert untouched(fake, teacher)
    with pytest.raises(ConfigError, match="not be negative"):
        rcm(student, fake, regularisation=-1.0)


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_the_divergence_of_rcm_pulls_what_is_made_to_the_teacher(shift):
    grads = []
    for regularisation in (0.0, 0.5, 1.0):
        torch.manual_seed(3)
        student, own = Off(to_zero, shift), Gaussian(DATA.mean - shift, DATA.deviation)
        rcm(student, own.velocity, regularisation=regularisation)[0].backward()
        grads.append(float(student.shift.grad))
    assert (grads[2] - grads[0]) * shift > 0
    assert grads[1] == pytest.approx(0.5 * (grads[0] + grads[2]), rel=1e-4)


def test_rcm_students_converge_with_the_score_of_their_own_clips():
    student = Off(to_zero, 0.3, 0.2)

    def loss(_):
        # In one step noise n becomes m + c n - (shift + scale n).
        shift, scale = numbers(student)
        fake = Gaussian(DATA.mean - shift, abs(DATA.deviation - scale))
        return rcm(student, fake.velocity, regularisation=1.0)[0]

    train(loss, student.parameters(), steps=100)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.03)
