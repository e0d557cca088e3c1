"""A program takes a row through norm, modulation or GELU and rounds it: one read and one write."""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch
from vivace.kernels.quantise_rows.spec import LARGEST, TINY, Before


@triton.jit
def _quantise(
    x_ptr, codes_ptr, out_scale_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, x_b, x_s, mod_b, mod_s, rows, columns,
    eps, largest, tiny,
    W: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr,
    GELU: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, s = (row // rows).to(tl.int64), (row % rows).to(tl.int64)
    at = tl.arange(0, W)
    inside = at < columns
    x = tl.load(x_ptr + b * x_b + s * x_s + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # x / 2 (1 + tanh(u)) is x / (1 + exp(-2 u)).
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-u))
    if NORM == "layer":
        x = tl.where(inside, x - tl.sum(x, 0) / columns, 0.0)
    if NORM != "none":
        x = x * tl.rsqrt(tl.sum(x * x, 0) / columns + eps)
    if WEIGHT:
        x = x * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x = x + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        place = b * mod_b + s * mod_s + at
        x = x * (1.0 + tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32))
        x = x + tl.load(shift_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # tl.div_rn: what lies between two codes must not round apart from the reference.
    out_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), tiny * largest), largest)
    tl.store(out_scale_ptr + row, out_scale)
    ratio = tl.div_rn(x, out_scale)
    if INT8:
        # The conversion cuts towards zero.
        ratio = ratio + tl.where(ratio < 0.0, -0.5, 0.5)
    else:
        ratio = tl.minimum(tl.maximum(ratio, -448.0), 448.0)
    tl.store(codes_ptr + row.to(tl.int64) * columns + at, ratio.to(codes_ptr.dtype.element_ty), mask=inside)


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
    width = triton.next_power_of_2(k)
    launch(
        _quantise, (b * s,), x, codes, out, *given, x.stride(0), x.stride(1), mod_b, mod_s, s, k,
        before.eps, LARGEST[kind], TINY,
        W=width, NORM=before.norm, WEIGHT=before.weight is not None, BIAS=before.bias is not None,
        MODULATED=scale is not None, GELU=before.gelu, INT8=kind == "int8",
        num_warps=max(1, min(8, width // 512)),
    )  # fmt: skip
    return codes, out
