"""Number formats against their definitions, number by number, and against torchao's casts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vivace.kernels.quant_linear import formats
from vivace.kernels.quant_linear.formats import BLOCK, LARGEST, dequantise, quantise

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)
POINTS = {
    "int8": [float(i) for i in range(128)],
    "int4": [float(i) for i in range(8)],
    "fp8": E4M3,
    "nvfp4": E2M1,
    "mxfp8": E4M3,
    "mxfp4": E2M1,
}
"""Magnitudes of the codes, in the order of the codes."""


def nearest(value: float, points: list[float]) -> float:
    """The definition: nearest magnitude, halves to the even code, saturation above."""
    best = min(range(len(points)), key=lambda i: (abs(points[i] - abs(value)), i % 2))
    return math.copysign(points[best], value)


def data(rows: int = 6, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.logspace(-3, 3, rows)[:, None]


@pytest.mark.parametrize("name", LARGEST)
def test_every_code_comes_back(name) -> None:
    """Numbers that the format has, at every sign, with the largest in each block so that the scale is known."""
    points = torch.tensor([*POINTS[name], *(-p for p in POINTS[name])])
    width = BLOCK.get(name, 64)
    rest = points.repeat(2)[: -(-len(points) // (width - 1)) * (width - 1)]
    rest = torch.cat([rest, rest.new_zeros(-len(rest) % (width - 1))]).view(-1, width - 1)
    blocks = torch.cat([rest.new_full((len(rest), 1), LARGEST[name]), rest], 1)
    for factor in (1.0, 2.0**-9, 2.0**20):
        # NVFP4's outer scale is a 2688th of the largest value: exact for these.
        x = blocks * factor * (448.0 if name == "nvfp4" else 1.0)
        codes = quantise(x, name)
        assert torch.equal(dequantise(codes), x)
        assert torch.equal(dequantise(quantise(dequantise(codes), name)), x)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("group", [0, 32])
def test_integers_round_halves_to_even_and_stay_within_half_a_step(name, group) -> None:
    top = LARGEST[name]
    halves = torch.arange(-top + 0.5, top, 1.0)[:31]
    x = torch.cat([torch.tensor([top]), halves, torch.zeros(64 - 1 - len(halves))])[None]
    codes = quantise(x, name, group)
    want = [float(round(v)) for v in x[0].tolist()]  # Python rounds halves to even
    assert dequantise(codes)[0].tolist() == want
    y = data()
    codes = quantise(y, name, group)
    step = formats.decoded_scale(codes.scale).repeat_interleave(64 // codes.scale.shape[1], 1)
    assert ((dequantise(codes) - y).abs() <= step / 2 * (1 + 1e-6)).all()
    assert formats.as_int8(codes.values, name).abs().max() <= top


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "mxfp8", "mxfp4"])
def test_floats_round_to_the_nearest_code(name) -> None:
    """Every value against a search through all magnitudes, in the units of its own scale."""
    x = data(3)
    codes = quantise(x, name)
    step = formats.decoded_scale(codes.scale) * (1.0 if codes.outer is None else codes.outer)
    step = step.repeat_interleave(64 // step.shape[1], 1)
    inside = x / step
    want = torch.tensor([[nearest(v, POINTS[name]) for v in row] for row in inside.tolist()])
    torch.testing.assert_close(dequantise(codes), want * step, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("low", "high"), list(itertools.pairwise(E2M1)))
def test_halves_between_two_e2m1_codes_go_to_the_even_one(low, high) -> None:
    x = torch.zeros(2, 32)
    x[:, 0], x[0, 1], x[1, 1] = 6.0, (low + high) / 2, -(low + high) / 2
    even = low if E2M1.index(low) % 2 == 0 else high
    assert dequantise(quantise(x, "mxfp4"))[:, 1].tolist() == [even, -even]


def test_power_of_two_scales_follow_the_largest_exponent_and_saturate() -> None:
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([7.9, 6.0, 0.0])  # 7.9 has the exponent of 4, whose block reaches up to 6
    codes = quantise(x, "mxfp4")
    assert codes.scale[:2, 0].tolist() == [127, 127]
    assert dequantise(codes)[:, 0].tolist() == [6.0, 6.0, 0.0]
    x[:, 0] = torch.tensor([500.0, 449.0, 2.0**-140])
    assert dequantise(quantise(x, "mxfp8"))[:2, 0].tolist() == [448.0, 448.0]
    for name, share in (("mxfp8", 1 / 8), ("mxfp4", 1 / 4)):
        y = data(50)
        lost = (dequantise(quantise(y, name)) - y).abs().amax(1) / y.abs().amax(1)
        assert lost.max() <= share


def test_power_of_two_scales_are_exact() -> None:
    codes = torch.arange(255, dtype=torch.uint8)[None]
    assert formats.decoded_scale(codes)[0].tolist() == [2.0 ** (i - 127) for i in range(255)]


@pytest.mark.parametrize("name", LARGEST)
def test_zeros_and_tiny_values_stay_finite(name) -> None:
    x = torch.zeros(3, 64)
    x[1, 3], x[2] = 1e-42, 1e-30
    out = dequantise(quantise(x, name))
    assert torch.isfinite(out).all()
    assert not out[0].any()
    assert (out.abs() <= 1.2e-30).all()


def test_nvfp4_block_scales_are_e4m3_of_the_outer_one() -> None:
    x = data(4)
    whole, rows = quantise(x, "nvfp4", tensor=True), quantise(x, "nvfp4")
    assert whole.outer is not None
    assert rows.outer is not None
    assert whole.outer.item() == x.abs().max() / (6.0 * 448.0)
    assert rows.outer.shape == (4, 1)
    assert rows.scale.float().amax(1).tolist() == [448.0] * 4
    tops = x.view(4, 4, 16).abs().amax(-1) / 6 / whole.outer
    assert torch.equal(whole.scale.float(), tops.clamp(max=448).to(torch.float8_e4m3fn).float())
    # Rows a million times smaller than the largest fall below the least scale, and only then.
    assert (dequantise(whole)[0] == 0).all()
    assert (dequantise(rows)[0] != 0).any()


def test_tensor_scales() -> None:
    x = data(4)
    for name in ("fp8", "int8"):
        codes = quantise(x, name, tensor=True)
        assert codes.scale.item() == x.abs().max() / LARGEST[name]
        assert (dequantise(codes) - x).abs().max() <= x.abs().max() / (15 if name == "fp8" else 250)


@pytest.mark.parametrize("columns", [1, 7, 24, 50])
@pytest.mark.parametrize("name", LARGEST)
def test_any_width_and_true_bytes(name, columns) -> None:
    x = data(5, columns)
    codes = quantise(x, name)
    out = dequantise(codes)
    assert out.shape == x.shape
    assert (out - x).norm() / x.norm() < 0.2
    width = formats.width_of(name, columns)
    stored = -(-columns // width) * width
    assert codes.values.nbytes == 5 * stored * (0.5 if name in formats.HALF_BYTE else 1)


@pytest.mark.parametrize(
    ("name", "group", "bits"),
    [("int8", 0, 8), ("int4", 0, 4), ("int4", 64, 4.25), ("int8", 32, 8.5), ("fp8", 0, 8),
     ("nvfp4", 0, 4.5), ("mxfp8", 0, 8.25), ("mxfp4", 0, 4.25)],
)  # fmt: skip
def test_bits_of_a_weight(name, group, bits) -> None:
    codes = quantise(torch.randn(64, 4096), name, group, tensor=name == "nvfp4")
    assert codes.nbytes * 8 / (64 * 4096) == pytest.approx(bits, abs=0.01)


def test_negation_is_exact_and_layout_is_low_half_first() -> None:
    x = data()
    for name in LARGEST:
        assert torch.equal(dequantise(quantise(-x, name)), -dequantise(quantise(x, name)))
    packed = quantise(torch.tensor([[7.0, -1.0, 3.0, 0.0]]), "int4").values
    assert packed.tolist() == [[0x7 | 0xF << 4, 0x3]]
    packed = quantise(torch.tensor([[6.0, -0.5] + [0.0] * 30]), "mxfp4").values
    assert packed[0, 0].item() == 0x7 | 0x9 << 4


def test_what_is_no_format_is_refused() -> None:
    x = torch.ones(2, 32)
    for arguments in (("int7", 0), ("fp8", 32), ("int8", 33)):
        with pytest.raises(ValueError, match=str(arguments[0])):
            quantise(x, *arguments)
    with pytest.raises(ValueError, match="dimensions"):
        quantise(x[0], "int8")
    with pytest.raises(ValueError, match="tensor"):
        quantise(x, "mxfp8", tensor=True)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_agrees_with_torchao(name) -> None:
    """An implementation of somebody else's: equal codes and equal scales."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(5))
    x = x * torch.logspace(-2, 2, 16)[:, None]
    if name == "nvfp4":
        nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        codes = quantise(x, name, tensor=True)
        assert codes.outer is not None
        theirs = nv.nvfp4_quantize(x, per_tensor_scale=codes.outer[0, 0])
        scale, values = theirs[0].float(), theirs[1]
        assert torch.equal(scale.view(16, -1), codes.scale.float())
    else:
        kind = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
        codes = quantise(x, name)
        scale, values = mx.to_mx(x, kind, 32)
        assert torch.equal(scale.view(torch.uint8).view(16, -1), codes.scale)
    assert torch.equal(values.view(torch.uint8).view(16, -1), codes.values.view(torch.uint8))


@pytest.mark.parametrize("name", sorted(LARGEST))
def test_rounding_without_packing_is_the_same(name) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 70, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    ties = (
        torch.arange(-56, 57).view(1, -1)[:, :70] / 8.0
    )  # every half between two values of e2m1 and integers
    for rows in (x, ties, torch.zeros(2, 70)):
        want = dequantise(quantise(rows, name))
        assert torch.equal(formats.rounded(rows, name), want)
