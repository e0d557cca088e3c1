"""Block-sparse attention: every implementation against the contract, and the contract against faulty kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vivace.core.errors import ConfigError
from vivace.kernels.api import select
from vivace.kernels.block_sparse_attention.gather import GatherAttention
from vivace.kernels.block_sparse_attention.listed import ListedAttention
from vivace.kernels.block_sparse_attention.reference import ReferenceAttention
from vivace.kernels.block_sparse_attention.spec import OP, BlockMap
from vivace.testing.interpreter import interpret
from vivace.testing.kernel_checks import CASES, CHECKS, Case, check_kernel, oracle


class Listed(ListedAttention):
    """The lists without Triton, whose interpreter is slow; its own tests are those of `block_attention`."""

    def __init__(self, block_map, device) -> None:
        super().__init__(block_map, device, backend="gather")


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
def test_lists_through_triton_keep_the_contract() -> None:
    few = [c for c in CASES if c.name in ("odd length", "shuffled tokens with gaps")]
    assert check_kernel(ListedAttention, cases=few, checks=["values", "padding", "pairs"]) == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", [ReferenceAttention, GatherAttention, Listed])
def test_kernel_keeps_the_contract(make, check) -> None:
    assert check_kernel(make, checks=[check]) == []


@pytest.mark.slow
def test_flex_keeps_the_contract_on_a_cpu() -> None:
    make = select(OP, prefer="flex", device="cpu").run
    padded = [Case("shuffled tokens with gaps", 40, 16, 0.5, shuffled=True)]
    assert check_kernel(make, cases=padded, checks=["padding", "pairs", "refusals"]) == []


class FlipsTheMap(GatherAttention):
    """Takes keys for queries."""

    def __init__(self, block_map, device) -> None:
        super().__init__(BlockMap(block_map.slots, block_map.keep.transpose(0, 2, 1).copy()), device)


class ForgetsTheMask(GatherAttention):
    def __call__(self, q, k, v, mask=None):
        return super().__call__(q, k, v)


class SharesTheFirstHeadsMap(GatherAttention):
    def __init__(self, block_map, device) -> None:
        super().__init__(BlockMap(block_map.slots, block_map.keep[:1]), device)


class WritesToItsInputs(GatherAttention):
    def __call__(self, q, k, v, mask=None):
        out = super().__call__(q, k, v, mask)
        q.mul_(2.0)
        return out


class CountsThePadding(GatherAttention):
    def pairs(self, batch, heads, queries, keys) -> float:
        blocks = self.block_map.keep.sum() * heads // len(self.block_map.keep)
        return float(batch * blocks * self.block_map.slots.shape[1] ** 2)


class RoundsInTheMiddle(GatherAttention):
    def __call__(self, q, k, v, mask=None):
        return super().__call__(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).to(q.dtype)


class AttendsToAll(GatherAttention):
    def __call__(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class PadsWithWhatIsThere(GatherAttention):
    """Reads a block's worth of memory wherever the sequence ends."""

    def __call__(self, q, k, v, mask=None):
        wide = torch.as_strided(k, (k.shape[0], k.shape[1] + 1, *k.shape[2:]), k.stride(), k.storage_offset())
        return super().__call__(q, k, v, mask) + 0.0 * wide[:, -1:]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (FlipsTheMap, "values"),
        (RoundsInTheMiddle, "values"),
        (SharesTheFirstHeadsMap, "values"),
        (ForgetsTheMask, "key mask"),
        (AttendsToAll, "unseen keys"),
        (AttendsToAll, "refusals"),
        (WritesToItsInputs, "strides"),
        (WritesToItsInputs, "batch"),
        (CountsThePadding, "pairs"),
        (PadsWithWhatIsThere, "padding"),
    ],
)
def test_faulty_kernels_are_caught(fault, check) -> None:
    assert check_kernel(fault, checks=[check])


def test_oracle_agrees_with_torch() -> None:
    block_map = CASES[1].block_map()
    q, k, v = torch.randn(3, 2, block_map.tokens, 4, 8, dtype=torch.float64).unbind(0)
    mask = torch.from_numpy(block_map.token_mask())
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(oracle(block_map, q, k, v), want.transpose(1, 2))


def test_gather_is_differentiable() -> None:
    block_map = CASES[6].block_map()
    inputs = [torch.randn(1, block_map.tokens, 4, 8, requires_grad=True) for _ in range(3)]
    grads = [
        torch.autograd.grad(make(block_map)(*inputs).square().sum(), inputs)
        for make in (ReferenceAttention, GatherAttention)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gather_has_no_graph_break() -> None:
    kernel = GatherAttention(CASES[7].block_map())
    q, k, v = torch.randn(3, 1, CASES[7].tokens, 4, 8).unbind(0)
    compiled = torch.compile(lambda q, k, v: kernel(q * 2, k, v) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), kernel(q * 2, k, v) + 1)


@pytest.mark.parametrize(
    ("slots", "keep", "reason"),
    [
        ([[0, 1], [2, 2]], np.ones((1, 2, 2), bool), "exactly once"),
        ([[0, 1], [3, -1]], np.ones((1, 2, 2), bool), "exactly once"),
        ([[-1, -1]], np.ones((1, 1, 1), bool), "exactly once"),
        ([[0, 1], [2, 3]], np.array([[[True, False], [False, False]]]), "at least one block"),
        ([[0, 1], [2, 3]], np.ones((2, 2), bool), "keep must be bool"),
        ([[0, 1], [2, 3]], np.ones((1, 2, 2)), "keep must be bool"),
    ],
)
def test_impossible_maps_are_refused(slots, keep, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockMap(np.array(slots), keep)


def test_choice_says_why() -> None:
    choice = select(OP, device="cpu")
    assert choice.name == "gather"
    assert "flex" in choice.why
    assert select(OP, device="cuda", head_dim=64).name == "triton"
    assert select(OP, device="cuda", head_dim=48).name == "flex"
    assert select(OP, device="cuda", head_dim=12).name == "gather"
    assert select(OP, prefer="reference").why == "asked for by name"
    with pytest.raises(ConfigError, match="has no kernel called 'magic'"):
        select(OP, prefer="magic")
