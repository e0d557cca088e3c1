"""The optimizer: orthogonal steps, the same for a stack as for its members, and resumable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vivace.tiny.train.muon import Muon, SplitOptimizer, orthogonalise, split_parameters


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)])
def test_singular_values_end_near_one(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spread = torch.linspace(0.1, 3.0, u.shape[-1])  # a condition number of 30
    values = torch.linalg.svdvals(orthogonalise(u * spread @ v))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_singular_directions_are_kept():
    torch.manual_seed(0)
    matrix = torch.randn(1, 12, 20)
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    aligned = u.T @ orthogonalise(matrix)[0] @ v.T
    assert (aligned - aligned.diagonal().diag()).abs().max() < 1e-3


def test_a_stack_is_updated_like_its_members():
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(8, 4, 3)) for _ in range(3)] + [nn.Parameter(torch.randn(4, 8))]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    gradients = [torch.randn_like(p) for p in together]
    optimizers = [Muon(together, lr=0.1)] + [Muon([p], lr=0.1) for p in alone]
    for _ in range(2):
        for parameter, other, gradient in zip(together, alone, gradients, strict=True):
            parameter.grad, other.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone, strict=True))


def make() -> tuple[nn.Module, SplitOptimizer]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    matrices, others = split_parameters(network, exclude=("0.",))
    assert len(matrices) == 1
    assert len(others) == 5
    return network, SplitOptimizer(matrices, others, muon_lr=0.02, adam_lr=0.01)


def train(network: nn.Module, optimizer: SplitOptimizer, steps: range) -> float:
    loss = torch.tensor(0.0)
    for step in steps:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))
        loss = (network(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        loss.backward()
        optimizer.step(1.0)
    return loss.item()


def test_learns_and_resumes_exactly():
    network, optimizer = make()
    first = train(network, optimizer, range(1))
    train(network, optimizer, range(1, 40))
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    last = train(network, optimizer, range(40, 80))
    assert last < 0.25 * first
    again, fresh = make()
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    assert train(again, fresh, range(40, 80)) == last
