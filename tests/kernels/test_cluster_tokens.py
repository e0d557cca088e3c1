"""k-means of tokens against Lloyd's algorithm written out in float64, and the permutations that go with it."""

from __future__ import annotations

import pytest
import torch

from vivace.testing.interpreter import interpret

WHY_NOT = interpret()

from vivace.kernels.api import select  # noqa: E402
from vivace.kernels.cluster_tokens import reference  # noqa: E402
from vivace.kernels.cluster_tokens.op import cluster, permute, runner  # noqa: E402
from vivace.kernels.cluster_tokens.spec import OP, start  # noqa: E402

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")),
]


def tokens(slots, batch=2, heads=2, dim=16, dtype=torch.float32, seed=0):
    """Tokens in clear groups that are scattered."""
    make = torch.Generator().manual_seed(seed)
    groups = 4.0 * torch.randn(7, dim, generator=make)
    which = torch.randint(7, (batch, heads, slots), generator=make)
    return (groups[which] + torch.randn(batch, heads, slots, dim, generator=make)).to(dtype)


def lloyd(x, centres, iterations, gone):
    """The same in float64, one head and one token after the other; centres are rounded as x is before each product."""
    labels = torch.full(x.shape[:3], centres.shape[2], dtype=torch.int32)
    centres = centres.double()
    for _ in range(iterations):
        for b, h in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
            rounded = centres[b, h].to(x.dtype).double()
            for s in (~gone).nonzero()[:, 0].tolist():
                apart = (x[b, h, s].double() - rounded).square().sum(-1)
                labels[b, h, s] = apart.argmin()
            for c in range(centres.shape[2]):
                mine = labels[b, h] == c
                if mine.any():
                    centres[b, h, c] = x[b, h, mine].double().mean(0)
    return labels, centres.float()


