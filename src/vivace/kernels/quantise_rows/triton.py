"""A program takes a row through norm, modulation or GELU and rounds it: one read and one write.

A row is held as two pieces whose lengths are powers of two, since a single one would be up to twice as long as the row
(16,384 for 8,960), and the masked half costs as many instructions as the other. Up to 2,048 numbers one warp holds
both, so that sums and the maximum need no barrier.
"""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch
from vivace.kernels.quantise_rows.spec import LARGEST, TINY, Before

MAGIC = tl.constexpr(12_582_912.0)
"""1.5 * 2^23: added to a small number, it leaves the nearest integer in the lowest bits, halves to even."""


_ASM: Any = tl.constexpr(
    "{ .reg .f32 u; mul.f32 u, $1, $1; fma.rn.f32 u, u, 0fBDD2D3E8, 0fC0135761; mul.f32 u, $1, u; "
    "ex2.approx.ftz.f32 u, u; add.f32 u, u, 0f3F800000; rcp.approx.ftz.f32 u, u; mul.f32 $0, $1, u; }"
)


@triton.jit
def _gelu(x, COMPILED: tl.constexpr):
    # x / 2 (1 + tanh(u)) is x / (1 + exp(-2 u)); constants with the logarithm of 2 in them. A division guards against
    # ranges that cannot come, and costs as much as all the rest.
    if COMPILED:
        return tl.inline_asm_elementwise(_ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x)))


@triton.jit
def _scaled(
    x, inside, at, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    if WEIGHT:
        x = x * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x = x + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        x = x * (1.0 + tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32))
        x = x + tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _codes(x, by, kind, INT8: tl.constexpr):
    ratio = x * by
    if INT8:
        return (ratio + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    return ratio.to(kind)


@triton.jit
def _quantise(
    x_ptr, codes_ptr, out_scale_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, x_b, x_s, mod_b, mod_s, rows, columns,
    eps, largest, tiny,
    W: tl.constexpr, REST: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    MODULATED: tl.constexpr, GELU: tl.constexpr, INT8: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, s = (row // rows).to(tl.int64), (row % rows).to(tl.int64)
    x_ptr += b * x_b + s * x_s
    mod = b * mod_b + s * mod_s
    at, behind = tl.arange(0, W), W + tl.arange(0, REST)
    # The first piece is never longer than the row.
    whole, inside = at < W, behind < columns
    x = tl.load(x_ptr + at).to(tl.float32)
    z = tl.load(x_ptr + behind, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        x, z = _gelu(x, COMPILED), _gelu(z, COMPILED)
    if NORM == "layer":
        mean = (tl.sum(x, 0) + tl.sum(z, 0)) / columns
        x, z = x - mean, tl.where(inside, z - mean, 0.0)
    if NORM != "none":
        by = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(z * z, 0)) / columns + eps)
        x, z = x * by, z * by
    x = _scaled(x, whole, at, weight_ptr, bias_ptr, scale_ptr + mod, shift_ptr + mod, WEIGHT, BIAS, MODULATED)
    z = _scaled(
        z, inside, behind, weight_ptr, bias_ptr, scale_ptr + mod, shift_ptr + mod, WEIGHT, BIAS, MODULATED
    )
    top = tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(z), 0))
    # tl.div_rn: what lies between two codes must not round apart from the reference.
    out_scale = tl.div_rn(tl.maximum(top, tiny * largest), largest)
    tl.store(out_scale_ptr + row, out_scale)
    by = tl.div_rn(1.0, out_scale)
    kind: tl.constexpr = codes_ptr.dtype.element_ty
    codes_ptr += row.to(tl.int64) * columns
    tl.store(codes_ptr + at, _codes(x, by, kind, INT8))
    tl.store(codes_ptr + behind, _codes(z, by, kind, INT8), mask=inside)


def pieces(columns: int) -> tuple[int, int]:
    """Lengths of the two pieces of a row: the first within it, the second long enough for what is left."""
    first = 1 << (columns.bit_length() - 1)
    return first, triton.next_power_of_2(max(1, columns - first))


def run(x: torch.Tensor, kind: str, before: Before) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    b, s, k = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(
        (b, s, k), dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn, device=x.device
    )
    out = torch.empty((b, s), dtype=torch.float32, device=x.device)
    scale, shift = before.scale, before.shift
    mod_b = mod_s = 0
    if scale is not None and shift is not None:
        scale, shift = scale.contiguous(), shift.contiguous()
        mod_b, mod_s = scale.stride(0), scale.stride(1) if scale.shape[1] == s and s > 1 else 0
    # Where a tensor is not there, x stands in for a pointer that is never read.
    given = [x if t is None else t for t in (before.weight, before.bias, scale, shift)]
    width, rest = pieces(k)
    launch(
        _quantise, (b * s,), x, codes, out, *given, x.stride(0), x.stride(1), mod_b, mod_s, s, k,
        before.eps, LARGEST[kind], TINY,
        W=width, REST=rest, NORM=before.norm, WEIGHT=before.weight is not None, BIAS=before.bias is not None,
        MODULATED=scale is not None, GELU=before.gelu, INT8=kind == "int8",
        COMPILED=isinstance(_quantise, triton.runtime.JITFunction),
        num_warps=max(1, min(8, width // 1024)),
    )  # fmt: skip
    return codes, out
