"""A program takes some pixels with all their channels: a warp holds whole pixels, so that sums need no barrier."""

# Triton's decorators turn functions into things that a type checker cannot see through.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch
from vivace.kernels.pixel_rows.spec import SMALLEST

T = torch.Tensor
TILE = 4096
"""Numbers of a program."""


@triton.jit
def _norm_silu(
    x_ptr, y_ptr, gain_ptr, bias_ptr, rows, x_b, y_b, y_first, columns, smallest,
    BIAS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, W)
    channel = at < columns
    inside = (row < rows)[:, None] & channel[None, :]
    place = row.to(tl.int64)[:, None] * columns + at[None, :]
    x = tl.load(x_ptr + b * x_b + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + at, mask=channel, other=0.0).to(tl.float32)[None, :]
    by = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), smallest)
    x = x * by[:, None] * tl.load(gain_ptr + at, mask=channel, other=0.0).to(tl.float32)[None, :]
    y = x / (1.0 + tl.exp2(-1.4426950408889634 * x))
    tl.store(y_ptr + b * y_b + y_first + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add(y_ptr, beside_ptr, bias_ptr, rows, columns, BIAS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, W)
    channel = at < columns
    inside = (row < rows)[:, None] & channel[None, :]
    place = row[:, None] * columns + at[None, :]
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(beside_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + at, mask=channel, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _double(x_ptr, y_ptr, rows, height, width, columns, ROWS: tl.constexpr, W: tl.constexpr):
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, W)
    inside = (row < rows)[:, None] & (at < columns)[None, :]
    line, across = row // (2 * width), row % (2 * width)
    frame, down = line // (2 * height), line % (2 * height)
    source = (frame * height + down // 2) * width + across // 2
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * columns + at[None, :], mask=inside, other=0.0)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * columns + at[None, :], x, mask=inside)


def pixels(x: T) -> T:
    """(B, C, T, H, W) as (B, T, H, W, C), without a copy where channels lie side by side."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _empty(x: T, frames: int, height: int, width: int) -> T:
    """(B, frames, height, width, C)."""
    return torch.empty(x.shape[0], frames, height, width, x.shape[1], dtype=x.dtype, device=x.device)


def _sizes(columns: int) -> dict[str, int]:
    width = triton.next_power_of_2(columns)
    return {"ROWS": max(1, TILE // width), "W": width, "num_warps": 4}


def norm_silu(x: T, gain: T, bias: T | None, past: T | None, frames: int) -> T:
    """See `spec`."""
    (b, c, t, h, w), rows = x.shape, pixels(x)
    y = _empty(x, frames + t, h, w)
    if frames:
        front = y[:, :frames]
        if past is None:
            front.zero_()
        else:
            front.copy_(past.permute(0, 2, 3, 4, 1))
    sizes = _sizes(c)
    launch(
        _norm_silu, (triton.cdiv(t * h * w, sizes["ROWS"]), b), rows, y, gain, gain if bias is None else bias,
        t * h * w, rows.stride(0), y.stride(0), frames * h * w * c, c, SMALLEST, BIAS=bias is not None, **sizes,
    )  # fmt: skip
    return y.permute(0, 4, 1, 2, 3)


def add_rows(y: T, beside: T, bias: T | None) -> None:
    """See `spec`."""
    rows, own = y.permute(0, 2, 3, 4, 1), y.shape[1]
    if not rows.is_contiguous():
        y.add_(beside if bias is None else beside + bias.to(beside.dtype)[:, None, None, None])
        return
    sizes = _sizes(own)
    count = rows.numel() // own
    launch(
        _add, (triton.cdiv(count, sizes["ROWS"]),), rows, pixels(beside), y if bias is None else bias, count, own,
        BIAS=bias is not None, **sizes,
    )  # fmt: skip


def double_pixels(x: T) -> T:
    """See `spec`."""
    (b, c, t, h, w), rows = x.shape, pixels(x)
    y = _empty(x, t, 2 * h, 2 * w)
    sizes, count = _sizes(c), b * t * 4 * h * w
    launch(_double, (triton.cdiv(count, sizes["ROWS"]),), rows, y, count, h, w, c, **sizes)
    return y.permute(0, 4, 1, 2, 3)
