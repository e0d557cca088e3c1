"""Block attention for Hopper GPUs with three blocks of queries at a time on a multiprocessor, for blocks of 64.

`hopper` runs two programs side by side there, each of a group of four warps, and its tensor cores wait for softmaxes
a third of the time. Registers allow a third group if a program holds all three (160 a thread). Shared memory allows
two tiles of keys and two of values for each if queries, which move into registers, come through a tile of values. So a
program has three lanes that know nothing of each other: a producer, a consumer and their tiles.
"""

# Gluon's decorators turn functions into things that a type checker cannot see through.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from vivace.kernels.block_attention.hopper import (
    _KINDS,
    LOG2E,
    ROWS,
    _load,
    _tensor_core,
    _weigh,
    backward,
    described,
    folded,
    multiprocessors,
)
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.block_attention.triton import lists_of
from vivace.kernels.launch import launch

__all__ = ["backward", "forward"]

LANES = gl.constexpr(3)
DEPTH = gl.constexpr(2)
"""Tiles of keys, and of values and queries, of a lane."""


@gluon.jit
def _fill(desc, row, column, tiles, ready, empty, n):
    """Bring the n-th tile of a ring."""
    at, phase = n % DEPTH, (n // DEPTH) & 1
    # The barriers of empty tiles begin in the phase before their first.
    mbarrier.wait(empty.index(at), phase ^ 1)
    mbarrier.expect(ready.index(at), desc.block_type.nbytes)
    _load(desc, [row, column], ready.index(at), tiles.index(at))


@gluon.jit
def _bring(
    q_desc, k_desc, v_desc, index_ptr, count_ptr,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, index_b, index_h, index_n, count_b, count_h,
    k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, work, blocks, heads,
    LANE: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """A lane's producer: queries, then its list, keys one block ahead of values."""
    nk, nv = 0, 0
    for task in range(gl.program_id(0) * LANES + LANE, work, gl.num_programs(0) * LANES):
        block, row = task % blocks, task // blocks
        b, h = row // heads, row % heads
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        count = gl.load(count_ptr + b * count_b + h * count_h + block)
        _fill(q_desc, b * q_b + h * q_h + block * C, h * q_c, v_tiles, v_ready, v_empty, nv)
        nv += 1
        k_row, v_row = b * k_b + h * k_h, b * v_b + h * v_h
        here = gl.load(index)
        if count > 0:
            _fill(k_desc, k_row + here * C, h * k_c, k_tiles, k_ready, k_empty, nk)
            nk += 1
        for t in range(count):
            following = gl.load(index + gl.minimum(t + 1, count - 1))
            if t + 1 < count:
                _fill(k_desc, k_row + following * C, h * k_c, k_tiles, k_ready, k_empty, nk)
                nk += 1
            _fill(v_desc, v_row + here * C, h * v_c, v_tiles, v_ready, v_empty, nv)
            nv += 1
            here = following


@gluon.jit
def _attend_list(
    q, index, sizes, bias, count, nk, nv, scale, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
    C: gl.constexpr, D: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 queries against a list, as in `hopper`; keys and values have rings of their own."""
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = _tensor_core(C)
    o_layout: gl.constexpr = _tensor_core(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    blank = gl.full([ROWS, C], 0.0, gl.float32, s_layout)
    spots = gl.arange(0, C, layout=gl.SliceLayout(0, s_layout))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = folded(blank, False)
    acc = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
    if count > 0:
        this, size = 0, C
        mbarrier.wait(k_ready.index(nk % DEPTH), (nk // DEPTH) & 1)
        scores = warpgroup_mma(
            q, k_tiles.index(nk % DEPTH).permute((1, 0)), blank, use_acc=False, is_async=True
        )
        if HAS_SIZES or HAS_BIAS:
            this = gl.load(index)
        if HAS_SIZES:
            size = gl.load(sizes + this)
        s = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(nk % DEPTH), count=1)
        nk += 1
        p, shrink, top, total = _weigh(
            s, top, total, scale, size, spots, bias + this * C, C, HAS_SIZES, HAS_BIAS
        )
        weights = gl.convert_layout(p.to(dtype), p_layout)
        for j in range(1, count):
            mbarrier.wait(k_ready.index(nk % DEPTH), (nk // DEPTH) & 1)
            scores = warpgroup_mma(
                q, k_tiles.index(nk % DEPTH).permute((1, 0)), blank, use_acc=False, is_async=True
            )
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
            mbarrier.wait(v_ready.index(nv % DEPTH), (nv // DEPTH) & 1)
            adding = warpgroup_mma(weights, v_tiles.index(nv % DEPTH), acc, is_async=True)
            if HAS_SIZES or HAS_BIAS:
                this = gl.load(index + j)
            if HAS_SIZES:
                size = gl.load(sizes + this)
            s = warpgroup_mma_wait(1, deps=(scores,))
            mbarrier.arrive(k_empty.index(nk % DEPTH), count=1)
            nk += 1
            p, shrink, top, total = _weigh(
                s, top, total, scale, size, spots, bias + this * C, C, HAS_SIZES, HAS_BIAS
            )
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(v_empty.index(nv % DEPTH), count=1)
            nv += 1
            weights = gl.convert_layout(p.to(dtype), p_layout)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
        mbarrier.wait(v_ready.index(nv % DEPTH), (nv // DEPTH) & 1)
        adding = warpgroup_mma(weights, v_tiles.index(nv % DEPTH), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(adding,))
        mbarrier.arrive(v_empty.index(nv % DEPTH), count=1)
        nv += 1
    return acc, top, total, nk, nv


@gluon.jit
def _compute(
    out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h, bias_b, queries, scale,
    k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty, work, blocks, heads,
    LANE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A lane's consumer: one block of queries after another against its list."""
    s_layout: gl.constexpr = _tensor_core(C)
    o_layout: gl.constexpr = _tensor_core(D)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    nk, nv = 0, 0
    for task in range(gl.program_id(0) * LANES + LANE, work, gl.num_programs(0) * LANES):
        block, row = task % blocks, task // blocks
        b, h = row // heads, row % heads
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        sizes = sizes_ptr + (b.to(gl.int64) * sizes_b + h * sizes_h)
        bias = bias_ptr + b.to(gl.int64) * bias_b
        count = gl.load(count_ptr + b * count_b + h * count_h + block)
        mbarrier.wait(v_ready.index(nv % DEPTH), (nv // DEPTH) & 1)
        q = v_tiles.index(nv % DEPTH).load(q_layout)
        mbarrier.arrive(v_empty.index(nv % DEPTH), count=1)
        nv += 1
        acc, top, total, nk, nv = _attend_list(
            q, index, sizes, bias, count, nk, nv, scale, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
            C, D, HAS_SIZES, HAS_BIAS,
        )  # fmt: skip
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
        seen = total > 0.0
        whole = gl.where(seen, total, 1.0)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / whole, o_rows), 1)
        lse = gl.where(seen, (top + gl.log2(whole)) * 0.6931471805599453, float("-inf"))
        first = row.to(gl.int64) * queries + block * C
        gl.store(lse_ptr + first + gl.arange(0, ROWS, layout=s_rows), lse)
        down = gl.expand_dims(gl.arange(0, ROWS, layout=o_rows), 1)
        across = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, o_layout)), 0)
        gl.store(out_ptr + first * D + (down * D + across), acc.to(out_ptr.dtype.element_ty))


