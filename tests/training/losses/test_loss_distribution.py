"""Distribution matching with exact scores of teacher and student, and with a critic that is trained."""

from __future__ import annotations

import pytest
import torch
from gaussian import Affine, Gaussian, Off, line, numbers, size, times, train, untouched, wide
from torch import nn

from vivace.core.errors import ConfigError
from vivace.training.chance import Chance
from vivace.training.losses import distribution
from vivace.training.losses.paths import renoise, shifted_times

DATA, OTHER = Gaussian(), Gaussian(mean=-0.2, deviation=0.9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Line(nn.Module):
    """A generator `mean + deviation noise`."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(deviation))

    def forward(self, noise):
        return self.mean + self.deviation * noise

    def law(self) -> Gaussian:
        mean, deviation = numbers(self)
        return Gaussian(mean, max(abs(deviation), 1e-3))


def posterior(law: Gaussian, x, at, s):
    """E[x_at | x_s] from the covariance of the two, which is a q_at."""
    a = (1 - s) / (1 - at)
    return (1 - at) * law.mean + a * law.variance(at) / law.variance(s) * (x - (1 - s) * law.mean)


@pytest.mark.parametrize("at", [0.0, 0.4])
def test_the_gradient_is_that_of_the_definition(at):
    early, s, noise = torch.full((6,), at), times(6, 0.5), torch.randn(6, 4)
    point = DATA.point(6, early).requires_grad_()
    real, fake = Off(DATA.velocity), Off(OTHER.velocity)
    if at:
        loss, told = distribution.interval_matching_loss(point, early, real, fake, s, noise)
    else:
        loss, told = distribution.distribution_matching_loss(point, real, fake, s, noise)
    loss.backward()
    x, late = renoise(point.detach(), early, s, noise), wide(s, noise)
    of_real, of_fake = posterior(DATA, x, at, late), posterior(OTHER, x, at, late)
    normaliser = (point.detach() - of_real).abs().mean(1, keepdim=True)
    gradient = (of_fake - of_real) / normaliser
    torch.testing.assert_close(point.grad, gradient / 24, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(told["normaliser"], normaliser.mean(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(told["gradient"], gradient.square().mean().sqrt(), rtol=1e-3, atol=1e-6)
    # The direction is that of the scores: b^2 / a times their difference.
    a = (1 - late) / (1 - at)
    spread = late**2 - (a * at) ** 2
    scores = spread / a * (OTHER.score(x, s) - DATA.score(x, s))
    torch.testing.assert_close(of_fake - of_real, scores, rtol=1e-3, atol=1e-5)
    assert untouched(real, fake)


def test_equal_distributions_give_no_gradient_and_a_high_mean_is_lowered():
    s, noise = times(64), torch.randn(64, 4)
    for mean in (0.0, 0.5, -0.5):
        made = Line(DATA.mean + mean, DATA.deviation)
        loss, _ = distribution.distribution_matching_loss(
            made(torch.randn(64, 4)), DATA.velocity, made.law().velocity, s, noise
        )
        loss.backward()
        if mean:
            assert float(made.mean.grad) * mean > 0
        else:
            assert size(made) == 0.0


def test_a_generator_takes_on_the_distribution():
    made = Line(-0.3, 1.0)

    def loss(_):
        clean = made(torch.randn(64, 4))
        return distribution.distribution_matching_loss(
            clean, DATA.velocity, made.law().velocity, times(64), torch.randn(64, 4)
        )[0]

    train(loss, made.parameters(), steps=200)
    assert numbers(made) == pytest.approx([DATA.mean, DATA.deviation], abs=0.03)


def test_a_generator_and_its_critic_on_two_time_scales():
    made, critic, s = Line(-0.3, 1.0), Affine(), torch.full((256,), 0.5)
    students = torch.optim.Adam(made.parameters(), lr=0.03, betas=(0.0, 0.9))
    critics = torch.optim.Adam(critic.parameters(), lr=0.05, betas=(0.0, 0.9))
    turns = 0
    for update in range(600):
        clean = made(torch.randn(256, 4))
        if distribution.student_turn(update, 3):
            turns += 1
            students.zero_grad()
            loss, _ = distribution.distribution_matching_loss(
                clean, DATA.velocity, critic, s, torch.randn(256, 4)
            )
            loss.backward()
            students.step()
        critics.zero_grad()
        made.zero_grad()
        distribution.fake_score_loss(critic, clean, s, torch.randn(256, 4)).backward()
        assert untouched(made)
        critics.step()
    assert turns == 200
    assert numbers(made) == pytest.approx([DATA.mean, DATA.deviation], abs=0.12)
    velocity = line(lambda x: DATA.velocity(x, s[:1]))
    assert numbers(critic) == pytest.approx(velocity, abs=0.25)


@pytest.mark.parametrize(("at", "high"), [(0.0, None), (0.4, None), (0.4, 10.0)])
def test_critics_of_noisy_points_learn_the_unbiased_velocity(at, high):
    critic, early, s = Affine(), torch.full((1024,), at), torch.full((1024,), 0.7)

    def loss(_):
        point = DATA.point(1024, early)
        return distribution.interval_score_loss(critic, point, early, s, torch.randn(1024, 4), high=high)

    train(loss, critic.parameters(), steps=250)
    assert numbers(critic) == pytest.approx(line(lambda x: DATA.velocity(x, s[:1])), abs=0.06)


def test_the_critics_weight_near_the_point():
    at, s, noise = torch.full((2,), 0.5), torch.tensor([0.51, 0.9]), torch.randn(2, 4)
    errors = []
    for high in (None, 10.0):
        output = torch.zeros(2, 4, requires_grad=True)
        distribution.interval_score_loss(
            lambda *_, out=output: out, noise, at, s, noise, high=high
        ).backward()
        errors.append(output.grad)
    a = (1 - s) / (1 - at)
    spread = s**2 - (a * at) ** 2
    expected = (1 / spread).clamp_max(10.0)
    torch.testing.assert_close(errors[1] / errors[0], expected[:, None].expand(2, 4))
    ends = torch.tensor([1.0, 0.5])
    assert torch.isfinite(distribution.interval_score_loss(DATA.velocity, noise, at, ends, noise))
    with pytest.raises(ConfigError, match="positive"):
        distribution.interval_score_loss(DATA.velocity, noise, at, s, noise, high=0.0)


def next_of(schedule, s):
    """The time that a sampler goes to from s, for every sample."""
    return schedule[(schedule[None] - s[:, None]).abs().argmin(1) + 1]


def test_trajectories_converge_step_by_step():
    schedule = shifted_times(2, 2.0)
    student = Off(lambda x, s: DATA.map(x, s, next_of(schedule, s)), 0.2, -0.2)
    real = Off(DATA.velocity)

    def laws():
        """The distributions of the student's two points, as data would have to be to pass through them."""
        x, out = torch.tensor([[0.0], [1.0]]), []
        for k in range(2):
            s, r = schedule[k].expand(2), schedule[k + 1]
            with torch.no_grad():
                x = x - (s - r)[:, None] * student(x, s)
            mean, spread = float(x[0]), float(x[1] - x[0])
            square = (spread**2 - float(r) ** 2) / (1 - float(r)) ** 2
            out.append(Gaussian(mean / (1 - float(r)), max(square, 1e-4) ** 0.5))
        return out

    def fake(x, s):
        return points[0 if float(s[0]) > float(schedule[1]) else 1].velocity(x, s)

    points = laws()
    best = Off(student.truth)
    loss, _ = distribution.trajectory_matching_loss(best, real, DATA.velocity, torch.randn(64, 4), schedule)
    loss.backward()
    assert size(best) < 1e-5

    def objective(_):
        nonlocal points
        points = laws()
        return distribution.trajectory_matching_loss(student, real, fake, torch.randn(64, 4), schedule)[0]

    train(objective, student.parameters(), steps=200)
    assert untouched(real)
    assert numbers(student) == pytest.approx([0.0, 0.0], abs=0.03)


def test_steps_of_a_trajectory_are_trained_apart():
    schedule, grads, asked = shifted_times(3), {}, []
    firsts, noise = {}, torch.randn(8, 4)
    for steps in ([0], [2], [0, 2], [0, 1]):
        networks = [Off(DATA.velocity) for _ in range(3)]

        def student(x, s, networks=networks):
            k = int((1 - s[0]) * 3 + 0.5)
            asked.append(k)
            return networks[k](x, s)

        loss, told = distribution.trajectory_matching_loss(
            student,
            DATA.velocity,
            OTHER.velocity,
            noise,
            schedule,
            steps=steps,
            generator=torch.Generator().manual_seed(0),
        )
        loss.backward()
        firsts[tuple(steps)] = networks[0].shift.grad
        grads[tuple(steps)] = [not untouched(n) for n in networks]
        assert set(told) == {"gradient", "normaliser"}
    assert {steps for steps, got in grads.items() if got[0]} == {(0,), (0, 2), (0, 1)}
    assert {steps for steps, got in grads.items() if got[1]} == {(0, 1)}
    assert {steps for steps, got in grads.items() if got[2]} == {(2,), (0, 2)}
    assert asked == [0, 0, 1, 2, 0, 1, 2, 0, 1]
    # What comes later does not reach back: losses of two steps are averaged, and that is all.
    torch.testing.assert_close(firsts[0, 1], 0.5 * firsts[(0,)])
    with pytest.raises(ConfigError, match="0 to 2"):
        distribution.trajectory_matching_loss(
            DATA.velocity, DATA.velocity, DATA.velocity, torch.randn(1, 4), schedule, steps=[3]
        )


def test_an_expert_of_a_phase_learns_the_distribution_at_its_end():
    schedule = torch.tensor([1.0, 0.75, 0.5])
    first = Off(lambda x, s: DATA.map(x, s, torch.full_like(s, 0.75)))
    expert, real = Affine(-1.0, -0.5), Off(DATA.velocity)

    def student(x, s):
        return first(x, s) if float(s[0]) == 1.0 else expert(x, s)

    def law():
        """Of the expert's end, from x_0.75, which is exact."""
        a, b = numbers(expert)
        mean = 0.25 * DATA.mean * (1 - 0.25 * b) - 0.25 * a
        square = (1 - 0.25 * b) ** 2 * DATA.variance(0.75)
        return Gaussian(mean / 0.5, max((square - 0.25) / 0.25, 1e-4) ** 0.5)

    def loss(_):
        start = distribution.backward_simulation(student, torch.randn(64, 4), schedule, stop=1, mode="ode")
        return distribution.phased_matching_loss(student, start, real, law().velocity)[0]

    asked = []
    start = distribution.backward_simulation(student, torch.randn(256, 4), schedule, stop=1, mode="ode")
    distribution.phased_matching_loss(
        student, start, lambda x, s: asked.append(s) or DATA.velocity(x, s), DATA.velocity
    )
    assert 0.5 < float(asked[0].min()) < 0.55
    assert 0.95 < float(asked[0].max()) < 1.0

    train(loss, expert.parameters(), steps=200)
    assert untouched(first, real)
    got = law()
    assert [got.mean, got.deviation] == pytest.approx([DATA.mean, DATA.deviation], abs=0.06)


def test_the_student_is_trained_on_what_it_makes():
    schedule, noise = shifted_times(4, 3.0), torch.randn(20000, 1)
    for mode, truth in (
        ("ode", lambda x, s: DATA.map(x, s, next_of(schedule, s[:1]).expand_as(s))),
        ("consistency", lambda x, s: DATA.map(x, s, torch.zeros_like(s))),
    ):
        student = Off(truth)
        start = distribution.backward_simulation(student, noise, schedule, stop=3, mode=mode)
        assert start.index == 3
        assert not start.x.requires_grad
        assert float(start.s[0]) == float(schedule[3])
        assert float(start.r[0]) == 0.0
        assert float(start.x.mean()) == pytest.approx((1 - float(schedule[3])) * DATA.mean, abs=0.02)
        assert float(start.x.var()) == pytest.approx(DATA.variance(float(schedule[3])), rel=0.04)
        if mode == "ode":
            exact = DATA.solution(noise, torch.ones(1), schedule[3:4])
            torch.testing.assert_close(start.x, exact, rtol=1e-4, atol=1e-4)
    first = distribution.backward_simulation(student, noise, schedule, stop=0)
    assert torch.equal(first.x, noise)
    assert float(first.s[0]) == 1.0


def test_stops_are_random_and_repeatable():
    schedule, noise = shifted_times(4), torch.randn(2, 4)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return distribution.backward_simulation(DATA.velocity, noise, schedule, generator=generator)

    assert {run(k).index for k in range(40)} == {0, 1, 2, 3}
    assert torch.equal(run(3).x, run(3).x)
    for options in ({"stop": 4}, {"stop": 0, "mode": "sde"}):
        with pytest.raises(ConfigError):
            distribution.backward_simulation(DATA.velocity, noise, schedule, **options)


def test_rewards_scale_the_gradient_of_samples():
    reward = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    weights = distribution.reward_weights(reward, beta=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.0, 2.0, -2.0]).exp())
    assert not weights.requires_grad
    assert distribution.reward_weights(reward, baseline=1.0, high=0.5).tolist()[1] == 0.5
    with pytest.raises(ConfigError, match="beta"):
        distribution.reward_weights(reward, beta=0.0)
    s, noise, grads = times(3), torch.randn(3, 4), []
    for scale in (None, weights):
        clean = DATA.mean * torch.ones(3, 4, requires_grad=True)
        clean.retain_grad()
        distribution.distribution_matching_loss(clean, DATA.velocity, OTHER.velocity, s, noise, scale=scale)[
            0
        ].backward()
        grads.append(clean.grad)
    torch.testing.assert_close(grads[1], weights[:, None] * grads[0], rtol=1e-4, atol=1e-6)


