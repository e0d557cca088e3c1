"""Two steps in one, guidance in one call, and straightened trajectories, against a Gaussian teacher."""

from __future__ import annotations

import pytest
import torch
from gaussian import Affine, Gaussian, Off, line, numbers, size, times, train, untouched

from vivace.core.errors import ConfigError
from vivace.training.losses import paths, progressive, rectified

DATA, OTHER = Gaussian(), Gaussian(mean=-0.4, deviation=0.8)
EDGES = torch.tensor([0.0, 0.25, 0.6, 1.0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_one_step_lands_where_two_of_the_teacher_land():
    s, r = torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.5, 0.2, 0.0])
    x = DATA.point(3, s)
    for middle in (None, 0.3 * r + 0.7 * s):
        between = 0.5 * (s + r) if middle is None else middle
        once = paths.euler_step(x, DATA.velocity(x, s), s, between)
        twice = paths.euler_step(once, DATA.velocity(once, between), between, r)
        target = progressive.progressive_target(DATA.velocity, x, s, r, middle=middle)
        torch.testing.assert_close(paths.euler_step(x, target, s, r), twice)
    many = progressive.progressive_target(DATA.velocity, x, s, r, steps=400)
    torch.testing.assert_close(many, DATA.map(x, s, r), atol=5e-3, rtol=5e-3)
    with pytest.raises(ConfigError, match="two teacher steps"):
        progressive.progressive_target(DATA.velocity, x, s, r, middle=r, steps=4)


def test_a_student_learns_two_steps_in_one():
    s, r = torch.full((64,), 0.8), torch.full((64,), 0.4)
    student, teacher = Affine(), Off(DATA.velocity)

    def loss(_):
        return progressive.progressive_loss(student, teacher, DATA.point(64, s), s, r)

    assert loss(0) > 0.1
    assert train(loss, student.parameters(), steps=400) < 1e-5
    assert untouched(teacher)
    best = line(lambda x: progressive.progressive_target(DATA.velocity, x, s[:1], r[:1]))
    assert numbers(student) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("huber", [0.0, 0.01])
def test_a_student_without_guidance_learns_the_guided_velocity(huber):
    s = torch.full((64,), 0.6)
    student, cond, uncond = Affine(), Off(DATA.velocity), Off(OTHER.velocity)

    def loss(_):
        return progressive.guidance_distillation_loss(
            student, cond, uncond, DATA.point(64, s), s, 4.0, huber=huber
        )

    train(loss, student.parameters(), steps=600, rate=0.2)
    assert untouched(cond, uncond)
    best = line(lambda x: 4 * DATA.velocity(x, s[:1]) - 3 * OTHER.velocity(x, s[:1]))
    assert numbers(student) == pytest.approx(best, abs=5e-3)


def test_guidance_scales_of_samples_and_the_sign_of_the_gradient():
    s, scale = times(8), torch.linspace(1, 8, 8)
    right = paths.guided_velocity(DATA.velocity, OTHER.velocity, scale)
    x = DATA.point(8, s)
    for shift in (0.0, 0.5, -0.5):
        student = Off(right, shift=shift)
        loss = progressive.guidance_distillation_loss(student, DATA.velocity, OTHER.velocity, x, s, scale)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(shift**2, abs=1e-6)
        assert float(student.shift.grad) == pytest.approx(2 * shift, abs=1e-4)


def test_a_mask_says_where_the_student_is_taught():
    s, r = times(5, 0.5), torch.full((5,), 0.2)
    x, mask = DATA.point(5, s, (2, 3)), torch.zeros(5, 1, 3)
    mask[:, :, 1] = 1.0
    output = torch.zeros(5, 2, 3, requires_grad=True)
    progressive.progressive_loss(lambda *_: output, DATA.velocity, x, s, r, weight=mask).backward()
    assert bool((output.grad[:, :, 1] != 0).all())
    assert not output.grad[:, :, [0, 2]].any()
    target = progressive.progressive_target(DATA.velocity, x, s, r)
    torch.testing.assert_close(output.grad[:, :, 1], -2 * target[:, :, 1] / 10)


def test_reflow_straightens():
    noise = torch.randn(64, 4)
    teacher = Off(DATA.velocity)
    clean, same = rectified.reflow_pair(teacher, noise, paths.shifted_times(64))
    assert not clean.requires_grad
    assert torch.equal(same, noise)
    exact = DATA.solution(noise, torch.ones(64), torch.zeros(64))
    torch.testing.assert_close(clean, exact, atol=0.05, rtol=0.05)
    student, s = Affine(), torch.full((64,), 0.3)
    train(lambda _: rectified.reflow_loss(student, exact, noise, s), student.parameters(), steps=600)
    # x_s = (1 - s)(m + c n) + s n, so n is a function of x_s, and so is n - x_0.
    per_noise = 0.7 * DATA.deviation + 0.3
    slope = (1 - DATA.deviation) / per_noise
    assert numbers(student) == pytest.approx([-DATA.mean - slope * 0.7 * DATA.mean, slope], abs=2e-3)

    def straight(x, t):
        return x - DATA.solution(x, torch.ones(64), torch.zeros(64))

    assert float(rectified.one_step_loss(straight, exact, noise)) < 1e-12
    off = Off(straight, shift=0.2)
    rectified.one_step_loss(off, exact, noise).backward()
    assert float(off.shift.grad) == pytest.approx(0.4, abs=1e-4)


def test_times_are_in_the_window_below_their_edge():
    upper, lower = rectified.window_of(torch.tensor([1.0, 0.61, 0.6, 0.25, 0.1, 0.0]), EDGES)
    torch.testing.assert_close(upper, torch.tensor([1.0, 1.0, 0.6, 0.25, 0.25, 0.25]))
    torch.testing.assert_close(lower, torch.tensor([0.6, 0.6, 0.25, 0.0, 0.0, 0.0]))
    for wrong in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0]):
        with pytest.raises(ConfigError, match="ascend from 0 to 1"):
            rectified.window_of(torch.ones(1), torch.tensor(wrong))


def test_perflow_learns_the_chord_of_every_window():
    s, clean, noise = times(32), DATA.clean(32), torch.randn(32, 4)
    top, bottom = rectified.window_of(s, EDGES)
    start = paths.interpolate(clean, noise, top)
    x, velocity = rectified.window_line(DATA.velocity, clean, noise, s, EDGES, steps=300)
    torch.testing.assert_close(velocity, DATA.map(start, top, bottom), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(x, paths.euler_step(start, velocity, top, s))
    student, teacher, s = Affine(), Off(DATA.velocity), torch.full((32,), 0.4)

    def loss(_):
        clean, noise = DATA.clean(32), torch.randn(32, 4)
        return rectified.perflow_loss(student, teacher, clean, noise, s, EDGES, steps=4)

    train(loss, student.parameters(), steps=400)
    assert untouched(teacher)
    # Along the chord from x_0.6, x and velocity are both affine in the start: two of its points give the line.
    ends = [
        rectified.window_line(
            DATA.velocity, torch.full((1, 4), c), torch.full((1, 4), c), s[:1], EDGES, steps=4
        )
        for c in (0.0, 1.0)
    ]
    slope = float((ends[1][1] - ends[0][1])[0, 0] / (ends[1][0] - ends[0][0])[0, 0])
    best = [float(ends[0][1][0, 0] - slope * ends[0][0][0, 0]), slope]
    assert numbers(student) == pytest.approx(best, abs=5e-3)
    assert size(student) < 1e-2
