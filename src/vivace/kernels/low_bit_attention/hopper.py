"""Low-bit attention for Hopper GPUs in Gluon: roles and order of `vivace.kernels.block_attention.hopper`, in 8 bits.

INT8 scores come out as integers. They are added to the bits of 1.5 * 2^23, so that the sum already is the bits of a
float and no conversion is needed; the offset disappears in the exponent's multiply-add. Probabilities stay in the
registers where the scores came out: values are stored with their keys in the order in which the tensor cores want to
find them there (a permutation inside every 16), as FlashAttention-3 does for FP8 (arXiv 2407.08608).
"""

# Gluon's decorators turn functions into things that a type checker cannot see through.
# pyright: reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

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

from vivace.kernels.block_attention.hopper import ROWS, SHARED, described, folded, multiprocessors
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.launch import launch
from vivace.kernels.low_bit_attention.rounding import Rounded, rounded

# Triton 3.9 calls it so.
_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
OFFSET = gl.constexpr(12582912.0)
"""1.5 * 2^23: floats around it are one apart."""
OFFSET_BITS = gl.constexpr(0x4B400000)


@gluon.constexpr_function
def _tensor_core(columns, depth=32):
    """Layout of a product of 64 rows by so many columns in the registers of four warps; `depth` of an instruction."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth])


@gluon.constexpr_function
def _unless_all_one(number):
    """Assembly of so many numbers times as many factors, which a warp jumps over where its factors are all 1.

    A thread's numbers are of two rows, which change every second number; only the first factor of each row is asked.
    """
    out, x, by = 0, number, 2 * number
    lines = [
        "{ .reg .pred differs, any;",
        f"setp.neu.f32 differs, ${by}, 0f3F800000;",
        f"setp.neu.or.f32 differs, ${by + 2}, 0f3F800000, differs;",
        "vote.sync.any.pred any, differs, 0xffffffff;",
        *(f"mov.f32 ${out + i}, ${x + i};" for i in range(number)),
        "@!any bra DONE;",
        *(f"mul.f32 ${out + i}, ${out + i}, ${by + i};" for i in range(number)),
        "DONE: }",
    ]
    return " ".join(lines)


@gluon.constexpr_function
def _unless_operands(number):
    return ",".join(["=&f"] * number + ["f"] * (2 * number))


_BEHIND = gl.constexpr(
    "{ .reg .pred below; setp.lt.f32 below, $2, 0f00000000; setp.lt.or.f32 below, $3, 0f00000000, below; "
    "mov.f32 $0, $2; mov.f32 $1, $3; @!below bra DONE; "
    + "fma.rn.f32 $0, $0, $1, $2; fma.rn.f32 $1, $1, $0, $3; " * 16
    + "DONE: }"
)


@gluon.jit
def _shrunk(acc, shrink, LAZY: gl.constexpr):
    """Sums times what they shrink by, row by row; LAZY: mostly by nothing, and then skipped."""
    by = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    if LAZY:
        number: gl.constexpr = acc.shape[1] // 2
        acc = gl.inline_asm_elementwise(
            _unless_all_one(number),
            _unless_operands(number),
            [acc, by],
            dtype=gl.float32,
            is_pure=True,
            pack=number,
        )
    else:
        acc = acc * by
    return acc


@gluon.jit
def _settled(total):
    """Sums of threads, behind a branch that is never taken (they are not negative).

    The assembler moves nothing across a branch. Without one it waits for the values in the middle of the exponentials.
    """
    return gl.inline_asm_elementwise(_BEHIND, "=&f,=&f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def _bring(
    descriptors, lists, shared, extent, values,
    STREAM: gl.constexpr, STREAMS: gl.constexpr, C: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, DENSE: gl.constexpr, PV8: gl.constexpr,
):  # fmt: skip
    """A producer: for every block of queries these, then the keys and values of its list."""
    q_desc, k_desc, v_desc = descriptors
    index_ptr, count_ptr, _, _, index_b, index_h, index_n, count_b, count_h, _, _, _ = lists
    q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty = shared
    work, blocks, heads, _, keys, query_slots, key_slots = extent
    v_b, v_h, v_c = values
    n, turn = 0, 0
    for task in range(gl.program_id(0) * STREAMS + STREAM, work, gl.num_programs(0) * STREAMS):
        block, row = task % blocks, task // blocks
        b, h = row // heads, row % heads
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        count = (keys + C - 1) // C if DENSE else gl.load(count_ptr + b * count_b + h * count_h + block)
        mbarrier.wait(q_empty.index(STREAM), turn ^ 1)
        mbarrier.expect(q_ready.index(STREAM), q_desc.block_type.nbytes * GROUPS)
        for group in gl.static_range(GROUPS):
            first = row * query_slots + block * C + group * ROWS
            _load(q_desc, [first, 0], q_ready.index(STREAM), q_tiles.index(STREAM * GROUPS + group))
        here = 0 if DENSE else gl.load(index)
        for t in range(count):
            # A list's next entry is on its way while this one waits for room.
            following = gl.minimum(t + 1, count - 1)
            if not DENSE:
                following = gl.load(index + following)
            at, phase = STREAM * STAGES + n % STAGES, (n // STAGES) & 1
            # The barriers of empty blocks begin in the phase before their first.
            mbarrier.wait(empty.index(at), phase ^ 1)
            mbarrier.expect(ready.index(at), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            _load(k_desc, [row * key_slots + here * C, 0], ready.index(at), k_tiles.index(at))
            if PV8:
                _load(v_desc, [row * D, here * C], ready.index(at), v_tiles.index(at))
            else:
                _load(v_desc, [b * v_b + h * v_h + here * C, h * v_c], ready.index(at), v_tiles.index(at))
            here = following
            n += 1
        turn ^= 1


@gluon.jit
def _weigh(
    s, top, total, factor, size, spots, bias_ptr,
    C: gl.constexpr, PV8: gl.constexpr, LAZY: gl.constexpr, MASKED: gl.constexpr, HAS_SIZES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Probabilities of a block, what earlier sums shrink by, new maxima of rows and sums of threads.

    `s` are integer scores over OFFSET_BITS, `factor` what they stand for by row, in base 2. For FP8 probabilities come
    448 times as large: they fill its range, and the factor cancels in the end. LAZY: a row keeps its maximum until one
    is 2^8 times as large (FlashAttention-4 does so), which changes nothing in numbers with eight bits of exponent.
    """
    s = s.to(gl.float32, bitcast=True)
    if HAS_BIAS:
        s = (s - OFFSET) * gl.expand_dims(factor, 1)
        s = s + gl.expand_dims(gl.load(bias_ptr + spots), 0) * 1.4426950408889634
    if MASKED:  # noqa: SIM102 (the first is known to the compiler)
        if size < C:
            s = gl.where(gl.expand_dims(spots, 0) < size, s, float("-inf"))
    best = gl.convert_layout(gl.max(folded(s, True), 1), top.type.layout)
    if not HAS_BIAS:
        best = (best - OFFSET) * factor
    higher = gl.where(best > top + 8.0, best, top) if LAZY else gl.maximum(top, best)
    base = gl.where(higher == float("-inf"), 0.0, higher) if HAS_SIZES or HAS_BIAS else higher
    shrink = gl.exp2(top - base)
    lower = base - 8.807354922057604 if PV8 else base
    if HAS_BIAS:
        p = gl.exp2(s - gl.expand_dims(lower, 1))
    else:
        p = gl.exp2(s * gl.expand_dims(factor, 1) - gl.expand_dims(lower + OFFSET * factor, 1))
    more = folded(p, False)
    faded = total * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, more.type.layout)), 1)
    return p, shrink, higher, faded + more


