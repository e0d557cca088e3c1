"""Block attention in Triton: FlashAttention's online softmax (arXiv 2307.08691) over lists of key blocks.

One program owns one block of queries and walks its list; programs of one head are neighbours, so that its keys stay in
the second-level cache. Scores live in base 2. The backward pass recomputes them: one kernel walks the same lists for
dq, another the transposed lists for dk and dv.
"""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.launch import launch

LOG2E = 1.4426950408889634


@triton.jit
def _scores(
    q, kt, scale, bias_ptr, sizes_ptr, kb, slots,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in base 2, -inf where the slot holds no key."""
    s = tl.dot(q, kt, input_precision="ieee") * scale
    if HAS_BIAS:
        s += tl.load(bias_ptr + kb * C + slots)[None, :] * 1.4426950408889634
    if HAS_SIZES:
        s = tl.where(slots[None, :] < tl.load(sizes_ptr + kb), s, float("-inf"))
    return s


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, heads, queries, scale, skip,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SIZES: tl.constexpr, HAS_SKIP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    slots, spots, dims = tl.arange(0, C), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + b * q_b + h * q_h + (block * C + slots)[:, None] * q_s + dims[None, :])
    if not TMA:
        k_ptr += b * k_b + h * k_h
        v_ptr += b * v_b + h * v_h
    index_ptr += b * index_b + h * index_h + block * index_n
    sizes_ptr += b * sizes_b + h * sizes_h
    bias_ptr += b * bias_b
    count = tl.load(count_ptr + b * count_b + h * count_h + block)
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, D], tl.float32)
    for j in range(count * (C // N)):
        kb = tl.load(index_ptr + j // (C // N))
        here = (j % (C // N)) * N
        first = kb * C + here
        if TMA:
            # k_b .. v_h are steps of rows and columns in the descriptors' two dimensions.
            at, over = (b * k_b + h * k_h).to(tl.int32) + first, (h * k_s).to(tl.int32)
            kt = tl.trans(k_ptr.load([at, over]))
        else:
            rows = first + spots
            kt = tl.load(k_ptr + rows[None, :] * k_s + dims[:, None])
        s = tl.dot(q, kt, input_precision="ieee")
        if HAS_BIAS:
            s = s * scale + tl.load(bias_ptr + first + spots)[None, :] * 1.4426950408889634
        if HAS_SIZES:
            size = tl.load(sizes_ptr + kb)
            s = tl.where((here + spots)[None, :] < size, s, float("-inf"))
        # Without a bias the scale goes into one multiply-add with the row's maximum.
        best = tl.max(s, 1) if HAS_BIAS else tl.max(s, 1) * scale
        higher = tl.maximum(top, best)
        # Rows that have seen nothing yet stay at -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher) if HAS_SIZES or HAS_BIAS else higher
        p = tl.exp2(s - base[:, None]) if HAS_BIAS else tl.exp2(s * scale - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, 1)
        top = higher
        acc = acc * decay[:, None]
        wanted = True
        if HAS_SKIP:
            # Probabilities that are all below 2^-skip of their row's largest so far add nothing that is seen.
            wanted = tl.max(best - base, 0) > -skip
        if wanted:
            if TMA:
                down, right = (b * v_b + h * v_h).to(tl.int32) + first, (h * v_s).to(tl.int32)
                v = v_ptr.load([down, right])
            elif HAS_SIZES:
                real = (here + spots) < size
                v = tl.load(
                    v_ptr + (first + spots)[:, None] * v_s + dims[None, :], mask=real[:, None], other=0.0
                )
            else:
                v = tl.load(v_ptr + (first + spots)[:, None] * v_s + dims[None, :])
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    seen = total > 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    place = row.to(tl.int64) * queries + block * C + slots
    tl.store(out_ptr + place[:, None] * D + dims[None, :], acc.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + place, lse)


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, heads, queries, scale,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    slots, dims = tl.arange(0, C), tl.arange(0, D)
    place = row.to(tl.int64) * queries + block * C + slots
    q = tl.load(q_ptr + b * q_b + h * q_h + (block * C + slots)[:, None] * q_s + dims[None, :])
    do = tl.load(do_ptr + place[:, None] * D + dims[None, :])
    lse, delta = tl.load(lse_ptr + place), tl.load(delta_ptr + place)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * 1.4426950408889634
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    index_ptr += b * index_b + h * index_h + block * index_n
    sizes_ptr += b * sizes_b + h * sizes_h
    bias_ptr += b * bias_b
    dq = tl.zeros([C, D], tl.float32)
    for j in range(tl.load(count_ptr + b * count_b + h * count_h + block) * (C // N)):
        kb = tl.load(index_ptr + j // (C // N))
        spots = (j % (C // N)) * N + tl.arange(0, N)
        rows = kb * C + spots
        real = spots < (tl.load(sizes_ptr + kb) if HAS_SIZES else C)
        k = tl.load(k_ptr + rows[:, None] * k_s + dims[None, :], mask=real[:, None], other=0.0)
        vt = tl.load(v_ptr + rows[None, :] * v_s + dims[:, None], mask=real[None, :], other=0.0)
        s = _scores(q, tl.trans(k), scale, bias_ptr, sizes_ptr, kb, spots, C, HAS_BIAS, HAS_SIZES)
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(do, vt, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    tl.store(dq_ptr + place[:, None] * D + dims[None, :], dq * scale * 0.6931471805599453)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, heads, queries, keys, scale,
    C: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    kb = part // (C // N)
    slots, dims = (part % (C // N)) * N + tl.arange(0, N), tl.arange(0, D)
    rows = kb * C + slots
    sizes_ptr += b * sizes_b + h * sizes_h
    bias_ptr += b * bias_b
    real = slots < (tl.load(sizes_ptr + kb) if HAS_SIZES else C)
    k = tl.load(
        k_ptr + b * k_b + h * k_h + rows[:, None] * k_s + dims[None, :], mask=real[:, None], other=0.0
    )
    v = tl.load(
        v_ptr + b * v_b + h * v_h + rows[:, None] * v_s + dims[None, :], mask=real[:, None], other=0.0
    )
    q_ptr += b * q_b + h * q_h
    index_ptr += b * index_b + h * index_h + kb * index_n
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    for j in range(tl.load(count_ptr + b * count_b + h * count_h + kb) * (C // N)):
        at = tl.load(index_ptr + j // (C // N)) * C + (j % (C // N)) * N + tl.arange(0, N)
        place = row.to(tl.int64) * queries + at
        q = tl.load(q_ptr + at[:, None] * q_s + dims[None, :])
        do = tl.load(do_ptr + place[:, None] * D + dims[None, :])
        lse, delta = tl.load(lse_ptr + place), tl.load(delta_ptr + place)
        lse = tl.where(lse == float("-inf"), 0.0, lse) * 1.4426950408889634
        s = _scores(q, tl.trans(k), scale, bias_ptr, sizes_ptr, kb, slots, C, HAS_BIAS, HAS_SIZES)
        p = tl.exp2(s - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    place = (row.to(tl.int64) * keys + rows)[:, None] * D + dims[None, :]
    tl.store(dk_ptr + place, dk * scale * 0.6931471805599453)
    tl.store(dv_ptr + place, dv)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the forward kernel is launched: found by `benchmarks/kernels/tune_attention.py`, never a matter of results.

    Attributes:
        warps, stages: of a program, and of its pipeline of loads.
        keys: keys of a tile, at most a block.
        tma: tiles of keys and values come through Hopper's copy engine.
    """

    warps: int
    stages: int
    keys: int
    tma: bool = False


def tuning(block: int, dim: int, capability: tuple[int, int] = (9, 0)) -> Tuning:
    """The setting for a block size, a head dimension and a GPU generation."""
    if capability == (9, 0) and dim == 128:
        # Measured: benchmarks/results/2026-11-29/kernels/tune-attention.json.
        return Tuning(4, 2, 64) if block >= 128 else Tuning(4, 4, block)
    if block >= 128:
        # Before Hopper products of 128 keys at a time need more registers than there are.
        return Tuning(8, 3 if dim <= 64 else 2, block if capability >= (9, 0) else 64)
    return Tuning(4, 3, block)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
    skip: float = 0.0,
    tuned: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`. `tuned` is for measurements."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, h, s, d = q.shape
    tuned = tuned or tuning(routes.block, d, _capability(q.device))
    out = torch.empty((b, h, s, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    lists, strides = lists_of(routes, bias, b, h)
    keys: tuple[Any, tuple[int, ...]] = (k, k.stride()[:3])
    values: tuple[Any, tuple[int, ...]] = (v, v.stride()[:3])
    # The copy engine brings whole tiles, what stands behind a block's keys too, and that may be no number.
    tma = tuned.tma and routes.sizes is None
    if tma:
        keys, values = (_described(x, tuned.keys) for x in (k, v))
    launch(
        _forward, (s // routes.block, b * h), q, keys[0], values[0], out, lse, *lists,
        *q.stride()[:3], *keys[1], *values[1], *strides, h, s, scale * LOG2E, skip * LOG2E,
        C=routes.block, N=tuned.keys, D=d, HAS_BIAS=bias is not None, HAS_SIZES=routes.sizes is not None,
        HAS_SKIP=skip > 0.0, TMA=tma, num_warps=tuned.warps, num_stages=tuned.stages,
    )  # fmt: skip
    return out, lse


def _described(x: torch.Tensor, rows: int) -> tuple[Any, tuple[int, int, int]]:
    """A descriptor of (B, H, S, D) in two dimensions, and what a row, a head (rows) and a head (columns) move by.

    Tokens may stand (B, S, H, D) or (B, H, S, D) in memory.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    b, h, s, d = x.shape
    if x.stride() == (s * h * d, d, h * d, 1):
        flat, steps = x.transpose(1, 2).reshape(b * s, h * d), (s, 0, d)
    else:
        flat, steps = x.contiguous().view(b * h * s, d), (h * s, s, 0)
    return TensorDescriptor.from_tensor(flat, [rows, d]), steps


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    small: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtypes. `small` takes the tiles of GPUs before Hopper."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, h, s, d = q.shape
    keys = k.shape[2]
    do, lse = grad_out.to(q.dtype).contiguous(), lse.contiguous()
    # ds = p (dp - sum_j p dp + dlse): the last two are one number a query.
    delta = ((grad_out.float() * out.float()).sum(-1) - grad_lse.float()).contiguous()
    dq = torch.empty((b, h, s, d), dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty((b, h, keys, d), dtype=torch.float32, device=q.device) for _ in range(2))
    given = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    fixed = {"C": routes.block, "D": d, "HAS_BIAS": bias is not None, "HAS_SIZES": routes.sizes is not None}
    # Tiles of both kernels are narrower than a block, for want of registers.
    fixed["N"] = min(64 if _capability(q.device) >= (9, 0) and not small else 32, routes.block)
    tune = {"num_warps": 8 if routes.block * d > 8192 else 4, "num_stages": 2}
    lists, strides = lists_of(routes, bias, b, h)
    launch(
        _backward_queries,
        (s // routes.block, b * h),
        q,
        k,
        v,
        do,
        lse,
        delta,
        dq,
        *lists,
        *given,
        *strides,
        h,
        s,
        scale * LOG2E,
        **fixed,
        **tune,
    )
    turned = Routes.of_mask(routes.mask(keys // routes.block).transpose(-1, -2), routes.sizes, routes.block)
    lists, strides = lists_of(turned, bias, b, h)
    launch(
        _backward_keys,
        (keys // fixed["N"], b * h),
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        *lists,
        *given,
        *strides,
        h,
        s,
        keys,
        scale * LOG2E,
        **fixed,
        **tune,
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def lists_of(
    routes: Routes, bias: torch.Tensor | None, b: int, h: int
) -> tuple[list[torch.Tensor], list[int]]:
    """Index, count, sizes and bias for a kernel, and their strides with 0 along what is shared."""
    index, count = routes.index.contiguous(), routes.count.contiguous()
    index, count = index.expand(b, h, -1, -1), count.expand(b, h, -1)
    sizes = count if routes.sizes is None else routes.sizes.contiguous().expand(b, h, -1)
    # What is not there is never read; a pointer has to point somewhere.
    added = index if bias is None else bias.float().contiguous()
    strides = [
        *index.stride()[:3],
        *count.stride()[:2],
        *sizes.stride()[:2],
        0 if bias is None else added.stride(0),
    ]
    return [index, count, sizes, added], strides
