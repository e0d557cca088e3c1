"""Low-bit attention: both kernels against the arithmetic by hand, against each other, and against exact attention."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vivace.testing.interpreter import interpret

WHY_NOT = interpret()

from vivace.core.errors import ConfigError  # noqa: E402
from vivace.kernels.block_attention.spec import Routes, merge  # noqa: E402
from vivace.kernels.low_bit_attention.op import low_bit_attention, runner  # noqa: E402
from vivace.kernels.low_bit_attention.spec import EMULATED, ERROR, OP, TOLERANCE, choose  # noqa: E402

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")),
]
MODES = list(itertools.product(("int8", "bf16"), ("fp8", "bf16")))


def video_like(seed=0, batch=1, heads=2, tokens=256, dim=64):
    """Neighbouring tokens alike, some channels much larger than others, keys with a large common part."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    smooth = noise(batch, heads, tokens, dim).cumsum(2)
    smooth = smooth / smooth.std()
    q, k, v = (noise(batch, heads, tokens, dim) + part * smooth for part in (1.0, 0.7, 1.0))
    q[..., 3] *= 6.0
    k[..., 3] *= 4.0
    v[..., 5] *= 20.0
    k += 3.0 * noise(1, heads, 1, dim)
    k[..., 7] += 12.0
    return q, k, v


def exact(q, k, v, allowed=None, bias=None):
    """(out, lse) in float64 under a bool mask of tokens that broadcasts to (B, H, SQ, SK)."""
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return (scores - lse[..., None]).exp().nan_to_num(0.0) @ v.double(), lse


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def e4m3_by_hand(x):
    """To the nearest number with three bits behind the leading one, exponents -6 .. 8, halves to even."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.round(x / step) * step, -448.0, 448.0)


def one_block_by_hand(q, k, v, group):
    """The definition for one head of one block of keys, where no running maximum enters: (out, lse)."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    mean = k.mean(0)

    def rows_to_int8(x, group):
        out = np.empty_like(x)
        for start in range(0, len(x), group):
            part = x[start : start + group]
            scale = np.abs(part).max() / 127
            out[start : start + group] = np.round(part / scale) * scale
        return out

    factor = q.shape[1] ** -0.5
    scores = rows_to_int8(q, group) @ rows_to_int8(k - mean, len(k)).T * factor
    top = scores.max(1, keepdims=True)
    p = np.exp(scores - top)
    channel = np.abs(v).max(0) / 448
    out = e4m3_by_hand(448 * p) @ e4m3_by_hand(v / channel) * channel / 448
    lse = top[:, 0] + np.log(p.sum(1)) + (q @ mean) * factor
    return torch.from_numpy(out / p.sum(1, keepdims=True)), torch.from_numpy(lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [32, 0])
def test_is_the_arithmetic_by_hand(backend, group) -> None:
    q, k, v = video_like(tokens=64)
    out, lse = low_bit_attention(q, k, v, group=group, backend=backend)
    for head in range(2):
        want, want_lse = one_block_by_hand(q[0, head], k[0, head], v[0, head], group or 64)
        assert relative(out[0, head], want) < TOLERANCE
        assert relative(want, exact(q, k, v)[0][0, head]) > 3 * TOLERANCE  # so the roundings are seen
        torch.testing.assert_close(lse[0, head].double(), want_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("qk", "pv"), MODES)
