"""Compiled kernels on a GPU against the float64 reference: what the interpreter cannot show."""

from __future__ import annotations

import itertools

import pytest
import torch

from vivace.kernels.api import candidates
from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_attention.spec import OP, TOLERANCE, Routes
from vivace.kernels.block_select.op import select_blocks
from vivace.kernels.cluster_tokens.op import cluster, runner
from vivace.kernels.cluster_tokens.spec import start
from vivace.kernels.column_delta.op import column_attention, column_sums
from vivace.kernels.low_bit_attention import spec as low_bit
from vivace.kernels.low_bit_attention.op import low_bit_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYOUTS = ("B H S D", "B S H D")
LSE = {"hopper": 2e-2, "triton": 2e-2, "gather": 6e-2}
"""Largest error of log-sum-exps. The gathered kernel's scores come out of a matrix product in the dtype of its inputs:
rounded to bfloat16, a score of 16 is off by up to 0.03 before anything is summed."""
FP8 = 8e-3
"""Relative distance of FP8 products on tensor cores, which add in fewer bits than float32, from the emulation:
.0057 where a row sees few keys, and one probability that rounds the other way stands out."""


def call(block: int, dim: int, sizes: bool, bias: bool, layout: str, blocks: int = 9) -> tuple:
    """A structured call: heads with outlier channels, keys with a common offset, rows that see nothing."""
    make = torch.Generator("cuda").manual_seed(block + dim)
    shape = (2, 3, blocks * block, dim)
    q, k, v = (torch.randn(shape, generator=make, device="cuda") for _ in range(3))
    k = k + 2.0 * torch.randn(1, 3, 1, dim, generator=make, device="cuda")
    q[..., ::17] *= 4.0
    if layout == "B S H D":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    keep = torch.rand(2, 3, blocks, blocks, generator=make, device="cuda") < 0.5
    keep[:, :, 1] = False
    real = None
    if sizes:
        real = torch.randint(0, block + 1, (1, 1, blocks), generator=make, device="cuda", dtype=torch.int32)
    extra = torch.randn(2, blocks * block, generator=make, device="cuda") if bias else None
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), Routes.of_mask(keep, real, block), extra


def able(name: str, block: int, dim: int, op: str = OP, **more: str) -> bool:
    context = {"device": "cuda", "block": block, "head_dim": dim, "dtype": "bfloat16", **more}
    return next(c for c in candidates(op) if c.name == name).refuse(context) is None


@pytest.mark.parametrize("backend", ["hopper", "triton", "gather"])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (64, 128), (128, 64), (128, 128)])
def test_forward_is_the_references(backend, block, dim) -> None:
    if not able(backend, block, dim):
        pytest.skip(f"{backend} refuses this GPU or shape")
    for sizes, bias, layout in itertools.product((False, True), (False, True), LAYOUTS):
        q, k, v, routes, extra = call(block, dim, sizes, bias, layout)
        want, want_lse = block_attention(
            q.double(), k.double(), v.double(), routes, bias=extra, backend="reference"
        )
        out, lse = block_attention(q, k, v, routes, bias=extra, backend=backend)
        scale = want.abs().amax()
        assert (out.double() - want).abs().max() < TOLERANCE["bfloat16"] * scale
        assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
        assert (lse - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < LSE[backend]


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (64, 128), (128, 128)])
def test_gradients_are_the_gathered_kernels(backend, block, dim) -> None:
    if not able(backend, block, dim):
        pytest.skip(f"{backend} refuses this GPU or shape")
    q, k, v, routes, _ = call(block, dim, True, False, "B H S D", blocks=4)
    make = torch.Generator("cuda").manual_seed(1)
    go = torch.randn(q.shape, generator=make, device="cuda")

    def grads(inputs, name):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        out, _ = block_attention(*inputs, routes, backend=name)
        return torch.autograd.grad((out * go).sum(), inputs)

    wide = grads([x.float() for x in (q, k, v)], "gather")
    for mine, theirs in zip(grads((q, k, v), backend), wide, strict=True):
        assert float((mine.float() - theirs).norm() / theirs.norm()) < 2e-2


