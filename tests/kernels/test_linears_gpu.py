"""8-bit products and the rounding before them on a GPU: against the reference, at sizes that fill and that do not."""

from __future__ import annotations

import pytest
import torch

from vivace.kernels.api import candidates
from vivace.kernels.quantise_rows.op import quantise_rows
from vivace.kernels.quantise_rows.spec import Before
from vivace.kernels.scaled_matmul.op import scaled_matmul
from vivace.kernels.scaled_matmul.spec import OP, After

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = [(1000, 1536, 1536), (130, 8960, 1536), (70, 1536, 8960), (1, 128, 160), (300, 264, 48)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("columns", [48, 1536, 8960, 13_824])
@pytest.mark.parametrize("case", ["plain", "modulated", "affine", "gelu"])
def test_rows_are_rounded_as_by_the_reference(kind, columns, case) -> None:
    b, s = 2, 37
    x = draw(b, s, columns)
    x[0, 3] = 0.0
    vector = draw(columns, seed=1, dtype=torch.float32)
    modulation = draw(2, b, 1, columns, seed=2, dtype=torch.float32)
    f = {
        "plain": Before(),
        "modulated": Before("layer", 1e-6, scale=modulation[0], shift=modulation[1]),
        "affine": Before("rms", 1e-6, vector),
        "gelu": Before(gelu=True),
    }[case]
    (want, by), (got, own) = (quantise_rows(x, kind, f, name) for name in ("reference", "triton"))
    assert torch.allclose(own, by, rtol=1e-4)
    assert relative(got.float() * own[..., None], want.float() * by[..., None]) < 4e-3
    assert (got.float() != want.float()).float().mean() < 0.02


@pytest.mark.parametrize("backend", ["hopper", "triton", "vendor"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["plain", "gelu", "residual", "gated"])
def test_products_are_the_references(backend, kind, size, case) -> None:
    m, n, k = size
    context = {"device": "cuda", "kind": kind, "columns": k, "features": n}
    if reason := next(c for c in candidates(OP) if c.name == backend).refuse(context):
        pytest.skip(reason)
    (a, sa), (b, sb) = (quantise_rows(draw(1, rows, k, seed=rows), kind) for rows in (m, n))
    residual, runs = draw(m, n, seed=3), 2 if m % 2 == 0 else 1
    after = {
        "plain": After(),
        "gelu": After(gelu=True),
        "residual": After(residual=residual),
        "gated": After(residual=residual, gate=draw(runs, n, seed=4, dtype=torch.float32)),
    }[case]
    bias = None if case == "plain" else draw(n, seed=5)
    scales = sa[0] / k**0.5, sb[0]
    want = scaled_matmul(a[0], scales[0], b[0], scales[1], bias, after, torch.float32)
    got = scaled_matmul(a[0], scales[0], b[0], scales[1], bias, after, torch.bfloat16, backend)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < (4e-3 if kind == "int8" else 6e-3)


def test_integers_beyond_what_float32_counts() -> None:
    k = 2064
    a = torch.full((64, k), 127, dtype=torch.int8, device="cuda")
    one = torch.full((64,), 2.0**-14, device="cuda")
    for backend in ("hopper", "triton", "vendor"):
        context = {"device": "cuda", "kind": "int8", "columns": k, "features": 64}
        if next(c for c in candidates(OP) if c.name == backend).refuse(context):
            continue
        y = scaled_matmul(a, one, a, torch.ones_like(one), None, After(), torch.bfloat16, backend)
        assert torch.equal(y, torch.full_like(y, 127 * 127 * k * 2.0**-14)), backend


@pytest.mark.parametrize("group", [0, 32, 64])
def test_grouped_integers_multiply_on_a_gpu(group) -> None:
    from vivace.kernels.quant_linear import int_mm, reference
    from vivace.kernels.quant_linear.spec import Recipe

    layer = torch.nn.Linear(256, 96, device="cuda", dtype=torch.bfloat16)
    recipe = Recipe(weights="int4", activations="int4", group=group)
    x = draw(1, 70, 256)
    with torch.no_grad():
        want, got = (module.quantise(layer, recipe)(x) for module in (reference, int_mm))
    assert relative(got, want) < 4e-3
