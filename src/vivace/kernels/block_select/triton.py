"""Block selection in one Triton kernel: a row stays in registers, thresholds are found by bisection and not by sorting.

Scores become integers that order like them, so 32 halvings find the exact k-th largest; the same walk with sums of
probabilities in the place of counts finds the threshold of a mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch


@triton.jit
def _ordered(x):
    """Float32 as int32 that orders alike; -inf comes first, and both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _select(
    scores_ptr, forced_ptr, index_ptr, count_ptr, queries, keys, top, mass, text,
    N: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_MASS: tl.constexpr, SOFTMAX: tl.constexpr,
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
        s = tl.load(scores_ptr + (lane * queries + row) * keys + spots, mask=inside, other=float("-inf"))
        able = s > float("-inf")
        order = _ordered(s)
        if HAS_FORCED:
            must = tl.load(forced_ptr + row * keys + spots, mask=inside, other=0) != 0
            able = able | must
            order = tl.where(must, 0x7F800000, order)
        lowest = -2139095041  # -inf
        order = tl.where(able, order, lowest)
        # The largest threshold that at least `top` blocks reach.
        low = tl.full([], lowest, tl.int64)
        high = tl.full([], 0x7F800001, tl.int64)
        for _ in range(33):
            middle = (low + high) >> 1
            enough = tl.sum((order.to(tl.int64) >= middle).to(tl.int32), 0) >= top
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        above = (order.to(tl.int64) > low) & able
        equal = (order.to(tl.int64) == low) & able
        room = top - tl.sum(above.to(tl.int32), 0)
        nth = tl.cumsum(equal.to(tl.int32), 0)
        keep = above | (equal & (nth <= room))
        if HAS_MASS:
            if SOFTMAX:
                peak = tl.max(s, 0)
                weights = tl.exp(s - tl.where(peak == float("-inf"), 0.0, peak))
                weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
            else:
                weights = tl.where(s > float("-inf"), s, 0.0)
            weights = tl.where(able, weights, 0.0)
            low = tl.full([], lowest, tl.int64)
            high = tl.full([], 0x7F800001, tl.int64)
            for _ in range(33):
                middle = (low + high) >> 1
                enough = tl.sum(tl.where(order.to(tl.int64) >= middle, weights, 0.0), 0) >= mass
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            above = (order.to(tl.int64) > low) & able
            equal = (order.to(tl.int64) == low) & able
            # Of equal ones as many as are needed: those before a block must fall short.
            before = tl.sum(tl.where(above, weights, 0.0), 0)
            sums = tl.cumsum(tl.where(equal, weights, 0.0), 0) - tl.where(equal, weights, 0.0)
            keep = keep | above | (equal & (before + sums < mass))
        if HAS_FORCED:
            keep = keep | must
        keep = keep & inside
        number = tl.sum(keep.to(tl.int32), 0)
        at = tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + at, spots, mask=keep)
        tail = spots < text
        tl.store(index_ptr + number + spots, keys + spots, mask=tail)
        tl.store(count_ptr + place, number + text)


def select(
    scores: torch.Tensor, top: int, mass: float, forced: torch.Tensor | None, text: int, softmax: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`; entries of `index` behind `count` are 0."""
    b, h, nq, nk = scores.shape
    scores = scores.float().contiguous()
    index = torch.zeros((b, h, nq + text, nk + text), dtype=torch.int32, device=scores.device)
    count = torch.empty((b, h, nq + text), dtype=torch.int32, device=scores.device)
    given = count if forced is None else forced.to(torch.uint8).contiguous()
    launch(
        _select, (nq + text, b * h), scores, given, index, count, nq, nk, min(top, nk), mass, text,
        N=triton.next_power_of_2(nk + text), HAS_FORCED=forced is not None, HAS_MASS=mass > 0.0, SOFTMAX=softmax,
        num_warps=4,
    )  # fmt: skip
    return index, count
