"""Tokens into blocks and back in one Triton kernel each way: a program moves one block, or a few tokens, of one head.

Programs of neighbouring heads run side by side, because a token's heads are neighbours in memory.
"""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch

T = torch.Tensor
ROWS = 32
"""Tokens that a program holds at a time."""


@triton.jit
def _arrange(
    x_ptr, slots_ptr, counts_ptr, out_ptr, mean_ptr, alike_ptr, x_b, x_s, x_h, heads, blocks,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, COPY: tl.constexpr, POOL: tl.constexpr,
    ALIKE: tl.constexpr,
):  # fmt: skip
    lane, block = tl.program_id(0), tl.program_id(1)
    b, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    place = lane.to(tl.int64) * blocks + block
    rows, dims = tl.arange(0, R), tl.arange(0, W)
    inside = dims < D
    x_ptr += b * x_b + h * x_h
    total = tl.zeros([W], tl.float32)
    units = tl.zeros([W], tl.float32)
    for first in tl.static_range(0, C, R):
        at = first + rows
        token = tl.load(slots_ptr + block * C + at, mask=at < C, other=-1).to(tl.int64)
        real = (token >= 0)[:, None] & inside[None, :]
        x = tl.load(x_ptr + token[:, None] * x_s + dims[None, :], mask=real, other=0.0)
        if COPY:
            whole = (at < C)[:, None] & inside[None, :]
            tl.store(out_ptr + (place * C + at)[:, None] * D + dims[None, :], x, mask=whole)
        if POOL:
            total += tl.sum(x.to(tl.float32), 0)
        if ALIKE:
            wide = x.to(tl.float32)
            length = tl.sqrt(tl.sum(wide * wide, 1))
            units += tl.sum(wide / tl.maximum(length, 1e-12)[:, None], 0)
    number = tl.maximum(tl.load(counts_ptr + block), 1).to(tl.float32)
    if POOL:
        tl.store(mean_ptr + place * D + dims, total / number, mask=inside)
    if ALIKE:
        units = units / number
        tl.store(alike_ptr + place, tl.sum(units * units, 0))


@triton.jit
def _restore(
    y_ptr, mean_ptr, back_ptr, counts_ptr, out_ptr, y_b, y_h, y_s, tokens, heads, blocks,
    C: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, HAS_BLOCKS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    at, dims = tl.program_id(1) * R + tl.arange(0, R), tl.arange(0, W)
    b, h = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
    there = at < tokens
    real = there[:, None] & (dims < D)[None, :]
    slot = tl.load(back_ptr + at, mask=there, other=0)
    if HAS_BLOCKS:
        x = tl.load(y_ptr + b * y_b + h * y_h + slot[:, None] * y_s + dims[None, :], mask=real, other=0.0)
    else:
        x = tl.zeros([R, W], tl.float32)
    if HAS_MEAN:
        block = slot // C
        number = tl.load(counts_ptr + block, mask=there, other=1).to(tl.float32)
        where = (lane.to(tl.int64) * blocks + block)[:, None] * D + dims[None, :]
        x = x.to(tl.float32) + tl.load(mean_ptr + where, mask=real, other=0.0) / number[:, None]
    place = ((b * tokens + at) * heads + h)[:, None] * D + dims[None, :]
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=real)


def arrange(x: T, slots: T, back: T, counts: T, copy: bool, pool: bool, alike: bool) -> tuple[T, T, T]:
    """See `spec`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    b, _, h, d = x.shape
    n, c = slots.shape

    def made(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> T:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=x.device)

    out = made(copy, b, h, n * c, d, dtype=x.dtype)
    mean, cosine = made(pool, b, h, n, d), made(alike, b, h, n)
    launch(
        _arrange, (b * h, n), x, slots, counts, out, mean, cosine, *x.stride()[:3], h, n,
        C=c, R=min(ROWS, triton.next_power_of_2(c)), D=d, W=triton.next_power_of_2(d), COPY=copy, POOL=pool,
        ALIKE=alike, num_warps=4,
    )  # fmt: skip
    return out, mean, cosine


def restore(blocks: T | None, mean: T | None, slots: T, back: T, counts: T, dtype: torch.dtype) -> T:
    """See `spec`."""
    shaped = blocks if blocks is not None else mean
    assert shaped is not None
    b, h, _, d = shaped.shape
    y = shaped if shaped.stride(-1) == 1 else shaped.contiguous()
    pooled = back if mean is None else mean.float().contiguous()
    s = len(back)
    out = torch.empty((b, s, h, d), dtype=dtype, device=shaped.device)
    launch(
        _restore, (b * h, triton.cdiv(s, ROWS)), y, pooled, back, counts, out, *y.stride()[:3], s, h, len(slots),
        C=slots.shape[1], R=ROWS, D=d, W=triton.next_power_of_2(d), HAS_BLOCKS=blocks is not None,
        HAS_MEAN=mean is not None, num_warps=4,
    )  # fmt: skip
    return out
