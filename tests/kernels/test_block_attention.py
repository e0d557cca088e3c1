"""Attention over lists of key blocks: every backend against a loop over single queries, and its gradients."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vivace.core.errors import ConfigError
from vivace.kernels.api import select
from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_attention.spec import OP, TOLERANCE, Routes, merge
from vivace.testing.interpreter import interpret

BACKENDS = [
    "reference",
    "gather",
    pytest.param("triton", marks=pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 1
    heads: int = 2
    queries: int = 2
    keys: int = 3
    block: int = 16
    dim: int = 16
    shared: bool = False
    sizes: bool = False
    bias: bool = False
    density: float = 0.5


SETTINGS = (
    Setting(batch=2, queries=3, keys=4),
    Setting(batch=2, shared=True, sizes=True),
    Setting(dim=32, sizes=True, bias=True),
    Setting(batch=2, block=32, dim=64, bias=True, density=1.0),
    Setting(heads=1, queries=1, keys=1, density=1.0),
)


def made(s: Setting, dtype: torch.dtype = torch.float64) -> tuple:
    """q, k, v with poison in the slots that hold no token, routes, bias."""
    make = torch.Generator().manual_seed(s.dim + s.keys)
    shapes = ((s.queries, 1), (s.keys, 2), (s.keys, 3))
    q, k, v = (
        torch.randn(s.batch, s.heads, n * s.block, s.dim, generator=make, dtype=torch.float64)
        for n, _ in shapes
    )
    lead = (1, 1) if s.shared else (s.batch, s.heads)
    keep = torch.rand(*lead, s.queries, s.keys, generator=make) < s.density
    if s.queries > 1:
        keep[..., 0, :] = False  # a row that sees nothing at all
    sizes = None
    if s.sizes:
        sizes = torch.randint(0, s.block + 1, (*lead, s.keys), generator=make, dtype=torch.int32)
        gone = (
            (torch.arange(s.block) >= sizes[..., None]).expand(s.batch, s.heads, s.keys, s.block).flatten(2)
        )
        k[gone], v[gone] = math.nan, math.inf
    bias = None
    if s.bias:
        bias = torch.randn(s.batch, s.keys * s.block, generator=make)
        bias[0, : s.block] = -math.inf
    return *(x.to(dtype) for x in (q, k, v)), Routes.of_mask(keep, sizes, s.block), bias, keep


def oracle(q, k, v, keep, sizes, bias, block) -> tuple[torch.Tensor, torch.Tensor]:
    """Query by query, over a list of its keys, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b, h, i in np.ndindex(*q.shape[:3]):
        row = keep[b % keep.shape[0], h % keep.shape[1], i // block]
        seen = []
        for j in row.nonzero()[:, 0].tolist():
            real = block if sizes is None else int(sizes[b % sizes.shape[0], h % sizes.shape[1], j])
            seen += range(j * block, j * block + real)
        if bias is not None:
            seen = [j for j in seen if bias[b, j] > -math.inf]
        if seen:
            s = k[b, h, seen].double() @ q[b, h, i].double() / math.sqrt(q.shape[-1])
            s = s if bias is None else s + bias[b, seen].double()
            lse[b, h, i] = torch.logsumexp(s, 0)
            out[b, h, i] = torch.softmax(s, 0) @ v[b, h, seen].double()
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_values_are_the_oracles(setting, backend) -> None:
    for dtype in DTYPES if setting is SETTINGS[0] else DTYPES[:1]:
        q, k, v, routes, bias, keep = made(setting, dtype)
        want, want_lse = oracle(q, k, v, keep, routes.sizes, bias, setting.block)
        out, lse = block_attention(q, k, v, routes, bias=bias, backend=backend)
        limit = TOLERANCE[str(dtype).removeprefix("torch.")]
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert (out.double() - want).abs().max() < limit
        assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
        assert (lse.double() - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [s for s in SETTINGS if not s.sizes])
def test_gradients_are_those_of_dense_attention(setting, backend) -> None:
    q, k, v, routes, bias, keep = made(setting, torch.float32)
    make = torch.Generator().manual_seed(1)
    go = torch.randn(q.shape, generator=make)
    gl = torch.randn(q.shape[:3], generator=make)
    seen = keep.expand(setting.batch, setting.heads, -1, -1).any(-1).repeat_interleave(setting.block, -1)
    gl = gl * seen  # -inf has no gradient

    def grads(run):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = run(*inputs)
        return torch.autograd.grad((out * go).sum() + (torch.where(seen, lse, 0.0) * gl).sum(), inputs)

    def dense(q, k, v):
        mask = keep.repeat_interleave(setting.block, 2).repeat_interleave(setting.block, 3)
        s = q @ k.transpose(-1, -2) / math.sqrt(setting.dim)
        s = s if bias is None else s + bias[:, None, None]
        s = s.masked_fill(~mask, -1e30) if bias is None else s.masked_fill(~mask, -1e30).clamp(min=-1e30)
        p = torch.softmax(s, -1) * seen[..., None]
        return p @ v, torch.logsumexp(s, -1)

    for mine, theirs in zip(
        grads(lambda *x: block_attention(*x, routes, bias=bias, backend=backend)), grads(dense), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gets_no_gradient_and_gives_none(backend) -> None:
    setting = SETTINGS[1]
    q, k, v, routes, _, _ = made(setting, torch.float32)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = block_attention(*inputs, routes, backend=backend)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.nan_to_num(0.0, 0.0, 0.0).sum(), inputs)
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))
    assert routes.sizes is not None
    gone = torch.arange(setting.block) >= routes.sizes[..., None]
    gone = gone.expand(setting.batch, setting.heads, -1, -1).flatten(2)
    assert not dk[gone].any()
    assert not dv[gone].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_stay_finite(backend) -> None:
    q, k, v, routes, _, keep = made(SETTINGS[0], torch.float32)
    out, _ = block_attention(q * 1e3, k, v, routes, backend=backend)
    want, _ = oracle(q * 1e3, k, v, keep, None, None, SETTINGS[0].block)
    assert (out.double() - want).abs().max() < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_untouched_inputs(backend) -> None:
    q, k, v, routes, _, _ = made(SETTINGS[0], torch.float32)
    want, _ = block_attention(q, k, v, routes, backend=backend)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    kept = [x.clone() for x in turned]
    assert torch.equal(block_attention(*turned, routes, backend=backend)[0], want)
    folded = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.allclose(block_attention(*folded, routes, backend=backend)[0], want, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(turned, kept, strict=True))


