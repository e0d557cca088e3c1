"""Compiled kernels on a GPU against the float64 reference: what the interpreter cannot show."""

from __future__ import annotations

import itertools

import pytest
import torch

from vivace.kernels.api import candidates
from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_attention.spec import OP, TOLERANCE, Routes
from vivace.kernels.block_select.op import select_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYOUTS = ("B H S D", "B S H D")


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


def able(name: str, block: int, dim: int) -> bool:
    context = {"device": "cuda", "block": block, "head_dim": dim, "dtype": "bfloat16"}
    return next(c for c in candidates(OP) if c.name == name).refuse(context) is None


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
        assert (lse - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 2e-2


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