def test_selection_is_the_references() -> None:
    make = torch.Generator("cuda").manual_seed(2)
    scores = torch.randn(2, 4, 500, 500, generator=make, device="cuda")
    for top, mass, softmax in ((50, 0.0, True), (0, 0.9, True), (3, 0.5, True), (0, 0.4, False)):
        given = scores if softmax else torch.softmax(3 * scores, -1)
        mine, theirs = (select_blocks(given, top, mass, None, 4, softmax, b) for b in ("triton", "reference"))
        # Sums in another order may end one block sooner or later.
        assert ((mine[1] - theirs[1]).abs() <= 1).all()
        assert (mine[1] == theirs[1]).float().mean() > 0.99
        if not mass:
            assert torch.equal(mine[0][..., : top + 4], theirs[0][..., : top + 4])


def video_like(tokens: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v in bfloat16 (2, 3, S, D): neighbours alike, outlier channels, keys with a large common part."""
    make = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, device="cuda")

    smooth = noise(2, 3, tokens, dim).cumsum(2)
    smooth = smooth / smooth.std()
    q, k, v = (noise(2, 3, tokens, dim) + part * smooth for part in (1.0, 0.7, 1.0))
    q[..., 3] *= 6.0
    k[..., 3] *= 4.0
    v[..., 5] *= 20.0
    k += 3.0 * noise(1, 3, 1, dim)
    k[..., 7] += 12.0
    return [x.bfloat16() for x in (q, k, v)]


def exact(q, k, v, allowed=None, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64 under a bool mask that broadcasts to (B, H, SQ, SK)."""
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    return (scores - lse[..., None]).exp().nan_to_num(0.0) @ v.double(), lse


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("backend", "pv"), [("hopper", "fp8"), ("triton", "fp8"), ("triton", "bf16")])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (64, 128), (128, 64), (128, 128)])
@pytest.mark.parametrize("case", ["dense", "odd length", "routes", "sizes and bias"])
def test_low_bit_attention_is_its_emulation_and_near_exact(case, block, dim, backend, pv) -> None:
    if not able(backend, block, dim, low_bit.OP, pv=pv):
        pytest.skip("this GPU is not the one, or does not have the number formats")
    blocks = 7
    q, k, v = video_like(blocks * block, dim)
    routes = bias = allowed = None
    if case == "odd length":
        q, k, v = q[:, :, :-3], k[:, :, :-21], v[:, :, :-21]
    elif case != "dense":
        make = torch.Generator("cuda").manual_seed(1)
        keep = torch.rand(2, 3, blocks, blocks, generator=make, device="cuda") < 0.5
        keep[0, 1, 2] = False  # a row that sees nothing
        allowed = keep.repeat_interleave(block, 2).repeat_interleave(block, 3)
        sizes = None
        if case == "sizes and bias":
            sizes = torch.tensor(
                [[[block, 20, 1, 0, block, block - 1, 33]]], dtype=torch.int32, device="cuda"
            )
            real = torch.arange(block, device="cuda") < sizes[0, 0, :, None]
            allowed = allowed & real.flatten()
            bias = torch.randn(2, blocks * block, generator=make, device="cuda")
            bias[1, 40:80] = float("-inf")
        routes = Routes.of_mask(keep, sizes, block)
    (out, lse), (emulated, known) = (
        low_bit_attention(q, k, v, routes, bias=bias, pv=pv, block=block, backend=b)
        for b in (backend, "reference")
    )
    want, want_lse = exact(q, k, v, allowed, bias)
    assert out.dtype == torch.bfloat16
    assert relative(out, emulated) < (FP8 if pv == "fp8" else low_bit.TOLERANCE)
    # These tensors are hard to round: the emulation itself may be beyond the bound for those of real models.
    assert 1e-3 < relative(out, want) < max(low_bit.ERROR, 1.05 * relative(emulated, want))
    assert relative(emulated, want) < 2 * low_bit.ERROR
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    # Means that are summed in another order round a key apart now and then.
    off = (lse - known).nan_to_num(0.0, 0.0, 0.0).abs()
    assert (off < 5e-3).double().mean() > 0.98
    assert off.max() < 0.5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("block", "dim"), [(64, 64), (64, 128), (128, 128)])
