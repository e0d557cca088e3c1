"""Rounding rows to 8 bits with what stands before it: every backend against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vivace.kernels.quantise_rows.op import quantise_rows
from vivace.kernels.quantise_rows.spec import LARGEST, Before
from vivace.testing.interpreter import interpret

BACKENDS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")),
]


def before_of(case: str, b: int, s: int, k: int) -> Before:
    make = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    return {
        "plain": Before(),
        "layer": Before("layer", 1e-6),
        "rms": Before("rms", 1e-5, draw(k)),
        "affine": Before("layer", 1e-5, draw(k), draw(k)),
        "modulated": Before("layer", 1e-6, scale=draw(b, 1, k), shift=draw(b, 1, k)),
        "modulated by token": Before("rms", 1e-6, draw(k), scale=draw(b, s, k), shift=draw(b, s, k)),
        "gelu": Before(gelu=True),
    }[case]


def by_hand(x: torch.Tensor, f: Before) -> np.ndarray:
    y = x.double().numpy()
    if f.gelu:
        return 0.5 * y * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (y + 0.044715 * y**3)))
    if f.norm == "layer":
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + f.eps)
    elif f.norm == "rms":
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + f.eps)
    if f.weight is not None:
        y = y * f.weight.double().numpy()
    if f.bias is not None:
        y = y + f.bias.double().numpy()
    if f.scale is not None and f.shift is not None:
        y = y * (1.0 + f.scale.double().numpy()) + f.shift.double().numpy()
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(
    "case", ["plain", "layer", "rms", "affine", "modulated", "modulated by token", "gelu"]
)
def test_codes_stand_for_the_rows(backend, kind, case) -> None:
    b, s, k = 2, 5, 40
    x = 3.0 * torch.randn(b, s, k, generator=torch.Generator().manual_seed(1))
    x[0, 2] = 0.0
    x[1, 1, 7] = 400.0
    f = before_of(case, b, s, k)
    codes, scale = quantise_rows(x, kind, f, backend)
    assert codes.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assert (codes.shape, scale.shape) == (x.shape, (b, s))
    want = by_hand(x, f)
    largest = np.abs(want).max(-1)
    live = largest > 1e-9
    assert np.allclose(scale.numpy()[live], largest[live] / LARGEST[kind], rtol=1e-5)
    got = codes.double().numpy() * scale.double().numpy()[..., None]
    # Half a step: of the row's scale in int8, of the number itself in e4m3 (with the subnormal step for small ones).
    step = 0.5 * scale.double().numpy()[..., None]
    bound = step if kind == "int8" else np.maximum(np.abs(want) / 16.0, step * 2.0**-9)
    assert (np.abs(got - want) <= bound * 1.001 + 1e-6).all()
    assert np.abs(codes.double().numpy()[live]).max(-1).min() == LARGEST[kind]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_know_nothing_of_each_other(backend) -> None:
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2))
    f = before_of("modulated", 2, 6, 24)
    whole, scale = quantise_rows(x, "int8", f, backend)
    assert f.scale is not None
    assert f.shift is not None
    alone = Before("layer", 1e-6, scale=f.scale[1:], shift=f.shift[1:])
    part, own = quantise_rows(x[1:, 2:4], "int8", alone, backend)
    assert torch.equal(part, whole[1:, 2:4])
    assert torch.equal(own, scale[1:, 2:4])


@pytest.mark.skipif(bool(interpret()), reason=interpret() or "runs")
@pytest.mark.parametrize("case", ["plain", "layer", "modulated", "gelu"])
def test_triton_rounds_as_the_reference(case) -> None:
    x = torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    f = before_of(case, 1, 9, 96)
    (a, sa), (b, sb) = (quantise_rows(x, "int8", f, name) for name in ("reference", "triton"))
    assert torch.allclose(sa, sb, rtol=1e-5)
    # Sums in another order may move a number that lies between two codes.
    assert (a.int() - b.int()).abs().max() <= 1
    assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "int4"}, "kind is one of"),
        ({"before": Before("group")}, "norm is one of"),
        ({"before": Before(weight=torch.ones(8))}, "belongs to a norm"),
        ({"before": Before("rms", scale=torch.ones(1, 1, 8))}, "together"),
        ({"before": Before(scale=torch.ones(2, 1, 8), shift=torch.ones(2, 1, 8))}, "scale must be"),
        ({"before": Before("layer", gelu=True)}, "stands alone"),
    ],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    with pytest.raises(ValueError, match=says):
        quantise_rows(torch.zeros(1, 3, 8), **{"kind": "int8", **change})


def test_gradients_are_refused_and_fakes_have_the_shapes() -> None:
    with pytest.raises(RuntimeError, match="no gradients"):
        quantise_rows(torch.zeros(1, 3, 8, requires_grad=True))
    torch.library.opcheck(
        torch.ops.vivace.quantise_rows.default,
        (torch.randn(1, 3, 8), "int8", "rms", 1e-6, None, None, None, None, False, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
