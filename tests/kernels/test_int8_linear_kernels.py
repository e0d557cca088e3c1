"""Int8 linear layers against exact integer arithmetic."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from vivace.core.errors import ConfigError
from vivace.kernels.api import select
from vivace.kernels.int8_linear import int_mm, reference, torchao
from vivace.kernels.int8_linear.spec import MODES, OP

IMPLEMENTATIONS = {"int_mm": int_mm, "torchao": torchao, "reference": reference}
SUPPORTED = [
    (name, mode) for name in IMPLEMENTATIONS for mode in MODES if (name, mode) != ("int_mm", "weight_only")
]


def layer(k: int = 48, n: int = 24, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def by_the_book(x: torch.Tensor, linear: nn.Linear, mode: str, span: float) -> torch.Tensor:
    """The definition, row by row in float64 with Python's rounding. `span`: codes from zero to the largest value."""

    def rounded(row: torch.Tensor) -> torch.Tensor:
        scale = row.abs().max().item() / span
        codes = [max(-128, min(127, round(v / scale))) for v in row.tolist()]
        return torch.tensor(codes, dtype=torch.float64) * scale

    weight = torch.stack([rounded(row) for row in linear.weight.double()])
    rows = x.double().reshape(-1, x.shape[-1])
    if mode == "dynamic":
        rows = torch.stack([rounded(row) for row in rows])
    out = rows @ weight.T + (0 if linear.bias is None else linear.bias.double())
    return out.view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("name", "mode"), SUPPORTED)
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_definition(name, mode, bias) -> None:
    linear = layer(bias=bias)
    x = torch.randn(2, 7, 48)
    got = IMPLEMENTATIONS[name].quantise(linear, mode)(x)
    # A value on the edge between two codes may fall to either side; torchao puts every row's largest on one.
    span, atol = (127.5, 1e-2) if name == "torchao" else (127.0, 2e-3)
    torch.testing.assert_close(got.double(), by_the_book(x, linear, mode, span), rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "mode"), SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_near_the_original(name, mode, dtype) -> None:
    linear = layer(256, 64, dtype=dtype)
    x = torch.randn(3, 300, 256, dtype=dtype)  # more rows than are converted at a time
    before = linear.weight.clone()
    new = IMPLEMENTATIONS[name].quantise(linear, mode)
    got = new(x)
    want = linear(x).float()
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.float() - want).norm() / want.norm() < 0.015
    assert torch.equal(linear.weight, before)
    assert isinstance(new, nn.Linear)
    assert (new.in_features, new.out_features) == (256, 64)
    assert new.bias is linear.bias


@pytest.mark.parametrize(("name", "mode"), SUPPORTED)
def test_a_token_does_not_depend_on_the_others(name, mode) -> None:
    new = IMPLEMENTATIONS[name].quantise(layer(64, 32), mode)
    x = torch.randn(4, 10, 64)
    alone = new(x[:1])
    x[1:] *= 1e4
    torch.testing.assert_close(new(x)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [int_mm, reference])
def test_zeros_give_the_bias(make) -> None:
    linear = layer()
    assert torch.equal(make.quantise(linear, "dynamic")(torch.zeros(1, 3, 48)), linear.bias.expand(1, 3, -1))


def test_integer_product_needs_integers() -> None:
    with pytest.raises(ValueError, match="mode 'dynamic'"):
        int_mm.quantise(layer(), "weight_only")


def test_compiled_is_eager() -> None:
    new = int_mm.quantise(layer(64, 32), "dynamic")
    x = torch.randn(2, 300, 64)
    compiled = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), new(x))


def test_choice_says_why() -> None:
    assert select(OP, device="cpu", mode="dynamic", features=24).name == "int_mm"
    choice = select(OP, device="cpu", mode="weight_only")
    assert choice.name == "torchao"
    assert "integer activations" in choice.why
    assert select(OP, device="cuda", mode="dynamic", features=64).name == "torchao"
    assert select(OP, prefer="int_mm", device="cuda", mode="dynamic", features=64).name == "int_mm"
    with pytest.raises(ConfigError, match="multiples of 8"):
        select(OP, prefer="int_mm", device="cuda", mode="dynamic", features=12)


def test_torchao_comes_in_silence() -> None:
    code = (
        "import torch, logging; from torch import nn; level = logging.getLogger('torchao').level\n"
        "from vivace.kernels.int8_linear.torchao import quantise\n"
        "quantise(nn.Linear(16, 16), 'dynamic')\n"
        "assert logging.getLogger('torchao').level == level\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
