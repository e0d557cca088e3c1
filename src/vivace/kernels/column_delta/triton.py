"""Column-sparse attention in Triton: a program owns a block of queries and gathers its keys row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch

TILE = 64
"""Columns that are handled at a time."""


@triton.jit
def _sums(
    q_ptr, k_ptr, lse_ptr, sums_ptr, bias_ptr, q_b, q_h, q_s, k_b, k_h, k_s, bias_b, heads, queries, keys, scale,
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    wide = row.to(tl.int64)
    mine, dims, tile = block * C + tl.arange(0, C), tl.arange(0, D), tl.arange(0, N)
    q = tl.load(q_ptr + b * q_b + h * q_h + mine[:, None] * q_s + dims[None, :])
    lse = tl.load(lse_ptr + wide * queries + mine) * 1.4426950408889634
    k_ptr += b * k_b + h * k_h
    sums_ptr += (wide * tl.num_programs(0) + block) * keys
    for start in range(0, keys, N):
        columns = start + tile
        real = columns < keys
        kt = tl.load(k_ptr + columns[None, :] * k_s + dims[:, None], mask=real[None, :], other=0.0)
        s = tl.dot(q, kt, input_precision="ieee") * (scale * 1.4426950408889634)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + b * bias_b + columns, mask=real, other=0.0)
            s += bias[None, :] * 1.4426950408889634
        tl.store(sums_ptr + columns, tl.sum(tl.exp2(s - lse[:, None]), 0), mask=real)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, bias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, bias_b, heads, queries, columns, scale,
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    wide = row.to(tl.int64)
    mine, dims, tile = block * C + tl.arange(0, C), tl.arange(0, D), tl.arange(0, N)
    q = tl.load(q_ptr + b * q_b + h * q_h + mine[:, None] * q_s + dims[None, :])
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    index_ptr += (wide * tl.num_programs(0) + block) * columns
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, D], tl.float32)
    for start in range(0, columns, N):
        real = start + tile < columns
        places = tl.load(index_ptr + start + tile, mask=real, other=0)
        kt = tl.load(k_ptr + places[None, :] * k_s + dims[:, None], mask=real[None, :], other=0.0)
        s = tl.dot(q, kt, input_precision="ieee") * (scale * 1.4426950408889634)
        if HAS_BIAS:
            s += tl.load(bias_ptr + b * bias_b + places)[None, :] * 1.4426950408889634
        s = tl.where(real[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # Where all columns so far are masked the maximum is -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, decay = tl.exp2(s - base[:, None]), tl.exp2(top - base)
        v = tl.load(v_ptr + places[:, None] * v_s + dims[None, :], mask=real[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        top = higher
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    place = wide * queries + mine
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    )
    tl.store(lse_ptr + place, tl.where(seen, (top + tl.log2(total)) * 0.6931471805599453, float("-inf")))


def sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, block: int, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `spec`."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (b, h, s, d), keys = q.shape, k.shape[2]
    found = torch.empty((b, h, s // block, keys), dtype=torch.float32, device=q.device)
    added = q if bias is None else bias.float().contiguous()
    launch(
        _sums, (s // block, b * h), q, k, lse.float().contiguous(), found, added,
        *q.stride()[:3], *k.stride()[:3], 0 if bias is None else added.stride(0), h, s, keys, scale,
        C=block, D=d, N=TILE, HAS_BIAS=bias is not None, num_warps=8 if block == 128 else 4,
    )  # fmt: skip
    return found


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, h, s, d = q.shape
    block = s // index.shape[2]
    out = torch.empty((b, h, s, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    added = q if bias is None else bias.float().contiguous()
    launch(
        _attend, (s // block, b * h), q, k, v, index.to(torch.int32).contiguous(), out, lse, added,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if bias is None else added.stride(0),
        h, s, index.shape[3], scale,
        C=block, D=d, N=TILE, HAS_BIAS=bias is not None, num_warps=8 if block == 128 else 4,
    )  # fmt: skip
    return out, lse
