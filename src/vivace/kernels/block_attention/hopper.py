"""Block attention for Hopper GPUs in Gluon: Triton's language below the tile level, still without a build step.

Roles follow FlashAttention-3 (arXiv 2407.08608): one warp brings tiles of keys and values by the copy engine, a group
of four warps for every 64 rows of queries computes. A group starts the scores of the next tile before it turns to the
softmax of this one, so that the tensor cores are busy meanwhile, and two groups of one block fill each other's gaps.
"""

# Gluon's decorators turn functions into things that a type checker cannot see through.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

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
    k_desc, v_desc, q_desc, index_ptr, count, q_row, k_row, v_row, q_col, k_col, v_col, q_tile, k_tiles, v_tiles,
    q_ready, k_ready, k_empty, v_ready, v_empty, keys: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: queries once, then the tiles of the list."""
    mbarrier.expect(q_ready, q_desc.block_type.nbytes * GROUPS)
    for group in gl.static_range(GROUPS):
        _load(q_desc, [q_row + group * ROWS, q_col], q_ready, q_tile.index(group))
    for j in range(count):
        at, turn = j % STAGES, (j // STAGES) & 1
        block = gl.load(index_ptr + j)
        # The barriers of empty tiles begin in the phase before their first.
        mbarrier.wait(k_empty.index(at), turn ^ 1)
        mbarrier.expect(k_ready.index(at), k_desc.block_type.nbytes)
        _load(k_desc, [k_row + block * keys, k_col], k_ready.index(at), k_tiles.index(at))
        mbarrier.wait(v_empty.index(at), turn ^ 1)
        mbarrier.expect(v_ready.index(at), v_desc.block_type.nbytes)
        _load(v_desc, [v_row + block * keys, v_col], v_ready.index(at), v_tiles.index(at))


@gluon.jit
def _scores(
    s, index_ptr, sizes_ptr, bias_ptr, j, scale,
    keys: gl.constexpr, layout: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Scores in base 2, -inf where a slot holds no key."""
    s = s * scale
    if HAS_SIZES or HAS_BIAS:
        block = gl.load(index_ptr + j)
        spots = gl.arange(0, keys, layout=gl.SliceLayout(0, layout))
        if HAS_BIAS:
            s = s + gl.expand_dims(gl.load(bias_ptr + block * keys + spots), 0) * 1.4426950408889634
        if HAS_SIZES:
            s = gl.where(gl.expand_dims(spots, 0) < gl.load(sizes_ptr + block), s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, top, total):
    """Probabilities of a tile, what earlier sums shrink by, and the new maxima and sums of the rows."""
    higher = gl.maximum(top, gl.max(s, 1))
    base = gl.where(higher == float("-inf"), 0.0, higher)
    p = gl.exp2(s - gl.expand_dims(base, 1))
    shrink = gl.exp2(top - base)
    return p, shrink, higher, total * shrink + gl.sum(p, 1)


