"""Products of 8-bit codes with what follows them: every backend against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.kernels.api import candidates
from vivace.kernels.quantise_rows.op import quantise_rows
from vivace.kernels.scaled_matmul.op import scaled_matmul
from vivace.kernels.scaled_matmul.spec import OP, After
from vivace.testing.interpreter import interpret

BACKENDS = [
    "reference",
    "vendor",
    pytest.param("triton", marks=pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")),
]
SHAPES = [(33, 24, 32), (70, 136, 160), (1, 8, 16)]


def call(m: int, n: int, k: int, kind: str) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(m + n + k)
    x, w = torch.randn(1, m, k, generator=make), torch.randn(1, n, k, generator=make) / k**0.5
    (a, sa), (b, sb) = (quantise_rows(t, kind) for t in (x, w))
    return a[0], sa[0], b[0], sb[0], torch.randn(n, generator=make)


def after_of(case: str, m: int, n: int) -> After:
    make = torch.Generator().manual_seed(7)
    residual = torch.randn(m, n, generator=make)
    runs = 3 if m % 3 == 0 else 1
    return {
        "plain": After(),
        "gelu": After(gelu=True),
        "residual": After(residual=residual),
        "gated": After(residual=residual, gate=torch.randn(runs, n, generator=make)),
    }[case]


def by_hand(a, a_scale, b, b_scale, bias, g: After) -> np.ndarray:
    y = a.double().numpy() @ b.double().numpy().T
    y = y * a_scale.double().numpy()[:, None] * b_scale.double().numpy()
    if bias is not None:
        y = y + bias.double().numpy()
    if g.gelu:
        return 0.5 * y * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (y + 0.044715 * y**3)))
    if g.gate is not None:
        y = y * np.repeat(g.gate.double().numpy(), len(y) // len(g.gate), 0)
    return y if g.residual is None else g.residual.double().numpy() + y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["plain", "gelu", "gated"])
def test_products_and_what_follows(backend, kind, shape, case) -> None:
    m, n, k = shape
    if backend == "vendor" and kind == "fp8":
        pytest.skip("torch._scaled_mm by rows needs a GPU")
    a, sa, b, sb, bias = call(m, n, k, kind)
    g = after_of(case, m, n)
    y = scaled_matmul(a, sa, b, sb, None if case == "plain" else bias, g, torch.float32, backend)
    want = by_hand(a, sa, b, sb, None if case == "plain" else bias, g)
    assert y.shape == (m, n)
    assert y.dtype == torch.float32
    assert np.abs(y.numpy() - want).max() < 2e-5 * (1.0 + np.abs(want).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_sums_are_exact(backend) -> None:
    """127 * 127 * K passes what float32 can count to; int32 does not."""
    k = 2064
    a, b = torch.full((17, k), 127, dtype=torch.int8), torch.full((8, k), -127, dtype=torch.int8)
    b[0] = 127
    y = scaled_matmul(a, torch.ones(17), b, torch.ones(8), None, After(), torch.float32, backend)
    assert torch.equal(y[:, 0], torch.full((17,), float(127 * 127 * k)))
    assert torch.equal(y[:, 1], torch.full((17,), -float(127 * 127 * k)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a": torch.zeros(4, 16)}, "must both be"),
        ({"a": torch.zeros(4, 32, dtype=torch.int8)}, "must be"),
        ({"a_scale": torch.ones(3)}, "scales must be"),
        ({"bias": torch.ones(3)}, "bias must be"),
        ({"after": After(gelu=True, residual=torch.zeros(4, 8))}, "stands alone"),
        ({"after": After(residual=torch.zeros(3, 8))}, "residual must be"),
        ({"after": After(gate=torch.zeros(1, 8))}, "gate comes with"),
    ],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    good = {"a": torch.zeros(4, 16, dtype=torch.int8), "a_scale": torch.ones(4)}
    good |= {"b": torch.zeros(8, 16, dtype=torch.int8), "b_scale": torch.ones(8)}
    with pytest.raises(ValueError, match=says):
        scaled_matmul(**{**good, **change})


def test_candidates_say_why_they_cannot_run() -> None:
    by_name = {c.name: c for c in candidates(OP)}
    old = {"device": "cuda", "capability": (8, 0), "kind": "fp8", "columns": 1536, "features": 1536}
    assert "8.9" in str(by_name["triton"].refuse(old))
    assert "8.9" in str(by_name["vendor"].refuse(old))
    assert "Hopper" in str(by_name["hopper"].refuse(old))
    assert by_name["triton"].refuse({**old, "kind": "int8"}) is None
    new = {**old, "capability": (9, 0)}
    assert [by_name[n].refuse(new) for n in ("hopper", "triton", "vendor")] == [None] * 3
    assert "multiples" in str(by_name["hopper"].refuse({**new, "columns": 24}))