@gluon.jit
def _barriers():
    """Of a ring: ready and empty."""
    ready = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for at in gl.static_range(DEPTH):
        mbarrier.init(ready.index(at), count=1)
        mbarrier.init(empty.index(at), count=1)
    return ready, empty


@gluon.jit
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, work, blocks, heads, queries, scale,
    C: gl.constexpr, D: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    k0 = gl.allocate_shared_memory(k_desc.dtype, [DEPTH, C, D], k_desc.layout)
    k1 = gl.allocate_shared_memory(k_desc.dtype, [DEPTH, C, D], k_desc.layout)
    k2 = gl.allocate_shared_memory(k_desc.dtype, [DEPTH, C, D], k_desc.layout)
    v0 = gl.allocate_shared_memory(v_desc.dtype, [DEPTH, C, D], v_desc.layout)
    v1 = gl.allocate_shared_memory(v_desc.dtype, [DEPTH, C, D], v_desc.layout)
    v2 = gl.allocate_shared_memory(v_desc.dtype, [DEPTH, C, D], v_desc.layout)
    kr0, ke0 = _barriers()
    kr1, ke1 = _barriers()
    kr2, ke2 = _barriers()
    vr0, ve0 = _barriers()
    vr1, ve1 = _barriers()
    vr2, ve2 = _barriers()
    # Constants stay constants only in tuples that are written where they are passed.
    # fmt: off
    gl.warp_specialize([
        (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, k0, v0, kr0, ke0, vr0, ve0, work, blocks, heads,
            0, C, D, HAS_SIZES, HAS_BIAS)),
        (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, k1, v1, kr1, ke1, vr1, ve1, work, blocks, heads,
            1, C, D, HAS_SIZES, HAS_BIAS)),
        (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, k2, v2, kr2, ke2, vr2, ve2, work, blocks, heads,
            2, C, D, HAS_SIZES, HAS_BIAS)),
        (_bring, (
            q_desc, k_desc, v_desc, index_ptr, count_ptr, q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c,
            index_b, index_h, index_n, count_b, count_h, k0, v0, kr0, ke0, vr0, ve0, work, blocks, heads, 0, C)),
        (_bring, (
            q_desc, k_desc, v_desc, index_ptr, count_ptr, q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c,
            index_b, index_h, index_n, count_b, count_h, k1, v1, kr1, ke1, vr1, ve1, work, blocks, heads, 1, C)),
        (_bring, (
            q_desc, k_desc, v_desc, index_ptr, count_ptr, q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c,
            index_b, index_h, index_n, count_b, count_h, k2, v2, kr2, ke2, vr2, ve2, work, blocks, heads, 2, C)),
    ], [4, 4, 1, 1, 1], [160, 160, 24, 24, 24])
    # fmt: on


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`.

    Raises:
        ValueError: not a 16-bit type, or blocks of other than 64 tokens.
    """
    if q.dtype not in _KINDS or routes.block != ROWS.value:
        raise ValueError("three lanes take bfloat16 and float16 and blocks of 64; choose the backend hopper.")
    b, h, s, d = q.shape
    out = torch.empty((b, h, s, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    made = [described(x, ROWS.value) for x in (q, k, v)]
    lists, strides = lists_of(routes, bias, b, h)
    work = s // routes.block * b * h
    launch(
        _forward, (min(-(-work // LANES.value), multiprocessors(q.device)),), *(x for x, _ in made), out, lse, *lists,
        *(n for _, steps in made for n in steps), *strides, work, s // routes.block, h, s, scale * LOG2E,
        C=routes.block, D=d, HAS_SIZES=routes.sizes is not None, HAS_BIAS=bias is not None,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
    return out, lse