def check_order(labels, order):
    """Sorted by label, equal ones as they stood, none lost."""
    want = torch.argsort(labels, dim=-1, stable=True).to(torch.int32)
    assert torch.equal(order, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("slots", "clusters", "iterations"), [(1, 1, 1), (37, 1, 2), (128, 5, 2), (301, 70, 1), (211, 6, 3)]
)
def test_is_lloyds_algorithm(backend, dtype, slots, clusters, iterations) -> None:
    x = tokens(slots, dtype=dtype)
    gone = torch.zeros(slots, dtype=torch.bool)
    gone[slots // 2 + 1 :: 9] = True
    first = start(x, clusters, slots)
    labels, order, centres = select(OP, backend, device="cpu").run().cluster(x, first, iterations, gone)
    want, moved = lloyd(x, first, iterations, gone)
    assert labels.dtype == order.dtype == torch.int32
    assert torch.equal(labels, want)
    torch.testing.assert_close(centres, moved, rtol=1e-5, atol=1e-5)
    check_order(labels, order)
    assert torch.equal(first, start(x, clusters, slots))  # not written over


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(128, torch.float32), (256, torch.float32), (256, torch.bfloat16)]
)
def test_wide_rows_go_in_smaller_tiles(backend, dim, dtype) -> None:
    x, gone = tokens(101, batch=1, dim=dim, dtype=dtype), torch.zeros(101, dtype=torch.bool)
    first = start(x, 35, 101)
    labels, order, centres = cluster(x, first, 2, gone, backend)
    want, moved = lloyd(x, first, 2, gone)
    assert torch.equal(labels, want)
    torch.testing.assert_close(centres, moved, rtol=1e-5, atol=1e-5)
    check_order(labels, order)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_cluster_stays_and_what_is_gone_is_no_token(backend) -> None:
    x = torch.zeros(1, 1, 5, 16)
    x[0, 0, :, 3] = torch.tensor([11.0, 0.0, 1.0, 10.0, float("nan")])
    first = torch.zeros(1, 1, 3, 16)
    first[0, 0, :, 3] = torch.tensor([0.0, -900.0, 12.0])
    gone = torch.tensor([False, False, False, False, True])
    labels, order, centres = cluster(x, first, 2, gone, backend)
    assert labels.flatten().tolist() == [2, 0, 0, 2, 3]
    assert order.flatten().tolist() == [1, 2, 0, 3, 4]
    assert centres[0, 0, :, 3].tolist() == [0.5, -900.0, 10.5]
    assert not centres[..., 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_tokens_go_to_the_first_centre(backend) -> None:
    """More of them than one program sums."""
    x = torch.ones(1, 2, 1300, 16) * torch.tensor([1.0, -2.5])[:, None, None]
    labels, order, centres = cluster(x, start(x, 3, 1300), 2, torch.zeros(1300, dtype=torch.bool), backend)
    assert not labels.any()
    assert torch.equal(order, torch.arange(1300, dtype=torch.int32).expand(1, 2, -1))
    torch.testing.assert_close(centres, x[:, :, :3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_clusters_beside_small_ones(backend) -> None:
    """Sums in several parts, in the middle and at the end of the centres."""
    make = torch.Generator().manual_seed(3)
    place = torch.tensor([0, 40, 80, 120])
    which = torch.multinomial(torch.tensor([0.5, 0.01, 0.45, 0.04]), 2600, replacement=True, generator=make)
    x = torch.randn(1, 1, 2600, 16, generator=make) + place[which][None, None, :, None]
    first = place[None, None, :, None].expand(1, 1, 4, 16).float()
    labels, order, centres = cluster(x, first, 1, torch.zeros(2600, dtype=torch.bool), backend)
    assert torch.equal(labels[0, 0], which.to(torch.int32))
    check_order(labels, order)
    for c in range(4):
        torch.testing.assert_close(
            centres[0, 0, c].double(), x[0, 0, which == c].double().mean(0), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 6e4), (torch.bfloat16, 1e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_huge_values(backend, dtype, size) -> None:
    """Products beyond float16 are still told apart; beyond float32, everything is still in range."""
    make = torch.Generator().manual_seed(4)
    which = torch.randint(3, (1, 2, 200), generator=make)
    corner = torch.eye(16)[:3] * size
    x = (corner[which] * (1.0 - 0.1 * torch.rand(1, 2, 200, 1, generator=make))).to(dtype)
    first = corner.expand(1, 2, 3, 16).contiguous()
    labels, order, centres = cluster(x, first, 2, torch.zeros(200, dtype=torch.bool), backend)
    check_order(labels, order)
    if size < 1e10:
        assert torch.equal(labels, which.to(torch.int32))
        assert centres.isfinite().all()
    else:
        assert ((labels >= 0) & (labels < 3)).all()


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it runs")
def test_a_view_of_tokens_in_another_layout() -> None:
    """Models give (B, S, H, D), seen as (B, H, S, D): no copy is needed, and nothing changes."""
    x = tokens(150).transpose(1, 2).contiguous().transpose(1, 2)
    gone = torch.zeros(150, dtype=torch.bool)
    made = cluster(x, start(x, 9, 150), 2, gone, "triton")
    again = cluster(x.contiguous(), start(x, 9, 150), 2, gone, "triton")
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_parts_of_the_tokens_at_a_time_change_nothing(monkeypatch) -> None:
    x, gone = tokens(90), torch.zeros(90, dtype=torch.bool)
    whole = cluster(x, start(x, 5, 90), 3, gone)
    monkeypatch.setattr(reference, "MOST", 2 * 2 * 5 * 7)
    parts = cluster(x, start(x, 5, 90), 3, gone)
    assert torch.equal(parts[0], whole[0])
    torch.testing.assert_close(parts[2], whole[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", [0, 1, 130, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_take_and_put(backend, moved, dtype) -> None:
    x = tokens(200, dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    draws = torch.rand(2, 2, moved, generator=torch.Generator().manual_seed(5))
    order = draws.argsort(-1).to(torch.int32)
    run = runner(backend)()
    taken, put = run.take(x, order), run.put(x, order)
    assert taken.is_contiguous()
    assert put.is_contiguous()
    for b, h, i in [(0, 0, 0), (0, 1, 77), (1, 0, 131), (1, 1, 199)]:
        j = int(order[b, h, i]) if i < moved else i
        assert torch.equal(taken[b, h, i], x[b, h, j])
        assert torch.equal(put[b, h, j], x[b, h, i])
    assert torch.equal(run.put(taken, order), x)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    for result, inverse in ((taken, run.put), (put, run.take)):
        (grad,) = torch.autograd.grad((result * weights).sum(), x)
        assert torch.equal(grad, inverse(weights, order))


def test_compiled_code_sees_one_operation() -> None:
    x, gone = tokens(40), torch.zeros(40, dtype=torch.bool)
    first = start(x, 3, 40)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in cluster(x, first, 1, gone)]
        made = cluster(mode.from_tensor(x), first, 1, gone)
        moved = permute(mode.from_tensor(x), mode.from_tensor(fakes[1]))
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in fakes]
    assert (moved.shape, moved.dtype) == (x.shape, x.dtype)


def test_choice_and_refusals() -> None:
    assert select(OP, device="cpu", head_dim=64, block=16).name == "reference"
    assert select(OP, device="cuda", head_dim=128, block=48, dtype="bfloat16").name == "triton"
    assert "power of two" in select(OP, device="cuda", head_dim=96).why
    x, gone = tokens(40), torch.zeros(40, dtype=torch.bool)
    first = start(x, 3, 40)
    with pytest.raises(ValueError, match="at least one iteration"):
        cluster(x, first, 0, gone)
    with pytest.raises(ValueError, match="centres must be"):
        cluster(x, first[..., :8], 1, gone)
    with pytest.raises(ValueError, match="gone must be"):
        cluster(x, first, 1, gone[:7])
    with pytest.raises(ValueError, match="does not fit"):
        permute(x, torch.zeros(2, 2, 41, dtype=torch.int32))