@gluon.jit
def _operand(p, layout: gl.constexpr, kind: gl.constexpr, C: gl.constexpr, PV8: gl.constexpr):
    """Probabilities as the left operand of their product with values, without moving any."""
    if PV8:
        # Keys stand woven as `rounding` weaves them.
        p = gl.permute(gl.reshape(p, [ROWS, C // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
        p = gl.convert_layout(gl.reshape(p, [ROWS, C]), layout, assert_trivial=True)
        # Four at a time: the compiler's own conversion packs two and takes three instructions to join them.
        weights = gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
            "mov.b32 $0, {lo, hi}; }",
            "=r,f,f,f,f",
            [p],
            dtype=gl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    else:
        weights = gl.convert_layout(p.to(kind), layout)
    return weights


@gluon.jit
def _values(v_tiles, at, PV8: gl.constexpr):
    """Values of a block as a right operand: (C, D)."""
    return v_tiles.index(at).permute((1, 0)) if PV8 else v_tiles.index(at)


@gluon.jit
def _real_keys(sizes, block, keys, C: gl.constexpr, HAS_SIZES: gl.constexpr):
    """Real keys from a block's first on."""
    return gl.load(sizes + block) if HAS_SIZES else keys - block * C


@gluon.jit
def _attend_list(
    q, q_scale, index, scales, sizes, bias, count, keys, n, k_tiles, v_tiles, ready, empty,
    STREAM: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr,
    PV8: gl.constexpr, MASKED: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """64 queries against a list, block after block: sums, maxima, a thread's sums, and blocks so far."""
    s_layout: gl.constexpr = _tensor_core(C)
    o_layout: gl.constexpr = _tensor_core(D, 32 if PV8 else 16)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4 if PV8 else 2)
    # For FP8 both were measured to gain nothing.
    LAZY: gl.constexpr = not PV8
    SETTLE: gl.constexpr = not PV8 and C > ROWS
    blank = gl.full([ROWS, C], OFFSET_BITS, gl.int32, s_layout)
    spots = gl.arange(0, C, layout=gl.SliceLayout(0, s_layout))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = folded(gl.full([ROWS, C], 0.0, gl.float32, s_layout), False)
    acc = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
    if count > 0:
        at = STREAM * STAGES + n % STAGES
        this = 0 if DENSE else gl.load(index)
        factor, size = q_scale * gl.load(scales + this), _real_keys(sizes, this, keys, C, HAS_SIZES)
        mbarrier.wait(ready.index(at), (n // STAGES) & 1)
        scores = warpgroup_mma(q, k_tiles.index(at).permute((1, 0)), blank, is_async=True)
        s = warpgroup_mma_wait(0, deps=(scores,))
        p, shrink, top, total = _weigh(
            s, top, total, factor, size, spots, bias + this * C, C, PV8, LAZY, MASKED, HAS_SIZES, HAS_BIAS
        )
        weights = _operand(p, p_layout, v_tiles.dtype, C, PV8)
        for j in range(1, count):
            to = STREAM * STAGES + (n + 1) % STAGES
            if PV8:
                # Here and not where they are made: the compiler takes bytes that cross an iteration apart.
                weights = _operand(p, p_layout, v_tiles.dtype, C, PV8)
            mbarrier.wait(ready.index(to), ((n + 1) // STAGES) & 1)
            scores = warpgroup_mma(q, k_tiles.index(to).permute((1, 0)), blank, is_async=True)
            acc = _shrunk(acc, shrink, LAZY)
            adding = warpgroup_mma(weights, _values(v_tiles, at, PV8), acc, is_async=True)
            this = j if DENSE else gl.load(index + j)
            factor, size = q_scale * gl.load(scales + this), _real_keys(sizes, this, keys, C, HAS_SIZES)
            s = warpgroup_mma_wait(1, deps=(scores,))
            p, shrink, top, total = _weigh(
                s, top, total, factor, size, spots, bias + this * C, C, PV8, LAZY, MASKED, HAS_SIZES, HAS_BIAS
            )
            if SETTLE:
                total = _settled(total)
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(empty.index(at), count=1)
            if not PV8:
                weights = _operand(p, p_layout, v_tiles.dtype, C, PV8)
            n += 1
            at = to
        if PV8:
            weights = _operand(p, p_layout, v_tiles.dtype, C, PV8)
        acc = _shrunk(acc, shrink, LAZY)
        adding = warpgroup_mma(weights, _values(v_tiles, at, PV8), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(adding,))
        mbarrier.arrive(empty.index(at), count=1)
        n += 1
    return acc, top, total, n


@gluon.jit
def _compute(
    results, scalings, lists, shared, extent,
    STREAM: gl.constexpr, STREAMS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, C: gl.constexpr,
    D: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, DENSE: gl.constexpr, PV8: gl.constexpr,
    MASKED: gl.constexpr, HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of every block against its list."""
    out_ptr, lse_ptr = results
    qs_ptr, ks_ptr, vs_ptr, shift_ptr = scalings
    (
        index_ptr,
        count_ptr,
        sizes_ptr,
        bias_ptr,
        index_b,
        index_h,
        index_n,
        count_b,
        count_h,
        sizes_b,
        sizes_h,
        bias_b,
    ) = lists
    q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty = shared
    work, blocks, heads, queries, keys, query_slots, key_slots = extent
    s_layout: gl.constexpr = _tensor_core(C)
    o_layout: gl.constexpr = _tensor_core(D, 32 if PV8 else 16)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 4)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    own = GROUP * ROWS + gl.arange(0, ROWS, layout=s_rows)
    n, turn = 0, 0
    for task in range(gl.program_id(0) * STREAMS + STREAM, work, gl.num_programs(0) * STREAMS):
        block, row = task % blocks, task // blocks
        b, h, wide = row // heads, row % heads, row.to(gl.int64)
        index = index_ptr + (b.to(gl.int64) * index_b + h * index_h + block * index_n)
        sizes = sizes_ptr + (b.to(gl.int64) * sizes_b + h * sizes_h)
        bias, scales = bias_ptr + b.to(gl.int64) * bias_b, ks_ptr + wide * (key_slots // C)
        count = (keys + C - 1) // C if DENSE else gl.load(count_ptr + b * count_b + h * count_h + block)
        q_scale = gl.load(qs_ptr + (wide * query_slots + block * C + own) // G)
        mbarrier.wait(q_ready.index(STREAM), turn)
        turn ^= 1
        q = q_tiles.index(STREAM * GROUPS + GROUP).load(q_layout)
        mbarrier.arrive(q_empty.index(STREAM), count=1)
        acc, top, total, n = _attend_list(
            q, q_scale, index, scales, sizes, bias, count, keys, n, k_tiles, v_tiles, ready, empty,
            STREAM, C, D, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS,
        )  # fmt: skip
        total = gl.convert_layout(gl.sum(total, 1), s_rows)
        seen = total > 0.0
        whole = gl.where(seen, total, 1.0)
        across = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / whole, o_rows), 1)
        lse = top + gl.log2(whole)
        if PV8:
            acc = acc * gl.expand_dims(gl.load(vs_ptr + wide * D + across), 0)
            # log2(448)
            lse = lse - 8.807354922057604
        mine = block * C + own
        lse = gl.where(
            seen, lse * 0.6931471805599453 + gl.load(shift_ptr + wide * query_slots + mine), float("-inf")
        )
        gl.store(lse_ptr + wide * queries + mine, lse, mask=mine < queries)
        down = gl.expand_dims(block * C + GROUP * ROWS + gl.arange(0, ROWS, layout=o_rows), 1)
        place = wide * queries * D + down * D + gl.expand_dims(across, 0)
        gl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=down < queries)


@gluon.jit
def _attend(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, qs_ptr, ks_ptr, vs_ptr, shift_ptr,
    index_ptr, count_ptr, sizes_ptr, bias_ptr,
    index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h, bias_b, v_b, v_h, v_c,
    work, blocks, heads, queries, keys, query_slots, key_slots,
    C: gl.constexpr, D: gl.constexpr, G: gl.constexpr, STREAMS: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, DENSE: gl.constexpr, PV8: gl.constexpr, MASKED: gl.constexpr,
    HAS_SIZES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [STREAMS * GROUPS, ROWS, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STREAMS * STAGES, C, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(
        v_desc.dtype, [STREAMS * STAGES, D, C] if PV8 else [STREAMS * STAGES, C, D], v_desc.layout
    )
    q_ready = gl.allocate_shared_memory(gl.int64, [STREAMS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STREAMS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STREAMS * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STREAMS * STAGES, 1], mbarrier.MBarrierLayout())
    for stream in gl.static_range(STREAMS):
        mbarrier.init(q_ready.index(stream), count=1)
        mbarrier.init(q_empty.index(stream), count=GROUPS)
    for stage in gl.static_range(STREAMS * STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    descriptors, results = (q_desc, k_desc, v_desc), (out_ptr, lse_ptr)
    scalings, values = (qs_ptr, ks_ptr, vs_ptr, shift_ptr), (v_b, v_h, v_c)
    lists = (
        index_ptr, count_ptr, sizes_ptr, bias_ptr,
        index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h, bias_b,
    )  # fmt: skip
    shared = (q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty)
    extent = (work, blocks, heads, queries, keys, query_slots, key_slots)
    # Constants stay constants only in tuples that are written where they are passed.
    # fmt: off
    if STREAMS == 3:
        gl.warp_specialize([
            (_compute, (results, scalings, lists, shared, extent,
                        0, STREAMS, 0, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_compute, (results, scalings, lists, shared, extent,
                        1, STREAMS, 0, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_compute, (results, scalings, lists, shared, extent,
                        2, STREAMS, 0, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_bring, (descriptors, lists, shared, extent, values, 0, STREAMS, C, D, GROUPS, STAGES, DENSE, PV8)),
            (_bring, (descriptors, lists, shared, extent, values, 1, STREAMS, C, D, GROUPS, STAGES, DENSE, PV8)),
            (_bring, (descriptors, lists, shared, extent, values, 2, STREAMS, C, D, GROUPS, STAGES, DENSE, PV8)),
        ], [4, 4, 1, 1, 1], [160, 160, 24, 24, 24])
    elif GROUPS == 1:
        gl.warp_specialize([
            (_compute, (results, scalings, lists, shared, extent,
                        0, STREAMS, 0, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_bring, (descriptors, lists, shared, extent, values, 0, STREAMS, C, D, GROUPS, STAGES, DENSE, PV8)),
        ], [1], [24])
    else:
        gl.warp_specialize([
            (_compute, (results, scalings, lists, shared, extent,
                        0, STREAMS, 0, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_compute, (results, scalings, lists, shared, extent,
                        0, STREAMS, 1, GROUPS, C, D, G, STAGES, DENSE, PV8, MASKED, HAS_SIZES, HAS_BIAS)),
            (_bring, (descriptors, lists, shared, extent, values, 0, STREAMS, C, D, GROUPS, STAGES, DENSE, PV8)),
        ], [4, 1], [240, 24])
    # fmt: on


def stages(block: int, dim: int, value_bytes: int, streams: int) -> int:
    """Blocks of keys (and of values) in shared memory at a time, for each of a multiprocessor's lists."""
    return max(2, min(5, (SHARED // streams - block * dim - 1024) // ((1 + value_bytes) * block * dim)))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes | None,
    scale: float,
    bias: torch.Tensor | None,
    qk: str,
    pv: str,
    block: int,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`; `qk` is int8."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sizes = None
    if routes is not None and routes.sizes is not None:
        sizes = routes.sizes.contiguous().expand(q.shape[0], q.shape[1], -1)
    made = rounded(q, k, v, sizes, scale, block, group, True, pv == "fp8", woven=True)
    return attend(q, made, routes, sizes, bias, k.shape[2], block, group)


def attend(
    q: torch.Tensor, r: Rounded, routes: Routes | None, sizes: torch.Tensor | None, bias: torch.Tensor | None,
    keys: int, block: int, group: int, depth: int = 0, streams: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The attention kernel alone. `depth` (blocks in shared memory) and `streams` are for measurements.

    Args:
        q: (B, H, SQ, D), for shape and dtype.
        sizes: of `routes`, for every head.
        keys: SK, before it was padded.
    """
    b, h, queries, d = q.shape
    out = torch.empty((b, h, queries, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, queries), dtype=torch.float32, device=q.device)
    query_slots, key_slots, pv8 = r.q.shape[2], r.k.shape[2], r.v.dtype == torch.float8_e4m3fn
    steps = (0, 0, 0)
    if pv8:
        values = _described(r.v.view(-1, key_slots), [d, block], gl.float8e4nv)
    else:
        values, steps = described(r.v, block)
    # Where a tensor is not there, something stands in for a pointer that is never read.
    index, count, of_lists = r.shift, r.shift, [0] * 5
    if routes is not None:
        index = routes.index.contiguous().expand(b, h, -1, -1)
        count = routes.count.contiguous().expand(b, h, -1)
        of_lists = [*index.stride()[:3], *count.stride()[:2]]
    lengths, strides = (r.shift, [0, 0]) if sizes is None else (sizes, list(sizes.stride()[:2]))
    added = r.shift if bias is None else _padded(bias.float(), key_slots)
    blocks = query_slots // block
    work = blocks * b * h
    # Lists that a multiprocessor works on together: one, one each in two programs, or three in one.
    streams = streams or (1 if block > ROWS.value else 3 if pv8 else 2)
    at_once = 2 if streams == 2 else 1
    programs = min(work, multiprocessors(q.device) * at_once)
    launch(
        _attend, (programs,), _described(r.q.view(-1, d), [ROWS.value, d], gl.int8),
        _described(r.k.view(-1, d), [block, d], gl.int8), values, out, lse, r.q_scales, r.k_scales, r.v_scales, r.shift,
        index, count, lengths, added, *of_lists, *strides, 0 if bias is None else added.stride(0), *steps,
        work, blocks, h, queries, keys, query_slots, key_slots,
        C=block, D=d, G=group, STREAMS=3 if streams == 3 else 1, GROUPS=block // ROWS.value,
        STAGES=depth or stages(block, d, 1 if pv8 else 2, streams),
        DENSE=routes is None, PV8=pv8,
        MASKED=sizes is not None or keys % block != 0, HAS_SIZES=sizes is not None, HAS_BIAS=bias is not None,
        num_warps=4, maxnreg=168 if streams == 1 else 128,
    )  # fmt: skip
    return out, lse


def _padded(bias: torch.Tensor, slots: int) -> torch.Tensor:
    """(B, SK) with zeros behind, to whole blocks: the kernel reads them all."""
    return torch.nn.functional.pad(bias, (0, slots - bias.shape[1])).contiguous()


def _described(x: torch.Tensor, tile: list[int], kind: Any) -> Any:
    """A descriptor of a matrix in parts."""
    return TensorDescriptor.from_tensor(x, tile, gl.NVMMASharedLayout.get_default_for(tile, kind))