@gluon.jit
def _compute(
    out_ptr, lse_ptr, index_ptr, sizes_ptr, bias_ptr, count, place, scale, q_tile, k_tiles, v_tiles,
    q_ready, k_ready, k_empty, v_ready, v_empty, group, keys: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of the block against the list."""
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = _tensor_core(keys)
    o_layout: gl.constexpr = _tensor_core(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    total = gl.full([ROWS], 0.0, gl.float32, s_rows)
    acc = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
    blank = gl.full([ROWS, keys], 0.0, gl.float32, s_layout)
    q = q_tile.index(group)
    mbarrier.wait(q_ready, 0)
    if count > 0:
        mbarrier.wait(k_ready.index(0), 0)
        started = warpgroup_mma(q, k_tiles.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(started,))
        mbarrier.arrive(k_empty.index(0), count=1)
        for j in range(count - 1):
            at, turn = j % STAGES, (j // STAGES) & 1
            to, next_turn = (j + 1) % STAGES, ((j + 1) // STAGES) & 1
            mbarrier.wait(k_ready.index(to), next_turn)
            started = warpgroup_mma(q, k_tiles.index(to).permute((1, 0)), blank, use_acc=False, is_async=True)
            s = _scores(s, index_ptr, sizes_ptr, bias_ptr, j, scale, keys, s_layout, HAS_SIZES, HAS_BIAS)
            p, shrink, top, total = _softmax(s, top, total)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
            mbarrier.wait(v_ready.index(at), turn)
            weights = gl.convert_layout(p.to(dtype), p_layout)
            adding = warpgroup_mma(weights, v_tiles.index(at), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(started,))
            mbarrier.arrive(k_empty.index(to), count=1)
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(v_empty.index(at), count=1)
        last = count - 1
        s = _scores(s, index_ptr, sizes_ptr, bias_ptr, last, scale, keys, s_layout, HAS_SIZES, HAS_BIAS)
        p, shrink, top, total = _softmax(s, top, total)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, o_rows), 1)
        mbarrier.wait(v_ready.index(last % STAGES), (last // STAGES) & 1)
        adding = warpgroup_mma(
            gl.convert_layout(p.to(dtype), p_layout), v_tiles.index(last % STAGES), acc, is_async=True
        )
        acc = warpgroup_mma_wait(0, deps=(adding,))
    seen = total > 0.0
    whole = gl.where(seen, total, 1.0)
    acc = acc / gl.expand_dims(gl.convert_layout(whole, o_rows), 1)
    lse = gl.where(seen, (top + gl.log2(whole)) * 0.6931471805599453, float("-inf"))
    first = place + group * ROWS
    gl.store(lse_ptr + first + gl.arange(0, ROWS, layout=s_rows), lse)
    down = gl.expand_dims(first + gl.arange(0, ROWS, layout=o_rows), 1)
    across = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, o_layout)), 0)
    gl.store(out_ptr + down * D + across, acc.to(out_ptr.dtype.element_ty))


@gluon.jit
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, heads, queries, scale,
    C: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    block, row = gl.program_id(0), gl.program_id(1)
    b, h = row // heads, row % heads
    index_ptr += b.to(gl.int64) * index_b + h * index_h + block * index_n
    sizes_ptr += b.to(gl.int64) * sizes_b + h * sizes_h
    bias_ptr += b.to(gl.int64) * bias_b
    count = gl.load(count_ptr + b * count_b + h * count_h + block)
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, C, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, C, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)
    q_row, q_col = b * q_b + h * q_h + block * C, h * q_c
    k_row, k_col = b * k_b + h * k_h, h * k_c
    v_row, v_col = b * v_b + h * v_h, h * v_c
    place = row.to(gl.int64) * queries + block * C
    # Constants stay constants only in tuples that are written where they are passed.
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize([
            (_compute, (
            out_ptr, lse_ptr, index_ptr, sizes_ptr, bias_ptr, count, place, scale, q_tile, k_tiles, v_tiles,
            q_ready, k_ready, k_empty, v_ready, v_empty, 0, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_bring, (
            k_desc, v_desc, q_desc, index_ptr, count, q_row, k_row, v_row, q_col, k_col, v_col, q_tile, k_tiles,
            v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, C, GROUPS, STAGES,
        )),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (_compute, (
            out_ptr, lse_ptr, index_ptr, sizes_ptr, bias_ptr, count, place, scale, q_tile, k_tiles, v_tiles,
            q_ready, k_ready, k_empty, v_ready, v_empty, 0, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_compute, (
            out_ptr, lse_ptr, index_ptr, sizes_ptr, bias_ptr, count, place, scale, q_tile, k_tiles, v_tiles,
            q_ready, k_ready, k_empty, v_ready, v_empty, 1, C, D, STAGES, HAS_SIZES, HAS_BIAS,
        )),
            (_bring, (
            k_desc, v_desc, q_desc, index_ptr, count, q_row, k_row, v_row, q_col, k_col, v_col, q_tile, k_tiles,
            v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, C, GROUPS, STAGES,
        )),
        ], [4, 1], [240, 24])
    # fmt: on


def stages(block: int, dim: int) -> int:
    """Tiles of keys (and of values) in shared memory at a time."""
    tile = 2 * block * dim
    at_once = 2 if block == ROWS.value else 1  # programs of one group share a multiprocessor
    return max(2, min(4, (SHARED // at_once - tile - 1024) // (2 * tile)))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
    depth: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`. `depth`, tiles in shared memory, is for measurements.

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
    described = [_described(x, r) for x, r in ((q, ROWS.value), (k, block), (v, block))]
    lists, strides = lists_of(routes, bias, b, h)
    launch(
        _forward, (s // block, b * h), *(d for d, _ in described), out, lse, *lists,
        *(n for _, steps in described for n in steps), *strides, h, s, scale * LOG2E,
        C=block, D=d, GROUPS=block // ROWS.value, STAGES=depth or stages(block, d), HAS_SIZES=routes.sizes is not None,
        HAS_BIAS=bias is not None, num_warps=4, maxnreg=168 if block > ROWS.value else 128,
    )  # fmt: skip
    return out, lse


def _described(x: torch.Tensor, rows: int) -> tuple[Any, tuple[int, int, int]]:
    """A descriptor of (B, H, S, D) in two dimensions; what a batch row and a head move by, in rows and columns."""
    b, h, s, d = x.shape
    if x.stride() == (s * h * d, d, h * d, 1):
        flat, steps = x.transpose(1, 2).reshape(b * s, h * d), (s, 0, d)
    else:
        flat, steps = x.contiguous().view(b * h * s, d), (h * s, s, 0)
    layout = gl.NVMMASharedLayout.get_default_for([rows, d], _KINDS[x.dtype])
    return TensorDescriptor.from_tensor(flat, [rows, d], layout), steps
