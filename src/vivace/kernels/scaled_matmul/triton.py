"""A tile of the product per program, scales, bias and what follows while it is still in registers."""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch
from vivace.kernels.scaled_matmul.spec import After

GROUP = 8
"""Tiles of rows that run side by side, so that they find the weights in the cache."""


@triton.jit
def place_of(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: down a group of rows first, then one column further."""
    wide = GROUP * n_tiles
    first = tile // wide * GROUP
    high = tl.minimum(m_tiles - first, GROUP)
    return first + tile % wide % high, tile % wide // high


@triton.jit
def finish(
    y, rows, columns, m, n, run_length, residual_ptr, gate_ptr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What follows a product, on a tile of float32."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if GELU:
        u = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-u))
    if RESIDUAL:
        if GATE:
            place = (rows // run_length)[:, None] * n + columns[None, :]
            y = y * tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
        place = rows.to(tl.int64)[:, None] * n + columns[None, :]
        y = y + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _matmul(
    a_ptr, b_ptr, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, residual_ptr, gate_ptr, m, n, k, run_length,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    m_tiles, n_tiles = tl.cdiv(m, BM), tl.cdiv(n, BN)
    i, j = place_of(tl.program_id(0), m_tiles, n_tiles, GROUP)
    rows, columns, depth = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows behind the last read the first ones again: no mask is needed, and nobody sees their results.
    a_ptr += (rows % m).to(tl.int64)[:, None] * k + depth[None, :]
    b_ptr += (columns % n).to(tl.int64)[None, :] * k + depth[:, None]
    if INT8:
        total = tl.zeros([BM, BN], tl.int32)
    else:
        total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, k, BK):
        there = depth < k - first
        a = tl.load(a_ptr + first, mask=there[None, :], other=0.0)
        b = tl.load(b_ptr + first, mask=there[:, None], other=0.0)
        total = tl.dot(a, b, total, out_dtype=total.dtype)
    y = total.to(tl.float32) * tl.load(a_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
    y = y * tl.load(b_scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    y = finish(y, rows, columns, m, n, run_length, residual_ptr, gate_ptr, GELU, RESIDUAL, GATE)
    place = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def run(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None,
    after: After, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """See `spec`."""
    (m, k), n = a.shape, b.shape[0]
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty((m, n), dtype=dtype, device=a.device)
    residual = None if after.residual is None else after.residual.contiguous()
    gate = None if after.gate is None else after.gate.contiguous()
    # Where a tensor is not there, the scales stand in for a pointer that is never read.
    given = [a_scale if t is None else t for t in (bias, residual, gate)]
    high, wide = (64, 64) if m * n < 2**18 else (128, 128)
    launch(
        _matmul, (triton.cdiv(m, high) * triton.cdiv(n, wide),), a, b, y, a_scale.contiguous(), b_scale.contiguous(),
        *given, m, n, k, 1 if gate is None else m // gate.shape[0],
        BM=high, BN=wide, BK=128 if k >= 128 else 32, GROUP=GROUP, INT8=a.dtype == torch.int8,
        BIAS=bias is not None, GELU=after.gelu, RESIDUAL=residual is not None, GATE=gate is not None,
        num_warps=8 if high == 128 else 4, num_stages=4,
    )  # fmt: skip
    return y