def test_results_over_disjoint_lists_merge_to_the_whole() -> None:
    s = Setting(batch=2, queries=3, keys=6, density=0.6)
    q, k, v, routes, _, keep = made(s, torch.float32)
    first = keep & (torch.arange(s.keys) % 2 == 0)
    parts = [block_attention(q, k, v, Routes.of_mask(m, None, s.block)) for m in (first, keep & ~first)]
    out, lse = merge(*parts)
    want, want_lse = block_attention(q, k, v, routes)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_lists_are_masks_and_count_what_is_there() -> None:
    keep = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    sizes = torch.tensor([16, 16, 7, 0, 16], dtype=torch.int32)
    routes = Routes.of_mask(keep, sizes.expand(1, 1, -1).contiguous(), 16)
    assert torch.equal(routes.mask(5), keep)
    queries = torch.tensor([16, 16, 16, 5])
    by_hand = sum(
        int(queries[i]) * int(sizes[j]) for b, h, i, j in np.ndindex(*keep.shape) if keep[b, h, i, j]
    )
    assert routes.pairs(queries, 2, 3) == by_hand
    assert Routes.of_mask(keep[:1, :1], None, 16).pairs(queries, 2, 3) == 6 * sum(
        int(queries[i]) * 16 for i, j in np.ndindex(4, 5) if keep[0, 0, i, j]
    )


def test_one_node_in_a_compiled_graph() -> None:
    q, k, v, routes, _, _ = made(SETTINGS[0], torch.float32)
    compiled = torch.compile(
        lambda q, k, v: block_attention(q * 2, k, v, routes)[0] + 1, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(q, k, v), block_attention(q * 2, k, v, routes)[0] + 1)
    args = (q, k, v, routes.index, routes.count, None, None, routes.block, 0.25, "gather")
    torch.library.opcheck(
        torch.ops.vivace.block_attention.default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[:, :, :-1], k, v), "blocks of 16"),
        (lambda q, k, v: (q, k[:, :1], v), "do not fit"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), "rows and heads"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, says) -> None:
    q, k, v, routes, _, _ = made(SETTINGS[0], torch.float32)
    with pytest.raises(ValueError, match=says):
        block_attention(*change(q, k, v), routes)


def test_the_choice_says_why(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select(OP, device="cpu").name == "gather"
    assert select(OP, device="cuda", block=128, head_dim=128).name == "triton"
    odd = select(OP, device="cuda", block=48, head_dim=128)
    assert odd.name == "gather"
    assert "64 or 128" in odd.why
    with pytest.raises(ConfigError, match="power of two"):
        select(OP, "triton", device="cuda", head_dim=96)


# -- layouts ----------------------------------------------------------------------------------------------------


def test_a_layout_goes_there_and_back() -> None:
    rng = np.random.default_rng(0)
    slots = np.full(4 * 8, -1)
    slots[:27] = rng.permutation(27)
    slots = slots.reshape(4, 8)
    layout = Layout(slots)
    x = torch.randn(2, 27, 3, 5)
    arranged = layout.arrange(x)
    assert arranged.shape == (2, 3, 32, 5)
    for block, slot in np.ndindex(4, 8):
        token = slots[block, slot]
        want = x[:, token] if token >= 0 else torch.zeros(2, 3, 5)
        assert torch.equal(arranged[:, :, block * 8 + slot], want)
    assert torch.equal(layout.restore(arranged), x)
    mean = layout.mean(arranged)
    assert torch.allclose(mean[:, :, 3], x[:, slots[3][slots[3] >= 0]].mean(1), atol=1e-6)
    assert layout.sizes is not None
    assert layout.sizes.flatten().tolist() == [8, 8, 8, 3]


def test_tokens_in_order_are_not_copied() -> None:
    layout = Layout(np.arange(32).reshape(4, 8))
    x = torch.randn(1, 32, 2, 4)
    assert layout.arrange(x).data_ptr() == x.data_ptr()
    assert layout.sizes is None


def test_a_key_mask_becomes_a_bias() -> None:
    layout = Layout(np.array([[2, 0], [1, -1]]))
    mask = torch.tensor([True, False, True])[None, None, None]
    bias = layout.key_bias(mask, 2)
    assert bias is not None
    assert bias[:, :3].tolist() == [[0.0, 0.0, -math.inf]] * 2
    additive = torch.tensor([0.5, -1.0, 2.0])[None, None, None]
    assert layout.key_bias(additive, 1)[:, :3].tolist() == [[2.0, 0.5, -1.0]]  # type: ignore[index]
    with pytest.raises(ValueError, match="key mask"):
        layout.key_bias(torch.ones(1, 1, 3, 3, dtype=torch.bool), 1)


@pytest.mark.parametrize(
    ("slots", "says"), [([[0, 0]], "exactly once"), ([[-1, 0]], "behind"), ([[1, 2]], "once")]
)
def test_impossible_layouts_are_refused(slots, says) -> None:
    with pytest.raises(ValueError, match=says):
        Layout(np.array(slots))
