"""The ledger puts everything back exactly, in any order, also when somebody else came in between."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from vivace.core.surgery import Surgery


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 2.0

    def forward(self, x):
        return self.linear(x) * self.scale


def fingerprint(module: nn.Module) -> list[object]:
    return [(n, id(m), sorted(vars(m)), list(m._modules)) for n, m in module.named_modules()]


def add(amount: float):
    return lambda old: lambda *a, **k: old(*a, **k) + amount


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def test_wrapper_leaves_no_trace(block):
    x, before = torch.randn(2, 4), fingerprint(block)
    want = block(x)
    edit = Surgery()
    edit.wrap(block, add(1.0))
    assert torch.equal(block(x), want + 1.0)
    edit.close()
    assert fingerprint(block) == before
    assert torch.equal(block(x), want)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_owners_leave_in_any_order(block, order):
    x, before = torch.randn(2, 4), fingerprint(block)
    want = block(x)
    edit, amounts = Surgery(), {"a": 1.0, "b": 10.0, "c": 100.0}
    for owner, amount in amounts.items():
        with edit.by(owner):
            edit.wrap(block, add(amount))
    left = dict(amounts)
    for owner in order:
        edit.undo(owner)
        del left[owner]
        assert torch.allclose(block(x), want + sum(left.values()))
    assert fingerprint(block) == before


@pytest.mark.parametrize("foreign_leaves_first", [True, False])
def test_foreign_wrapper_on_top_survives(block, foreign_leaves_first):
    x, want = torch.randn(2, 4), None
    want = block(x)
    edit = Surgery()
    edit.wrap(block, add(1.0))
    ours = block.forward
    block.forward = lambda *a, **k: ours(*a, **k) * 3.0
    assert torch.allclose(block(x), (want + 1.0) * 3.0)
    if foreign_leaves_first:
        block.forward = ours
        edit.close()
        assert "forward" not in vars(block)
        assert torch.equal(block(x), want)
    else:
        edit.close()
        assert torch.allclose(block(x), want * 3.0), "the foreign wrapper must keep working, without ours"
        block.forward = ours
        assert torch.equal(block(x), want), "what the foreigner puts back must be the plain call"


def test_foreign_wrapper_below_is_kept(block):
    x, want = torch.randn(2, 4), None
    want = block(x)
    plain = block.forward
    block.forward = lambda *a, **k: plain(*a, **k) * 3.0
    foreign = block.forward
    edit = Surgery()
    edit.wrap(block, add(1.0))
    assert torch.allclose(block(x), want * 3.0 + 1.0)
    edit.close()
    assert vars(block)["forward"] is foreign


def test_diffusers_hook_in_between(block):
    from diffusers.hooks import HookRegistry, ModelHook

    class Double(ModelHook):
        def post_forward(self, module, output):
            return output * 2.0

    x, want = torch.randn(2, 4), None
    want = block(x)
    edit = Surgery()
    edit.wrap(block, add(1.0))
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Double(), "double")
    assert torch.allclose(block(x), (want + 1.0) * 2.0)
    edit.close()
    assert torch.allclose(block(x), want * 2.0)
    registry.remove_hook("double")
    assert torch.allclose(block(x), want)


def test_swap_set_and_weight_are_undone_exactly(block):
    before, original = fingerprint(block), block.linear.weight
    data = original.detach().clone()
    edit = Surgery()
    edit.set(block, "scale", 5.0)
    edit.swap(block, "linear", nn.Linear(4, 4))
    edit.close()
    assert block.scale == 2.0
    assert fingerprint(block) == before
    edit = Surgery()
    edit.weight(block.linear, "weight", torch.zeros(4, 4), keep="host")
    assert original.numel() == 0, "keep='host' must free the original's memory"
    assert not block.linear.weight.any()
    edit.close()
    assert block.linear.weight is original
    assert torch.equal(original, data)


def test_reload_gives_the_weight_back(block):
    original, data = block.linear.weight, block.linear.weight.detach().clone()
    edit = Surgery()
    edit.weight(block.linear, "weight", torch.zeros(4, 4), keep="reload", reload=data.clone)
    edit.close()
    assert block.linear.weight is original
    assert torch.equal(original, data)
    with pytest.raises(ValueError, match="reload"):
        edit.weight(block.linear, "weight", torch.zeros(4, 4), keep="reload")


def test_a_failing_wrapper_changes_nothing(block):
    before = fingerprint(block)
    edit = Surgery()
    edit.wrap(block, add(1.0))
    with pytest.raises(RuntimeError, match="no"):
        edit.wrap(block, lambda old: (_ for _ in ()).throw(RuntimeError("no")))
    assert edit.edits() == 1
    edit.close()
    assert fingerprint(block) == before


def test_every_undo_is_tried_when_one_fails(block):
    edit = Surgery()

    def broken() -> None:
        raise RuntimeError("disk gone")

    edit.set(block, "scale", 3.0)
    edit.set(block, "other", 1, on_undo=broken)
    edit.wrap(block, add(1.0))
    with pytest.raises(RuntimeError, match="disk gone"):
        edit.close()
    assert block.scale == 2.0
    assert "forward" not in vars(block)


def test_signature_is_kept(block):
    import inspect

    edit, before = Surgery(), inspect.signature(block.forward)
    edit.wrap(block, add(1.0))
    assert inspect.signature(block.forward) == before
    edit.close()
