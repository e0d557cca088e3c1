"""Points, steps and times of straight paths, against formulas and diffusers' own samplers."""

from __future__ import annotations

import pytest
import torch
from gaussian import Affine, Gaussian, Off, line, numbers, times, train

from vivace.core.errors import ConfigError
from vivace.training.losses import paths

DATA = Gaussian()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_closed_forms_of_these_tests_agree_with_one_another():
    s = times(6).double()
    x = DATA.point(6, s)
    # velocity from score: v = (-s score - x) / (1 - s)
    by_score = (-s[:, None] * DATA.score(x, s) - x) / (1 - s[:, None])
    torch.testing.assert_close(DATA.velocity(x, s), by_score)
    step = 1e-6
    moved = (DATA.solution(x, s, s + step) - DATA.solution(x, s, s - step)) / (2 * step)
    torch.testing.assert_close(DATA.velocity(x, s), moved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(DATA.map(x, s, s), DATA.velocity(x, s))


def test_estimates_invert_the_path():
    clean, noise, s = torch.randn(3, 2, 4), torch.randn(3, 2, 4), times(3)
    x, v = paths.interpolate(clean, noise, s), noise - clean
    torch.testing.assert_close(paths.clean_from_velocity(x, v, s), clean)
    torch.testing.assert_close(paths.noise_from_velocity(x, v, s), noise)
    torch.testing.assert_close(paths.velocity_from_clean(x, clean, s), v)
    r = 0.5 * s
    torch.testing.assert_close(paths.euler_step(x, v, s, r), paths.interpolate(clean, noise, r))


def test_renoising_gives_the_marginal_of_the_later_time():
    s, t = torch.full((40000,), 0.3), torch.full((40000,), 0.6)
    x = paths.renoise(DATA.point(40000, s, (1,)), s, t, torch.randn(40000, 1))
    assert float(x.mean()) == pytest.approx(0.4 * DATA.mean, abs=0.01)
    assert float(x.var()) == pytest.approx(DATA.variance(0.6), rel=0.03)
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    zero, late = torch.zeros(2), torch.tensor([0.4, 1.0])
    torch.testing.assert_close(paths.renoise(clean, zero, late, noise), paths.interpolate(clean, noise, late))
    torch.testing.assert_close(paths.renoise(clean, late, late, noise)[0], clean[0])
    assert torch.isfinite(paths.renoise(clean, late, torch.ones(2), noise)).all()


def test_guidance_and_its_scales():
    cond, uncond = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(paths.guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(paths.guided(cond, uncond, 0.0), uncond)
    both = paths.guided(cond, uncond, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(both[0], cond[0])
    torch.testing.assert_close(both[1], 3 * cond[1] - 2 * uncond[1])
    velocity = paths.guided_velocity(lambda x, s: cond, lambda x, s: uncond, 3.0)
    torch.testing.assert_close(velocity(cond, torch.ones(2))[1], both[1])


@pytest.mark.parametrize(("steps", "shift"), [(4, 3.0), (7, 1.0), (10, 8.0)])
def test_times_are_those_of_the_samplers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    unipc.set_timesteps(steps)
    torch.testing.assert_close(paths.shifted_times(steps, shift, last=1e-3), unipc.sigmas, atol=2e-6, rtol=0)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = paths.shifted_times(steps, shift)
    euler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())
    torch.testing.assert_close(ours, euler.sigmas, atol=1e-6, rtol=1e-6)
    assert ours[0] == 1
    assert ours[-1] == 0
    assert bool((ours.diff() < 0).all())


def test_no_steps_and_no_shift_are_refused():
    for steps, shift in ((0, 1.0), (4, 0.0)):
        with pytest.raises(ConfigError, match="1 step or more"):
            paths.shifted_times(steps, shift)


def test_the_solver_approaches_the_exact_map():
    noise = torch.randn(64, 4)
    exact = DATA.solution(noise, torch.ones(64), torch.zeros(64))
    errors = [
        float((paths.solve(DATA.velocity, noise, paths.shifted_times(k)) - exact).abs().mean())
        for k in (8, 16, 32)
    ]
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2] > 0
    each = torch.stack([torch.linspace(1, 0.5, 33), torch.linspace(0.5, 0.0, 33)], 1)
    ends = paths.solve(DATA.velocity, noise[:2], each)
    exact = DATA.solution(noise[:2], each[0], each[-1])
    torch.testing.assert_close(ends, exact, atol=0.02, rtol=0.02)


def test_pseudo_huber_is_square_then_absolute():
    d = torch.tensor([1e-4, -1e-4, 10.0, -10.0, 0.0])
    h = paths.pseudo_huber(d, 0.01)
    torch.testing.assert_close(h[:2], d[:2].square() / 0.02, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(h[2:4], d[2:4].abs() - 0.01, rtol=1e-3, atol=1e-3)
    assert h[4] == 0


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (1, 2, 1, 1), (3, 1, 5, 1), (5, 4), (1,)])
def test_weights_broadcast_and_keep_the_size(shape):
    values, weight = torch.rand(3, 2, 5, 4), torch.rand(shape) + 0.1
    full = weight.expand_as(values)
    torch.testing.assert_close(paths.weighted_mean(values, weight), (full * values).sum() / full.sum())
    torch.testing.assert_close(paths.weighted_mean(values, 7.0 * weight), paths.weighted_mean(values, weight))
    assert paths.weighted_mean(values, torch.zeros(shape)) == 0


def test_differences_of_half_precision_are_taken_in_float32():
    a, b = torch.full((4,), 1.0, dtype=torch.bfloat16), torch.full((4,), 1.0078125, dtype=torch.bfloat16)
    assert paths.distance(a, b).dtype == torch.float32
    torch.testing.assert_close(paths.distance(a, b), torch.full((4,), 0.0078125**2))


def test_flow_matching_finds_the_velocity_of_the_distribution():
    s = torch.full((512,), 0.4)
    student = Affine()
    train(
        lambda k: paths.flow_matching_loss(student, DATA.clean(512), torch.randn(512, 4), s),
        student.parameters(),
    )
    assert numbers(student) == pytest.approx(line(lambda x: DATA.velocity(x, s[:1])), abs=0.05)


def test_flow_matching_gradient_has_the_sign_of_the_error():
    student = Off(DATA.velocity, shift=0.3)
    paths.flow_matching_loss(student, DATA.clean(4096), torch.randn(4096, 4), times(4096)).backward()
    assert float(student.shift.grad) == pytest.approx(0.6, abs=0.1)