def test_a_mask_keeps_gradient_to_the_objects():
    s, noise = times(3), torch.randn(3, 2, 4)
    mask = torch.zeros(3, 1, 4)
    mask[:, :, 0] = 1.0
    clean = torch.randn(3, 2, 4, requires_grad=True)
    distribution.distribution_matching_loss(clean, DATA.velocity, OTHER.velocity, s, noise, weight=mask)[
        0
    ].backward()
    assert not clean.grad[:, :, 1:].any()
    assert bool((clean.grad[:, :, 0] != 0).all())


def test_times_between():
    low, high = torch.tensor([0.2, 0.5]).repeat(500), torch.tensor([0.4, 1.0]).repeat(500)
    t = distribution.times_between(low, high, margin=0.1)
    share = (t - low) / (high - low)
    assert 0.1 <= float(share.min()) < 0.12
    assert 0.88 < float(share.max()) <= 0.9


def test_two_processes_draw_what_one_would():
    """With `Chance` a process has its rows of the batch, and all stop at the same step."""
    schedule, whole = shifted_times(4), torch.randn(4, 3)

    def run(noise, rank, world):
        def chance(update):
            return Chance("cpu", 0, update, rank=rank, world=world)

        starts = [
            distribution.backward_simulation(DATA.velocity, noise, schedule, generator=chance(k))
            for k in range(6)
        ]
        low, high = torch.zeros(len(noise)), torch.ones(len(noise))
        late = distribution.times_between(low, high, generator=chance(9))
        return [start.index for start in starts], [start.x for start in starts], late

    stops, points, late = run(whole, 0, 1)
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        mine = run(whole[own], rank, 2)
        assert mine[0] == stops
        for got, expected in zip(mine[1], points, strict=True):
            torch.testing.assert_close(got, expected[own])
        torch.testing.assert_close(mine[2], late[own])
    assert len(set(stops)) > 1
