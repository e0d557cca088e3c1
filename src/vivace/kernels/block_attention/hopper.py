"""Block attention for Hopper GPUs in Gluon: Triton's language below the tile level, still without a build step.

Roles follow FlashAttention-3 (arXiv 2407.08608): one warp brings blocks of keys and values by the copy engine, a group
of four warps for every 64 rows of queries computes, queries in registers, the softmax of a block while the values of
the last one are added up. Programs stay and take one block of queries after another, so that keys arrive while a
result is written out.
"""

# Gluon's decorators turn functions into things that a type checker cannot see through.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.block_attention.triton import backward, lists_of
from vivace.kernels.launch import launch

__all__ = ["backward", "forward"]

# Triton 3.9 calls it so.
_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
LOG2E = 1.4426950408889634
ROWS = gl.constexpr(64)
"""Of queries that a group of four warps computes."""
_KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
SHARED = 227 * 1024
"""Bytes of shared memory that a program may have."""


@gluon.constexpr_function
def _tensor_core(columns):
    """Layout of a product of 64 rows by so many columns in the registers of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _bring(
    k_desc, v_desc, q_desc, index_ptr, count_ptr,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, index_b, index_h, index_n, count_b, count_h,
    q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty, work, blocks, heads,
    C: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: for every block of queries these, then the keys and values of its list."""
    n, turn = 0, 0
    for task in range(gl.program_id(0), work, gl.num_programs(0)):
        block, row = task % blocks, task // blocks
        b, h = row // heads, row % heads
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        count = gl.load(count_ptr + b * count_b + h * count_h + block)
        mbarrier.wait(q_empty, turn ^ 1)
        mbarrier.expect(q_ready, q_desc.block_type.nbytes * GROUPS)
        for group in gl.static_range(GROUPS):
            _load(
                q_desc, [b * q_b + h * q_h + block * C + group * ROWS, h * q_c], q_ready, q_tile.index(group)
            )
        k_row, v_row = b * k_b + h * k_h, b * v_b + h * v_h
        here = gl.load(index)
        for t in range(count):
            # A list's next entry is on its way while this one waits for room.
            following = gl.load(index + gl.minimum(t + 1, count - 1))
            at, phase = n % STAGES, (n // STAGES) & 1
            # The barriers of empty tiles begin in the phase before their first.
            mbarrier.wait(empty.index(at), phase ^ 1)
            mbarrier.expect(ready.index(at), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            _load(k_desc, [k_row + here * C, h * k_c], ready.index(at), k_tiles.index(at))
            _load(v_desc, [v_row + here * C, h * v_c], ready.index(at), v_tiles.index(at))
            here = following
            n += 1
        turn ^= 1


@gluon.jit
def folded(x, largest: gl.constexpr):
    """Sum or maximum of the columns that a thread holds: (64, N) to (64, 4). Pairs first: no chain is long."""
    # A thread has two neighbours of every eight columns.
    x = gl.reshape(x, [x.shape[0], x.shape[1] // 32, 4, 4, 2])
    if largest:
        return gl.max(gl.max(gl.max(x, 4), 2), 1)
    return gl.sum(gl.sum(gl.sum(x, 4), 2), 1)


@gluon.jit
def _weigh(
    s, top, total, scale, size, spots, bias_ptr, C: gl.constexpr, HAS_SIZES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Probabilities of a block, what earlier sums shrink by, the new maxima of rows and sums of threads, in base 2."""
    if HAS_BIAS:
        s = s * scale + gl.expand_dims(gl.load(bias_ptr + spots), 0) * 1.4426950408889634
    if HAS_SIZES:  # noqa: SIM102 (the first is known to the compiler)
        if size < C:
            s = gl.where(gl.expand_dims(spots, 0) < size, s, float("-inf"))
    best = gl.convert_layout(gl.max(folded(s, True), 1), top.type.layout)
    if not HAS_BIAS:
        best = best * scale
    higher = gl.maximum(top, best)
    base = gl.where(higher == float("-inf"), 0.0, higher) if HAS_SIZES or HAS_BIAS else higher
    # Without a bias the scale goes into one multiply-add with the row's maximum.
    p = gl.exp2(s - gl.expand_dims(base, 1)) if HAS_BIAS else gl.exp2(s * scale - gl.expand_dims(base, 1))
    shrink = gl.exp2(top - base)
    more = folded(p, False)
    faded = total * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, more.type.layout)), 1)
    return p, shrink, higher, faded + more


@gluon.jit
def _attend_list(
    q, index, sizes, bias, count, n, scale, k_tiles, v_tiles, ready, empty,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 queries against a list, block after block: sums, maxima, a thread's sums, and blocks so far."""
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
        at, this, size = n % STAGES, 0, C
        mbarrier.wait(ready.index(at), (n // STAGES) & 1)
        scores = warpgroup_mma(q, k_tiles.index(at).permute((1, 0)), blank, use_acc=False, is_async=True)
        if HAS_SIZES or HAS_BIAS:
            this = gl.load(index)
        if HAS_SIZES:
            size = gl.load(sizes + this)
        s = warpgroup_mma_wait(0, deps=(scores,))
        p, shrink, top, total = _weigh(
            s, top, total, scale, size, spots, bias + this * C, C, HAS_SIZES, HAS_BIAS
        )
        weights = gl.convert_layout(p.to(dtype), p_layout)
        for j in range(1, count):
            to = (n + 1) % STAGES
            mbarrier.wait(ready.index(to), ((n + 1) // STAGES) & 1)
            scores = warpgroup_mma(q, k_tiles.index(to).permute((1, 0)), blank, use_acc=False, is_async=True)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
            adding = warpgroup_mma(weights, v_tiles.index(at), acc, is_async=True)
            if HAS_SIZES or HAS_BIAS:
                this = gl.load(index + j)
            if HAS_SIZES:
                size = gl.load(sizes + this)
            s = warpgroup_mma_wait(1, deps=(scores,))
            p, shrink, top, total = _weigh(
                s, top, total, scale, size, spots, bias + this * C, C, HAS_SIZES, HAS_BIAS
            )
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(empty.index(at), count=1)
            weights = gl.convert_layout(p.to(dtype), p_layout)
            n += 1
            at = to
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
        adding = warpgroup_mma(weights, v_tiles.index(at), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(adding,))
        mbarrier.arrive(empty.index(at), count=1)
        n += 1
    return acc, top, total, n


@gluon.jit
def _compute(
    out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h, bias_b, queries, scale,
    q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty, work, blocks, heads,
    group: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of every block against its list."""
    s_layout: gl.constexpr = _tensor_core(C)
    o_layout: gl.constexpr = _tensor_core(D)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    n, turn = 0, 0
    for task in range(gl.program_id(0), work, gl.num_programs(0)):
        block, row = task % blocks, task // blocks
        b, h = row // heads, row % heads
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        sizes = sizes_ptr + (b.to(gl.int64) * sizes_b + h * sizes_h)
        bias = bias_ptr + b.to(gl.int64) * bias_b
        count = gl.load(count_ptr + b * count_b + h * count_h + block)
        mbarrier.wait(q_ready, turn)
        q = q_tile.index(group).load(q_layout)
        mbarrier.arrive(q_empty, count=1)
        turn ^= 1
        acc, top, total, n = _attend_list(
            q, index, sizes, bias, count, n, scale, k_tiles, v_tiles, ready, empty,
            C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )  # fmt: skip
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
        seen = total > 0.0
        whole = gl.where(seen, total, 1.0)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / whole, o_rows), 1)
        lse = gl.where(seen, (top + gl.log2(whole)) * 0.6931471805599453, float("-inf"))
        first = row.to(gl.int64) * queries + block * C + group * ROWS
        gl.store(lse_ptr + first + gl.arange(0, ROWS, layout=s_rows), lse)
        down = gl.expand_dims(gl.arange(0, ROWS, layout=o_rows), 1)
        across = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, o_layout)), 0)
        gl.store(out_ptr + first * D + (down * D + across), acc.to(out_ptr.dtype.element_ty))


@gluon.jit
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, work, blocks, heads, queries, scale,
    C: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, C, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, C, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    # Constants stay constants only in tuples that are written where they are passed.
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty,
            work, blocks, heads, 0, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_bring, (
            k_desc, v_desc, q_desc, index_ptr, count_ptr, q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c,
            index_b, index_h, index_n, count_b, count_h, q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty,
            work, blocks, heads, C, GROUPS, STAGES,
        )),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty,
            work, blocks, heads, 0, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_compute, (
            out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr, index_b, index_h, index_n, count_b, count_h,
            sizes_b, sizes_h, bias_b, queries, scale, q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty,
            work, blocks, heads, 1, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_bring, (
            k_desc, v_desc, q_desc, index_ptr, count_ptr, q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c,
            index_b, index_h, index_n, count_b, count_h, q_tile, k_tiles, v_tiles, q_ready, q_empty, ready, empty,
            work, blocks, heads, C, GROUPS, STAGES,
        )),
        ], [4, 1], [240, 24])
    # fmt: on


def stages(block: int, dim: int) -> int:
    """Blocks of keys (and of values) in shared memory at a time."""
    at_once = 2 if block == ROWS.value else 1  # programs of one group share a multiprocessor
    return max(2, min(6, (SHARED // at_once - 2 * block * dim - 1024) // (4 * block * dim)))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
    depth: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`. `depth`, blocks in shared memory, is for measurements.

    Raises:
        ValueError: not a 16-bit type.
    """
    if q.dtype not in _KINDS:
        raise ValueError(
            f"the Hopper kernel takes bfloat16 and float16, not {q.dtype}; choose the backend triton."
        )
    b, h, s, d = q.shape
    block = routes.block
    out = torch.empty((b, h, s, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=q.device)
    made = [described(x, r) for x, r in ((q, ROWS.value), (k, block), (v, block))]
    lists, strides = lists_of(routes, bias, b, h)
    work = s // block * b * h
    programs = min(work, multiprocessors(q.device) * (2 if block == ROWS.value else 1))
    launch(
        _forward, (programs,), *(x for x, _ in made), out, lse, *lists,
        *(n for _, steps in made for n in steps), *strides, work, s // block, h, s, scale * LOG2E,
        C=block, D=d, GROUPS=block // ROWS.value, STAGES=depth or stages(block, d),
        HAS_SIZES=routes.sizes is not None, HAS_BIAS=bias is not None,
        num_warps=4, maxnreg=168 if block > ROWS.value else 128,
    )  # fmt: skip
    return out, lse


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def described(x: torch.Tensor, rows: int) -> tuple[Any, tuple[int, int, int]]:
    """A descriptor of (B, H, S, D) in two dimensions; what a batch row and a head move by, in rows and columns."""
    b, h, s, d = x.shape
    if x.stride() == (s * h * d, d, h * d, 1):
        flat, steps = x.transpose(1, 2).reshape(b * s, h * d), (s, 0, d)
    else:
        flat, steps = x.contiguous().view(b * h * s, d), (h * s, s, 0)
    layout = gl.NVMMASharedLayout.get_default_for([rows, d], _KINDS[x.dtype])
    return TensorDescriptor.from_tensor(flat, [rows, d], layout), steps
