"""Adversarial losses on games whose end is known, penalties against exact gradients, and the head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vivace.core.errors import ConfigError
from vivace.training.losses import adversarial

PAIRS = {
    "hinge": (
        adversarial.hinge_discriminator,
        lambda real, fake: adversarial.hinge_generator(fake),
    ),
    "non-saturating": (
        adversarial.non_saturating_discriminator,
        lambda real, fake: adversarial.non_saturating_generator(fake),
    ),
    "relativistic": (adversarial.relativistic_discriminator, adversarial.relativistic_generator),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_values_by_hand():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-0.5, 1.0])
    assert adversarial.hinge_discriminator(real, fake) == pytest.approx(0.25 + 1.25)
    assert adversarial.hinge_generator(fake) == pytest.approx(-0.25)
    entropy = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        adversarial.non_saturating_discriminator(real, fake),
        entropy(real, torch.ones(2)) + entropy(fake, torch.zeros(2)),
    )
    torch.testing.assert_close(adversarial.non_saturating_generator(fake), entropy(fake, torch.ones(2)))
    torch.testing.assert_close(
        adversarial.relativistic_discriminator(real, fake), entropy(real - fake, torch.ones(2))
    )
    torch.testing.assert_close(
        adversarial.relativistic_generator(real, fake), entropy(fake - real, torch.ones(2))
    )
    shifted = adversarial.relativistic_discriminator(real + 7.0, fake + 7.0)
    torch.testing.assert_close(shifted, adversarial.relativistic_discriminator(real, fake))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_pull_apart_and_together(name):
    for_judge, for_generator = PAIRS[name]
    real = torch.zeros(4, 1, requires_grad=True)
    fake = torch.zeros(4, 1, requires_grad=True)
    for_judge(real, fake).backward()
    assert bool((real.grad < 0).all())
    assert bool((fake.grad > 0).all())
    real.grad = fake.grad = None
    for_generator(real, fake).backward()
    assert bool((fake.grad < 0).all())
    assert real.grad is None
    assert for_judge(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", PAIRS)
def test_the_dirac_game_ends_at_the_data(name):
    """Data and generator are points, the judge is a slope (Mescheder et al. 2018): only penalties make it converge."""
    for_judge, for_generator = PAIRS[name]
    slope, made, data = (
        nn.Parameter(torch.zeros(1)),
        nn.Parameter(torch.full((1,), 2.0)),
        torch.full((8, 1), 0.5),
    )
    judges, makers = torch.optim.SGD([slope], lr=0.2), torch.optim.SGD([made], lr=0.2)
    for _ in range(300):
        fake = made.expand(8, 1)
        judges.zero_grad()
        loss = for_judge(slope * data, slope * fake.detach())
        for x in (data, fake):
            loss = loss + 0.5 * adversarial.approximated_penalty(lambda y: slope * y, x, relative=True)
        loss.backward()
        judges.step()
        makers.zero_grad()
        for_generator(slope.detach() * data, slope.detach() * fake).backward()
        makers.step()
    assert made.item() == pytest.approx(0.5, abs=0.05)
    assert slope.item() == pytest.approx(0.0, abs=0.05)


def test_the_approximated_penalty_is_the_gradients_norm():
    weight = nn.Parameter(torch.randn(6))
    x = torch.randn(20000, 6)

    def linear(y):
        return y @ weight + 3.0

    exact = weight.detach().square().sum()
    for deviation in (0.01, 0.1, 2.0):
        got = adversarial.approximated_penalty(linear, x, deviation=deviation)
        assert float(got.detach()) == pytest.approx(deviation**2 * float(exact), rel=0.05)
        got = adversarial.approximated_penalty(linear, x, deviation=deviation, relative=True)
        assert float(got.detach()) == pytest.approx(float(exact), rel=0.05)
    got.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach(), rtol=0.15, atol=0.15)
    with pytest.raises(ConfigError, match="positive deviation"):
        adversarial.approximated_penalty(linear, x, deviation=0.0)


def test_the_penalty_of_a_curved_judge_and_of_known_noise():
    x, noise = torch.randn(4000, 3, requires_grad=True), torch.randn(4000, 3)

    def curved(y):
        return y.sin().sum(1)

    (gradient,) = torch.autograd.grad(curved(x).sum(), x)
    got = adversarial.approximated_penalty(curved, x, deviation=1e-2, noise=noise, relative=True)
    torch.testing.assert_close(got, (gradient * noise).sum(1).square().mean(), rtol=1e-2, atol=1e-3)
    assert float(got) == pytest.approx(float(gradient.square().sum(1).mean()), rel=0.08)
    known = adversarial.approximated_penalty(
        curved, x, deviation=1e-2, noise=noise, logits=curved(x.detach()), relative=True
    )
    torch.testing.assert_close(known, got)
    assert not got.requires_grad  # clips get none from the penalty


def test_features():
    real = [torch.randn(2, 3, 4, requires_grad=True), 100 * torch.randn(2, 3, 4)]
    fake = [(x.detach() + 0.1 * x.detach().abs()).requires_grad_() for x in real]
    squares = [x.detach().square().mean() for x in real]
    loss = adversarial.feature_matching(fake, real)
    torch.testing.assert_close(loss, 0.01 * sum(squares) / 2)
    even = adversarial.feature_matching(fake, real, relative=True)
    torch.testing.assert_close(even.detach(), torch.tensor(0.01))
    even.backward()
    assert bool((fake[0].grad > 0).all())
    assert real[0].grad is None
    assert adversarial.feature_matching(real, real) == 0
    for wrong in ([], real[:1]):
        with pytest.raises(ConfigError, match="as many layers"):
            adversarial.feature_matching(wrong, real)


@pytest.mark.parametrize("pooling", ["attention", "token"])
def test_the_head_tells_clips_apart(pooling):
    head = adversarial.DiscriminatorHead(8, 2, pooling=pooling, heads=2)
    centre = torch.randn(8)

    def states(sign):
        return [sign * centre + torch.randn(4, 6, 8) for _ in range(2)]

    logits = head(states(1.0))
    assert logits.shape == ((4, 1) if pooling == "attention" else (4, 12))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for step in range(40):
        optimizer.zero_grad()
        loss = adversarial.hinge_discriminator(head(states(1.0)), head(states(-1.0)))
        loss.backward()
        assert step or all(p.grad is not None for p in head.parameters())
        optimizer.step()
    assert float(loss.detach()) < 0.5
    assert float(head(states(1.0)).mean().detach()) > 0.5 > -0.5 > float(head(states(-1.0)).mean().detach())


def test_order_of_tokens_and_independence_of_samples():
    states, order = [torch.randn(3, 6, 8), torch.randn(3, 6, 8)], torch.randperm(6)
    pooled = adversarial.DiscriminatorHead(8, 2, heads=2, hidden=4)
    torch.testing.assert_close(pooled([x[:, order] for x in states]), pooled(states))
    torch.testing.assert_close(pooled([x[1:2] for x in states]), pooled(states)[1:2])
    each = adversarial.DiscriminatorHead(8, 2, pooling="token")
    torch.testing.assert_close(
        each([x[:, order] for x in states]).unflatten(1, (2, 6)),
        each(states).unflatten(1, (2, 6))[:, :, order],
    )
    half = pooled([x.bfloat16() for x in states])
    assert half.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pooled(states), pooled(states).float(), rtol=0, atol=0)
        assert pooled(states).dtype == each(states).dtype == torch.float32


def test_wrong_heads_are_refused():
    for options in ({"pooling": "mean"}, {"heads": 3}, {"branches": 0}):
        with pytest.raises(ConfigError):
            adversarial.DiscriminatorHead(8, **options)
    with pytest.raises(ConfigError, match="2 hidden states"):
        adversarial.DiscriminatorHead(8, 2)([torch.randn(1, 2, 8)])
