"""Objectives on a real video transformer: forward-mode derivatives, bf16 autocast, and where gradient goes."""

from __future__ import annotations

import copy

import pytest
import torch
from gaussian import untouched

from vivace.core.errors import ConfigError
from vivace.testing.models import wan
from vivace.training.losses import (
    adversarial,
    consistency,
    continuous,
    distribution,
    flow_map,
    paths,
    progressive,
)
from vivace.training.losses.derivative import STEP, derivative_gap, total_derivative

B = 2


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return wan(layers=2).transformer.requires_grad_(True)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    clean, noise = torch.randn(B, 16, 3, 4, 4), torch.randn(B, 16, 3, 4, 4)
    return clean, noise, torch.tensor([0.8, 0.4]), torch.tensor([0.5, 0.2])


def velocity(network, text=None):
    text = torch.randn(B, 5, 32, generator=torch.Generator().manual_seed(2)) if text is None else text

    def call(x, s):
        return network(hidden_states=x, timestep=1000.0 * s, encoder_hidden_states=text, return_dict=False)[0]

    return call


def test_forward_mode_goes_through_a_video_transformer(transformer, batch):
    clean, noise, s, _ = batch
    x, f = paths.interpolate(clean, noise, s), velocity(transformer)
    exact = total_derivative(f, x, s, noise - clean)
    assert exact.shape == x.shape
    assert not exact.requires_grad
    assert derivative_gap(f, x, s, noise - clean) < 0.03
    # In double there is less rounding, though times and norms are float32 inside whatever the network is.
    double = copy.deepcopy(transformer).double()
    g = velocity(double, torch.randn(B, 5, 32, generator=torch.Generator().manual_seed(2)).double())
    h, v = 5e-5, (noise - clean).double()
    near = (g(x.double() + h * v, s.double() + h) - g(x.double() - h * v, s.double() - h)) / (2 * h)
    error = (exact - near).norm() / near.norm()
    assert float(error.detach()) < 2e-3


def test_the_step_of_differences(transformer, batch):
    """What is said of `derivative.STEP`: a sine of 1000 s turns by a radian at 1e-3; bf16 has no digits left."""
    clean, noise, s, _ = batch
    f, x = velocity(transformer), paths.interpolate(clean, noise, s)
    gaps = [derivative_gap(f, x, s, noise - clean, step=step) for step in (1e-3, STEP, 1e-5)]
    assert gaps[0] > 0.05
    assert max(gaps[1:]) < 0.01
    both = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            both.append(total_derivative(f, x, s, noise - clean, derivative="difference"))
            assert torch.is_autocast_enabled("cpu") == half
    assert torch.equal(both[0], both[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert 0.001 < derivative_gap(f, x, s, noise - clean) < 0.05

        def inside(y, t):
            with torch.autocast("cpu", torch.bfloat16):
                return f(y, t)

        assert min(derivative_gap(inside, x, s, noise - clean, step=step) for step in (1e-3, STEP)) > 0.05


def test_fused_attention_has_no_forward_mode_here(transformer, batch):
    """Why derivatives run with unfused attention: if torch gains one, that detour can go."""
    clean, noise, s, _ = batch
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(velocity(transformer), (clean, s), (noise, torch.ones(B)))


def objectives(student, teacher, fake, batch):
    """Every kind of loss, by name, of velocities."""
    clean, noise, s, r = batch
    x = paths.interpolate(clean, noise, s)

    def as_map(net):
        return lambda y, t, u: net(y, t)

    generator = torch.Generator().manual_seed(0)
    yield "progressive", lambda: progressive.progressive_loss(student, teacher, x, s, r)
    yield "consistency", lambda: consistency.consistency_loss(student, student, teacher, x, s, r)
    yield (
        "semantic",
        lambda: consistency.semantic_expert_loss(student, student, teacher, x, s, r)[0],
    )
    yield "continuous", lambda: continuous.continuous_consistency_loss(student, teacher, x, s)[0]
    yield (
        "mean flow",
        lambda: flow_map.mean_flow_loss(as_map(student), x, s, r, teacher(x, s))[0],
    )
    yield (
        "any step",
        lambda: flow_map.any_step_loss(as_map(student), as_map(student), teacher, x, s, 0.5 * (s + r), r)[0],
    )

    def matching():
        start = distribution.backward_simulation(
            student, noise, paths.shifted_times(2), stop=1, generator=generator.manual_seed(0)
        )
        made = paths.clean_from_velocity(start.x, student(start.x, start.s), start.s)
        return distribution.distribution_matching_loss(made, teacher, fake, s, clean)[0]

    yield "matching", matching


def test_every_objective_teaches_the_student_alone_in_bf16(transformer, batch):
    student, teacher, fake = (copy.deepcopy(transformer) for _ in range(3))
    with torch.no_grad():
        for network in (teacher, fake):
            for p in network.parameters():
                p.add_(0.05 * torch.randn_like(p))
    nets = [velocity(n) for n in (student, teacher, fake)]
    for name, loss in objectives(*nets, batch):
        grads = []
        for half in (False, True):
            student.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss()
            assert (value.dtype, value.ndim) == (torch.float32, 0), name
            value.backward()
            grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
            missing = [n for n, p in student.named_parameters() if p.grad is None]
            assert not missing, (name, missing)
        assert untouched(teacher, fake), name
        likeness = torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0)
        assert float(likeness) > 0.95, (name, float(likeness))


def test_a_head_judges_the_blocks_of_a_frozen_transformer(transformer, batch):
    clean, noise, s, _ = batch
    frozen = copy.deepcopy(transformer).requires_grad_(False)
    head = adversarial.DiscriminatorHead(24, len(frozen.blocks), heads=2)
    seen = []
    for block in frozen.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def judge(x, at):
        seen.clear()
        velocity(frozen)(x, at)
        return head(list(seen)), list(seen)

    student = copy.deepcopy(transformer)
    x = paths.interpolate(clean, noise, s)
    head.requires_grad_(False)
    loss, fake, real, _ = consistency.detail_expert_loss(
        velocity(student), velocity(student), velocity(frozen), judge, x, s, s - 0.1, s, noise
    )
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert untouched(head, frozen)
    student.zero_grad(set_to_none=True)
    head.requires_grad_(True)
    consistency.detail_discriminator_loss(judge, fake, real, s).backward()
    assert all(p.grad is not None for p in head.parameters())
    assert untouched(student, frozen)


def test_a_network_without_forward_mode_is_told_the_way_out(transformer, batch):
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return g

    clean, noise, s, r = batch
    f = velocity(transformer)

    def rounded(x, s, r):
        return f(Rounded.apply(x), s)

    with pytest.raises(ConfigError, match="'difference'"):
        flow_map.mean_flow_loss(rounded, clean, s, r, noise)
    loss, _ = flow_map.mean_flow_loss(rounded, clean, s, r, noise, derivative="difference")
    assert torch.isfinite(loss)
