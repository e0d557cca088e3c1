"""A persistent matrix product for Hopper GPUs in Gluon: a warp brings tiles, two groups of warps multiply 64 rows each.

A program keeps to its multiprocessor and takes one tile of 128 x 256 after the other; the next tile's operands are on
their way while this one's results are scaled, finished and stored. A residual comes to where the result will stand
while the product is being made.
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
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vivace.kernels.block_attention.hopper import multiprocessors
from vivace.kernels.launch import launch
from vivace.kernels.scaled_matmul.spec import After

# Triton 3.9 calls them so.
_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
ROWS = gl.constexpr(64)
"""Rows of a group of warps."""
GROUPS = gl.constexpr(2)
WIDE, DEPTH = 256, 128
"""Columns of a tile, and numbers along K that are brought at a time."""
STAGES = 3
BESIDE = 8
"""Tiles of rows that run side by side, so that they find the weights in the cache."""


_GELU = gl.constexpr(
    "{ .reg .f32 u, t; mul.f32 t, $1, $1; fma.rn.f32 t, t, 0f3D372713, 0f3F800000; mul.f32 u, $1, t; "
    "mul.f32 u, u, 0fC0135761; ex2.approx.ftz.f32 u, u; add.f32 u, u, 0f3F800000; rcp.approx.ftz.f32 u, u; "
    "mul.f32 $0, $1, u; }"
)
"""x / (1 + 2^-(2 sqrt(2 / pi) log2(e) (x + .044715 x^3))), a number at a time: written with tensors, the compiler keeps
a whole tile of every intermediate, and spills it."""


@gluon.jit
def _place(tile, m_tiles, n_tiles, BESIDE: gl.constexpr):
    """Row and column of a tile: down a few rows first, then one column further."""
    wide = BESIDE * n_tiles
    first = tile // wide * BESIDE
    high = gl.minimum(m_tiles - first, BESIDE)
    return first + tile % wide % high, tile % wide // high


@gluon.jit
def _bring(
    a_desc, b_desc, a_tiles, b_tiles, ready, empty, m_tiles, n_tiles, steps,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """The producer."""
    n = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        i, j = _place(tile, m_tiles, n_tiles, BESIDE)
        for step in range(steps):
            at, phase = n % STAGES, (n // STAGES) & 1
            # The barriers of empty tiles begin in the phase before their first.
            mbarrier.wait(empty.index(at), phase ^ 1)
            mbarrier.expect(ready.index(at), a_desc.block_type.nbytes * GROUPS + b_desc.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                row = (i * GROUPS + group) * ROWS
                _load(a_desc, [row, step * BK], ready.index(at), a_tiles.index(at * GROUPS + group))
            _load(b_desc, [j * BN, step * BK], ready.index(at), b_tiles.index(at))
            n += 1


@gluon.jit
def _multiply(
    y_desc, r_desc, a_tiles, b_tiles, y_tiles, ready, empty, arrived, a_scale_ptr, b_scale_ptr, bias_ptr, gate_ptr,
    m, n_all, m_tiles, n_tiles, steps, run_length,
    GROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, BESIDE: gl.constexpr, INT8: gl.constexpr,
    BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 rows of every tile."""
    # Triton 3.6 knows no integer products wider than 224.
    columns_at_once: gl.constexpr = BN // 2 if INT8 else BN
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns_at_once, 32]
    )
    kind: gl.constexpr = gl.int32 if INT8 else gl.float32
    across = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    down = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n, turn = 0, 0
    own = y_tiles.index(GROUP)
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        i, j = _place(tile, m_tiles, n_tiles, BESIDE)
        corner = (i * GROUPS + GROUP) * ROWS
        # The last result has left its place, or is waited for.
        tma.store_wait(0)
        if RESIDUAL:
            mbarrier.expect(arrived.index(GROUP), r_desc.block_type.nbytes)
            _load(r_desc, [corner, j * BN], arrived.index(GROUP), own)
        acc = gl.zeros([ROWS, BN], kind, layout)
        for _step in range(steps):
            at = n % STAGES
            mbarrier.wait(ready.index(at), (n // STAGES) & 1)
            product = warpgroup_mma(
                a_tiles.index(at * GROUPS + GROUP), b_tiles.index(at).permute((1, 0)), acc, is_async=True
            )
            # The other group's products fill the tensor cores meanwhile.
            acc = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(at), count=1)
            n += 1
        rows, columns = corner + down, j * BN + across
        there, inside = rows < m, columns < n_all
        y = acc.to(gl.float32) * gl.expand_dims(gl.load(a_scale_ptr + rows, mask=there, other=0.0), 1)
        y = y * gl.expand_dims(gl.load(b_scale_ptr + columns, mask=inside, other=0.0), 0)
        if BIAS:
            y = y + gl.expand_dims(gl.load(bias_ptr + columns, mask=inside, other=0.0).to(gl.float32), 0)
        if GELU:
            y = gl.inline_asm_elementwise(_GELU, "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1)
        if RESIDUAL:
            if GATE:
                run = corner // run_length
                if gl.minimum(corner + ROWS, m) <= (run + 1) * run_length:
                    gate = gl.load(gate_ptr + run * n_all + columns, mask=inside, other=0.0)
                    y = y * gl.expand_dims(gate.to(gl.float32), 0)
                else:
                    # Rows behind the last have no gate and no result; they read the first one's.
                    place = gl.expand_dims(gl.where(there, rows // run_length * n_all, 0), 1)
                    place = place + gl.expand_dims(columns, 0)
                    y = y * gl.load(gate_ptr + place, mask=gl.expand_dims(inside, 0), other=0.0).to(
                        gl.float32
                    )
            mbarrier.wait(arrived.index(GROUP), turn)
            turn ^= 1
            y = y + own.load(layout).to(gl.float32)
        own.store(y.to(y_desc.dtype))
        fence_async_shared()
        _store(y_desc, [corner, j * BN], own)
    tma.store_wait(0)


@gluon.jit
def _matmul(
    a_desc, b_desc, y_desc, r_desc, a_scale_ptr, b_scale_ptr, bias_ptr, gate_ptr,
    m, n_all, m_tiles, n_tiles, steps, run_length,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BESIDE: gl.constexpr, INT8: gl.constexpr,
    BIAS: gl.constexpr, GELU: gl.constexpr, RESIDUAL: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * GROUPS, ROWS, BK], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, ROWS, BN], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(GROUPS):
        mbarrier.init(arrived.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    # Constants stay constants only in tuples that are written where they are passed.
    # fmt: off
    gl.warp_specialize([
        (_multiply, (y_desc, r_desc, a_tiles, b_tiles, y_tiles, ready, empty, arrived, a_scale_ptr, b_scale_ptr,
                     bias_ptr, gate_ptr, m, n_all, m_tiles, n_tiles, steps, run_length,
                     0, BN, STAGES, BESIDE, INT8, BIAS, GELU, RESIDUAL, GATE)),
        (_multiply, (y_desc, r_desc, a_tiles, b_tiles, y_tiles, ready, empty, arrived, a_scale_ptr, b_scale_ptr,
                     bias_ptr, gate_ptr, m, n_all, m_tiles, n_tiles, steps, run_length,
                     1, BN, STAGES, BESIDE, INT8, BIAS, GELU, RESIDUAL, GATE)),
        (_bring, (a_desc, b_desc, a_tiles, b_tiles, ready, empty, m_tiles, n_tiles, steps, BN, BK, STAGES, BESIDE)),
    ], [4, 1], [240, 24])
    # fmt: on


def _described(x: torch.Tensor, tile: list[int], kind: Any) -> Any:
    return TensorDescriptor.from_tensor(x, tile, _layout(*tile, kind))


@functools.cache
def _layout(rows: int, columns: int, kind: Any) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


KINDS: dict[torch.dtype, Any] = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}


def run(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None,
    after: After, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """See `spec`; `dtype` is bfloat16 or float16.

    Raises:
        ValueError: another dtype of the result.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the Hopper kernel gives bfloat16 or float16, not {dtype}; take backend triton.")
    (m, k), n = a.shape, b.shape[0]
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty((m, n), dtype=dtype, device=a.device)
    residual = y if after.residual is None else after.residual.to(dtype).contiguous()
    gate = None if after.gate is None else after.gate.contiguous()
    # Where a tensor is not there, the scales stand in for a pointer that is never read.
    given = [a_scale if t is None else t for t in (bias, gate)]
    high = ROWS.value * GROUPS.value
    m_tiles, n_tiles = -(-m // high), -(-n // WIDE)
    launch(
        _matmul, (min(m_tiles * n_tiles, multiprocessors(a.device)),),
        _described(a, [ROWS.value, DEPTH], KINDS[a.dtype]), _described(b, [WIDE, DEPTH], KINDS[b.dtype]),
        *(_described(t, [ROWS.value, WIDE], KINDS[dtype]) for t in (y, residual)),
        a_scale.contiguous(), b_scale.contiguous(), *given,
        m, n, m_tiles, n_tiles, -(-k // DEPTH), 1 if gate is None else m // gate.shape[0],
        BN=WIDE, BK=DEPTH, STAGES=STAGES, BESIDE=BESIDE, INT8=a.dtype == torch.int8,
        BIAS=bias is not None, GELU=after.gelu, RESIDUAL=after.residual is not None, GATE=gate is not None,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return y