@pytest.mark.parametrize("tokens", [192, 150])
def test_stays_near_exact_attention(backend, qk, pv, tokens) -> None:
    q, k, v = video_like(tokens=tokens)
    want, want_lse = exact(q, k, v)
    out, lse = low_bit_attention(q, k, v, qk=qk, pv=pv, backend=backend)
    exactly = qk == pv == "bf16"
    assert relative(out, want) < (1e-5 if exactly else ERROR)
    assert exactly or relative(out, want) > 1e-3
    assert (lse.double() - want_lse).abs().max() < (1e-3 if qk == "bf16" else 0.5)


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")
@pytest.mark.parametrize(
    ("qk", "pv", "dtype"), [(*m, torch.bfloat16) for m in MODES] + [(*MODES[0], torch.float32)]
)
@pytest.mark.parametrize("case", ["dense", "lengths differ", "routes", "padding and bias"])
def test_kernels_agree(case, qk, pv, dtype) -> None:
    q, k, v = (x.to(dtype) for x in video_like(seed=3, batch=2, heads=2, tokens=96, dim=32))
    routes = bias = None
    if case == "lengths differ":
        q = q[:, :, :70]
    elif case != "dense":
        keep = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
        keep[0, 1, 2] = False  # a row that sees nothing
        sizes = None
        if case == "padding and bias":
            sizes = torch.tensor([[[32, 20, 1]]], dtype=torch.int32)
            bias = torch.randn(2, 96, generator=torch.Generator().manual_seed(2))
            bias[1, 40:80] = float("-inf")
        routes = Routes.of_mask(keep, sizes, 32)
    results = [
        low_bit_attention(q, k, v, routes, bias=bias, qk=qk, pv=pv, block=32, backend=b)
        for b in ("reference", "triton")
    ]
    (a, la), (b, lb) = results
    assert a.dtype == b.dtype == dtype
    assert relative(b, a) < TOLERANCE
    torch.testing.assert_close(lb, la, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend) -> None:
    q, k, v = video_like(tokens=128)
    sizes = torch.tensor([[[64, 23]]], dtype=torch.int32)
    routes = Routes.of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), sizes, 64)
    clean = low_bit_attention(q, k, v, routes, backend=backend)
    want, want_lse = exact(q, k[:, :, :87], v[:, :, :87])
    assert relative(clean[0], want) < ERROR
    assert (clean[1].double() - want_lse).abs().max() < 0.5
    k[:, :, 87:], v[:, :, 87:] = float("nan"), float("nan")
    for a, b in zip(clean, low_bit_attention(q, k, v, routes, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_halves_merge_to_the_whole(backend) -> None:
    q, k, v = video_like(tokens=128, dim=32)
    left = torch.tensor([[True, False]]).expand(1, 1, 2, 2)
    halves = [low_bit_attention(q, k, v, Routes.of_mask(m, None, 64), backend=backend) for m in (left, ~left)]
    whole, lse = low_bit_attention(q, k, v, backend=backend)
    out, merged = merge(*halves)
    assert relative(out, whole) < 1e-2
    torch.testing.assert_close(merged, lse, rtol=1e-4, atol=1e-3)


def test_without_the_mean_the_scales_would_be_spoilt() -> None:
    q, k, v = video_like(tokens=128)
    k += 40.0
    out, _ = low_bit_attention(q, k, v, pv="bf16")
    assert relative(out, exact(q, k, v)[0]) < ERROR
    rows = k.unflatten(2, (-1, 32))
    scale = rows.abs().amax((3, 4), keepdim=True) / 127
    assert relative(exact(q, ((rows / scale).round() * scale).flatten(2, 3), v)[0], exact(q, k, v)[0]) > ERROR


def test_rows_do_not_depend_on_their_batch() -> None:
    q, k, v = video_like(batch=2, tokens=96, dim=32)
    both = low_bit_attention(q, k, v, block=32)[0]
    for i in range(2):
        torch.testing.assert_close(
            low_bit_attention(*(x[i : i + 1] for x in (q, k, v)), block=32)[0], both[i : i + 1]
        )


def test_compiles_to_one_node() -> None:
    q, k, v = video_like(tokens=64, dim=32)
    run = torch.compile(
        lambda q, k, v: runner("reference")(q, k, v, None)[0] * 2.0, backend="eager", fullgraph=True
    )
    torch.testing.assert_close(run(q, k, v), runner("reference")(q, k, v)[0] * 2.0)
    torch.library.opcheck(
        torch.ops.vivace.low_bit_attention.default,
        (q, k, v, None, None, None, None, 64, 0.2, "int8", "fp8", 32, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_refusals() -> None:
    q, k, v = video_like(tokens=64, dim=32)
    with pytest.raises(RuntimeError, match="no gradients"):
        low_bit_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        low_bit_attention(q, k, v)
    q = q.detach()
    with pytest.raises(ValueError, match="qk is one of"):
        low_bit_attention(q, k, v, qk="int4")
    with pytest.raises(ValueError, match="does not divide"):
        low_bit_attention(q, k, v, group=48)
    with pytest.raises(ValueError, match="do not fit q"):
        low_bit_attention(q, k, v[:, :, :32])
    with pytest.raises(ValueError, match="bias must be"):
        low_bit_attention(q, k, v, bias=torch.zeros(1, 32))


def test_choice_says_what_runs_and_why(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = choose(device="cpu", head_dim=64)
    assert choice.op == OP
    assert choice.name == "reference"
    assert choice.why.startswith(EMULATED)
    if WHY_NOT:
        return
    hopper, ampere = {"device": "cuda", "capability": (9, 0)}, {"device": "cuda", "capability": (8, 0)}
    assert choose(**hopper, head_dim=128).name == "hopper"
    with pytest.raises(
        ConfigError, match=r'compute capability 8\.9, and this GPU has 8\.0 \(pv="bf16" runs\)'
    ):
        choose(**ampere, head_dim=128)
    assert choose(**ampere, head_dim=128, pv="bf16").name == "triton"
    assert choose("reference", **ampere).why.startswith(EMULATED)
    with pytest.raises(ConfigError, match="head dimension of 32"):
        choose("triton", **hopper, head_dim=16)