def test_column_delta_is_attention_in_float64(block, dim, bias) -> None:
    make = torch.Generator("cuda").manual_seed(3)
    queries, keys, scale = 5 * block, 333, dim**-0.5
    q, k, v = (
        torch.randn(2, 3, n, dim, generator=make, device="cuda").bfloat16() for n in (queries, keys, keys)
    )
    added = torch.randn(2, keys, generator=make, device="cuda") if bias else None
    if added is not None:
        added[1, ::2] = float("-inf")
    draws = torch.rand(2, 3, 5, keys, generator=make, device="cuda")
    for number in (1, 70, keys):
        index = draws.argsort(-1)[..., :number].sort(-1).values.to(torch.int32)
        chosen = torch.zeros(2, 3, 5, keys, dtype=torch.bool, device="cuda").scatter_(-1, index.long(), True)
        want, want_lse = exact(q, k, v, chosen.repeat_interleave(block, 2), added)
        out, lse = column_attention(q, k, v, index, scale, added, "triton")
        assert (out.double() - want).abs().max() < 2e-2 * want.abs().max()
        assert torch.equal(lse.isneginf(), want_lse.isneginf())
        assert (lse - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 5e-3
    scores = q.double() @ k.double().mT * scale
    scores = scores if added is None else scores + added.double()[:, None, None]
    lse = torch.logsumexp(scores, -1)
    lse[:, :, 50:60] = float("inf")  # these count nothing
    want = (scores - lse[..., None]).exp().unflatten(2, (-1, block)).sum(3)
    got = column_sums(q, k, lse.float(), block, scale, added, "triton")
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("slots", "clusters", "dim"), [(5003, 300, 128), (5003, 1, 64), (2048, 1000, 128)])
def test_clusters_are_nearest_and_means(slots, clusters, dim, dtype) -> None:
    x = torch.cat([y.to(dtype) for y in video_like(slots, dim, seed=5)[:2]], 1)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)  # as models have it
    gone = torch.zeros(slots, dtype=torch.bool, device="cuda")
    gone[-29:] = True
    first = start(x, clusters, slots - 29)
    for backend in ("triton", "reference"):
        labels, order, centres = cluster(x, first, 1, gone, backend)
        assert (labels[..., -29:] == clusters).all()
        mine, near = labels[..., :-29].long(), x[:, :, :-29].double()
        assert ((mine >= 0) & (mine < clusters)).all()
        apart = torch.cdist(near, first.to(dtype).double()).square()
        off = apart.gather(-1, mine[..., None])[..., 0] - apart.amin(-1)
        assert (off <= 1e-4 * near.square().sum(-1)).all()
        assert torch.equal(order.long(), torch.argsort(labels, dim=-1, stable=True))
        member = torch.nn.functional.one_hot(mine, clusters).double()
        counts = member.sum(2)[..., None]
        means = torch.where(counts > 0, member.mT @ near / counts.clamp(min=1), first.double())
        torch.testing.assert_close(centres.double(), means, rtol=1e-4, atol=1e-4)
    runs = [cluster(x, first, 3, gone, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_identical_tokens_and_permutations() -> None:
    x = torch.ones(2, 3, 5003, 64, device="cuda", dtype=torch.bfloat16)
    labels, order, _ = cluster(
        x, start(x, 10, 5003), 2, torch.zeros(5003, dtype=torch.bool, device="cuda"), "triton"
    )
    assert not labels.any()
    assert torch.equal(order, torch.arange(5003, dtype=torch.int32, device="cuda").expand(2, 3, -1))
    x = torch.randn(2, 3, 5003, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    order = torch.rand(2, 3, 4900, device="cuda").argsort(-1).to(torch.int32)
    fast, plain = runner("triton")(), runner("reference")()
    assert torch.equal(fast.take(x, order), plain.take(x, order))
    assert torch.equal(fast.put(x, order), plain.put(x, order))
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad((fast.take(x, order) * weights).sum(), x)
    assert torch.equal(grad, plain.put(weights, order))
