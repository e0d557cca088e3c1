"""Block selection in one Triton kernel: a row stays in registers, thresholds are found by bisection and not by sorting.

Scores become integers that order like them, so that at most 32 halvings find the exact k-th largest; the walk ends as
soon as the threshold parts the right number. The same walk with sums of probabilities finds the threshold of a mass.
A row of up to 1,024 blocks is one warp's: its sums need no shared memory.
"""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch

PER_WARP = 1024
"""Blocks of a row that one warp holds."""


@triton.jit
def _ordered(x):
    """Float32 as int32 that orders alike; -inf comes first, and both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _number(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _middle(low, high):
    """Of two int32, rounded down, without the overflow of their sum."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _select(
    scores_ptr, forced_ptr, also_ptr, index_ptr, count_ptr, queries, keys, top, mass, text, heads, also_b, also_h,
    N: tl.constexpr, CHOSEN: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_ALSO: tl.constexpr, HAS_TOP: tl.constexpr,
    HAS_MASS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    row, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = keys + text
    place = lane * (queries + text) + row
    index_ptr += place * width
    spots = tl.arange(0, N)
    if row >= queries:
        tl.store(index_ptr + spots, spots, mask=spots < width)
        tl.store(count_ptr + place, width)
    else:
        inside = spots < keys
        scores_ptr += (lane * queries + row) * keys
        if CHOSEN:
            keep = tl.load(scores_ptr + spots, mask=inside, other=0) != 0
        else:
            s = tl.load(scores_ptr + spots, mask=inside, other=float("-inf"))
            able = s > float("-inf")
            order = _ordered(s)
            keep = spots < 0
        if HAS_FORCED:
            must = tl.load(forced_ptr + row * keys + spots, mask=inside, other=0) != 0
            if not CHOSEN:
                able = able | must
                order = tl.where(must, 0x7F800000, order)
        if not CHOSEN:
            order = tl.where(able, order, -2139095041)  # -inf
            least = tl.min(tl.where(able, order, 0x7F800001), 0)
            most = tl.max(order, 0) + 1
        if HAS_TOP:
            # The largest threshold that at least `top` blocks reach; below it stand all that can be taken.
            low, high, reach = least, most, _number(able)
            while (reach > top) & (low + 1 < high):
                middle = _middle(low, high)
                n = _number(order >= middle)
                enough = n >= top
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
                reach = tl.where(enough, n, reach)
            above, equal = (order > low) & able, (order == low) & able
            nth = tl.cumsum(equal.to(tl.int32), 0)
            keep = above | (equal & (nth <= top - _number(above)))
        if HAS_MASS:
            if SOFTMAX:
                peak = tl.max(s, 0)
                weights = tl.exp(s - tl.where(peak == float("-inf"), 0.0, peak))
                weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
            else:
                weights = tl.where(s > float("-inf"), s, 0.0)
            weights = tl.where(able, weights, 0.0)
            low, high, reach = least, most, _number(able)
            beyond = reach - reach
            # Until one block is left between the thresholds, or equal ones.
            while (reach - beyond > 1) & (low + 1 < high):
                middle = _middle(low, high)
                over = order >= middle
                n = _number(over)
                enough = tl.sum(tl.where(over, weights, 0.0), 0) >= mass
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
                reach, beyond = tl.where(enough, n, reach), tl.where(enough, beyond, n)
            low = tl.min(tl.where(able & (order >= low), order, 0x7F800001), 0)
            above, equal = (order > low) & able, (order == low) & able
            # Of equal ones as many as are needed: those before a block must fall short.
            before = tl.sum(tl.where(above, weights, 0.0), 0)
            sums = tl.cumsum(tl.where(equal, weights, 0.0), 0) - tl.where(equal, weights, 0.0)
            keep = keep | above | (equal & (before + sums < mass))
        if HAS_FORCED:
            keep = keep | must
        if HAS_ALSO:
            also_ptr += (lane // heads) * also_b + (lane % heads) * also_h + row * keys
            keep = keep | (tl.load(also_ptr + spots, mask=inside, other=0) != 0)
        keep = keep & inside
        number = _number(keep)
        at = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + at, spots, mask=keep)
        tl.store(index_ptr + number + spots, keys + spots, mask=spots < text)
        tl.store(index_ptr + spots, spots * 0, mask=(spots >= number + text) & (spots < width))
        tl.store(count_ptr + place, number + text)


@triton.jit
def _visited(
    index_ptr, count_ptr, sizes_ptr, keys_ptr, longest, block, heads, rows, sizes_b, sizes_h,
    N: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    count = tl.load(count_ptr + place)
    keys = count * block
    if HAS_SIZES:
        lane = tl.program_id(1)
        sizes_ptr += (lane // heads) * sizes_b + (lane % heads) * sizes_h
        total = tl.zeros([N], tl.int32)
        for first in range(0, count, N):
            spots = first + tl.arange(0, N)
            blocks = tl.load(index_ptr + place * longest + spots, mask=spots < count, other=0)
            total += tl.load(sizes_ptr + blocks, mask=spots < count, other=0)
        keys = tl.sum(total, 0)
    tl.store(keys_ptr + place, keys)


def visited(index: torch.Tensor, count: torch.Tensor, sizes: torch.Tensor | None, block: int) -> torch.Tensor:
    """Keys that every row of lists sees: int32 (B or 1, H or 1, NQ), from index, count and sizes of `Routes`."""
    b, h, nq, m = index.shape
    index, count = index.contiguous(), count.expand(b, h, nq).contiguous()
    keys = torch.empty((b, h, nq), dtype=torch.int32, device=index.device)
    of = count if sizes is None else sizes.contiguous()
    steps = [0, 0] if sizes is None else [of.stride(i) if of.shape[i] > 1 else 0 for i in (0, 1)]
    launch(
        _visited, (nq, b * h), index, count, of, keys, m, block, h, nq, *steps, N=128, HAS_SIZES=sizes is not None,
        num_warps=1,
    )  # fmt: skip
    return keys


def select(
    scores: torch.Tensor,
    top: int,
    mass: float,
    forced: torch.Tensor | None,
    text: int,
    softmax: bool,
    also: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`; entries of `index` behind `count` are 0."""
    b, h, nq, nk = scores.shape
    chosen = scores.dtype == torch.bool
    scores = _bytes(scores) if chosen else scores.float().contiguous()
    index = torch.empty((b, h, nq + text, nk + text), dtype=torch.int32, device=scores.device)
    count = torch.empty((b, h, nq + text), dtype=torch.int32, device=scores.device)
    given = count if forced is None else _bytes(forced)
    more = count if also is None else _bytes(also)
    steps = [0, 0] if also is None else [more.stride(i) if more.shape[i] > 1 else 0 for i in (0, 1)]
    n = max(32, triton.next_power_of_2(nk + text))
    launch(
        _select, (nq + text, b * h), scores, given, more, index, count, nq, nk, min(top, nk), float(mass), text, h,
        *steps, N=n, CHOSEN=chosen, HAS_FORCED=forced is not None, HAS_ALSO=also is not None, HAS_TOP=top > 0,
        HAS_MASS=mass > 0.0, SOFTMAX=softmax, num_warps=max(1, n // PER_WARP),
    )  # fmt: skip
    return index, count


def _bytes(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bytes, without a copy where its memory is in one piece."""
    return mask.contiguous().view(torch.uint8)
