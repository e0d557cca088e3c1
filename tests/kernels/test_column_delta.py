"""Attention over single keys: both kernels against dense attention, and the delta against a softmax of mixed scores."""

from __future__ import annotations

import pytest
import torch

from vivace.testing.interpreter import interpret

WHY_NOT = interpret()

from vivace.kernels.api import select  # noqa: E402
from vivace.kernels.column_delta.op import column_attention  # noqa: E402
from vivace.kernels.column_delta.spec import OP, TOLERANCE, remainder, renewed  # noqa: E402

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")),
]
BLOCK, SCALE = 32, 0.3


def tensors(seed, batch=2, heads=2, queries=64, keys=100, dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, dim, generator=generator) for n in (queries, keys, keys))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def some_columns(seed, number, batch=2, heads=2, blocks=2, keys=100):
    draws = torch.rand(batch, heads, blocks, keys, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(-1)[..., :number].sort(-1).values.to(torch.int32)


def scores_of(q, k, bias=None):
    scores = q.double() @ k.double().mT * SCALE
    return scores if bias is None else scores + bias.double()[:, None, None]


def chosen_mask(index, keys=100):
    """Bool (B, H, S, keys)."""
    mask = torch.zeros(*index.shape[:3], keys, dtype=torch.bool).scatter_(-1, index.long(), True)
    return mask.repeat_interleave(BLOCK, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 70])
def test_attends_to_its_columns(backend, dtype, number) -> None:
    q, k, v = tensors(0, dtype=dtype)
    index = some_columns(1, number)
    bias = torch.randn(2, 100, generator=torch.Generator().manual_seed(2))
    bias[1, ::2] = float("-inf")
    out, lse = select(OP, backend, device="cpu").run().attend(q, k, v, index, SCALE, bias)
    scores = scores_of(q, k, bias).masked_fill(~chosen_mask(index), float("-inf"))
    want_lse = torch.logsumexp(scores, -1)
    want = (scores - want_lse[..., None]).exp().nan_to_num(0.0) @ v.double()
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2 * bound)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_sums_probabilities_over_blocks_of_queries(backend, with_bias) -> None:
    q, k, _ = tensors(3)
    bias = torch.randn(2, 100, generator=torch.Generator().manual_seed(4)) if with_bias else None
    scores = scores_of(q, k, bias)
    lse = torch.logsumexp(scores, -1)
    silent = torch.zeros_like(lse, dtype=torch.bool)
    silent[:, :, 50:] = True
    p = (scores - lse[..., None]).exp().masked_fill(silent[..., None], 0.0)
    want = p.unflatten(2, (-1, BLOCK)).sum(3)
    found = select(OP, backend, device="cpu").run()
    got = found.sums(q, k, lse.masked_fill(silent, float("inf")).float(), BLOCK, SCALE, bias)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("growth", [1.0, 60.0])
def test_delta_is_a_softmax_of_new_and_old_scores(growth) -> None:
    (q, k, v), (q1, k1, v1) = tensors(5), tensors(6)
    q1 = q1 * growth  # new scores far above the old sum of exponentials
    index = some_columns(7, 20)
    run = select(OP, "reference", device="cpu").run()
    old, new, chosen = scores_of(q, k), scores_of(q1, k1), chosen_mask(index)
    lse = torch.logsumexp(old, -1)
    dense = ((old - lse[..., None]).exp() @ v.double()).float(), lse.float()
    rest = remainder(dense, run.attend(q, k, v, index, SCALE))
    got = renewed(rest, run.attend(q1, k1, v1, index, SCALE))

    p = torch.softmax(torch.where(chosen, new, old), -1)
    want = (p * chosen) @ v1.double() + (p * ~chosen) @ v.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    same = renewed(rest, run.attend(q, k, v, index, SCALE))
    torch.testing.assert_close(same, dense[0], rtol=1e-4, atol=1e-5)


def test_queries_that_see_nothing_give_no_nan() -> None:
    q, k, v = tensors(8)
    bias = torch.zeros(2, 100)
    bias[1] = float("-inf")
    index = some_columns(9, 10)
    part = column_attention(q, k, v, index, SCALE, bias)
    lse = torch.logsumexp(scores_of(q, k, bias), -1).float()
    rest = remainder((torch.zeros_like(q), lse), part)
    assert not renewed(rest, part)[1].any()


def test_refusals() -> None:
    q, k, v = tensors(10)
    index = some_columns(11, 5)
    with pytest.raises(RuntimeError, match="no gradients"):
        column_attention(q.clone().requires_grad_(), k, v, index, SCALE)
    with pytest.raises(ValueError, match="not whole blocks"):
        column_attention(q[:, :, :63], k, v, index, SCALE)
    with pytest.raises(ValueError, match="bias must be"):
        column_attention(q, k, v, index, SCALE, torch.zeros(2, 99))
    with pytest.raises(ValueError, match="index is for"):
        column_attention(q, k, v, index[:1], SCALE)
