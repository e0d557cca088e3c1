"""Rounding queries, keys and values for the 8-bit kernels: two passes over keys and values, one over queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vivace.kernels.launch import launch


@triton.jit
def real_keys(sizes_ptr, kb, keys, C: tl.constexpr, HAS_SIZES: tl.constexpr):
    """Real keys at the front of a block."""
    return tl.load(sizes_ptr + kb) if HAS_SIZES else tl.minimum(keys - kb * C, C)


@triton.jit
def _statistics(
    k_ptr, v_ptr, sums_ptr, peaks_ptr, sizes_ptr,
    k_b, k_h, k_s, v_b, v_h, v_s, sizes_b, sizes_h, heads, keys,
    C: tl.constexpr, D: tl.constexpr, QK8: tl.constexpr, PV8: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """Of every block of keys: the sum of its keys and the largest size of its values, by channel."""
    kb, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    slots, dims = tl.arange(0, C), tl.arange(0, D)
    size = real_keys(sizes_ptr + b * sizes_b + h * sizes_h, kb, keys, C, HAS_SIZES)
    real = (slots < size)[:, None]
    rows = (kb * C + slots)[:, None]
    place = (row.to(tl.int64) * tl.num_programs(0) + kb) * D + dims
    if QK8:
        k = tl.load(k_ptr + b * k_b + h * k_h + rows * k_s + dims[None, :], mask=real, other=0.0)
        tl.store(sums_ptr + place, tl.sum(k.to(tl.float32), 0))
    if PV8:
        v = tl.load(v_ptr + b * v_b + h * v_h + rows * v_s + dims[None, :], mask=real, other=0.0)
        tl.store(peaks_ptr + place, tl.max(tl.abs(v.to(tl.float32)), 0))


@triton.jit
def _combine(
    sums_ptr, peaks_ptr, mean_ptr, scales_ptr, sizes_ptr, sizes_b, sizes_h, heads, blocks, keys,
    B: tl.constexpr, W: tl.constexpr, D: tl.constexpr, QK8: tl.constexpr, PV8: tl.constexpr,
    HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """Means of keys and scales of values of a head, W channels at a time, from the blocks' numbers."""
    row, dims = tl.program_id(0), tl.program_id(1) * W + tl.arange(0, W)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    sizes_ptr += b * sizes_b + h * sizes_h
    total, peak = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    number = tl.zeros([B], tl.int32)
    for first in range(0, blocks, B):
        some = first + tl.arange(0, B)
        inside = some < blocks
        place = (row.to(tl.int64) * blocks + some)[:, None] * D + dims[None, :]
        if QK8:
            total += tl.sum(tl.load(sums_ptr + place, mask=inside[:, None], other=0.0), 0)
        if PV8:
            peak = tl.maximum(peak, tl.max(tl.load(peaks_ptr + place, mask=inside[:, None], other=0.0), 0))
        if HAS_SIZES:
            number += tl.load(sizes_ptr + some, mask=inside, other=0)
    if QK8:
        there = tl.sum(number, 0) if HAS_SIZES else keys
        tl.store(mean_ptr + row.to(tl.int64) * D + dims, total / tl.maximum(there, 1).to(tl.float32))
    if PV8:
        tl.store(scales_ptr + row.to(tl.int64) * D + dims, tl.div_rn(tl.maximum(peak, 1e-12), 448.0))


@triton.jit
def _round_rows(
    x_ptr, mean_ptr, y_ptr, scales_ptr, shift_ptr, sizes_ptr,
    x_b, x_h, x_s, sizes_b, sizes_h, heads, length, factor,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KEYS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """A group of rows to INT8. Keys lose their mean; queries leave their product with it, scaled, in `shift`."""
    group, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    members, dims = tl.arange(0, G), tl.arange(0, D)
    rows = group * G + members
    if KEYS:
        kb = group * G // C
        real = rows - kb * C < real_keys(sizes_ptr + b * sizes_b + h * sizes_h, kb, length, C, HAS_SIZES)
    else:
        real = rows < length
    x = tl.load(
        x_ptr + b * x_b + h * x_h + rows[:, None] * x_s + dims[None, :], mask=real[:, None], other=0.0
    )
    x = x.to(tl.float32)
    mean = tl.load(mean_ptr + row.to(tl.int64) * D + dims)
    groups = tl.num_programs(0)
    place = row.to(tl.int64) * groups * G + rows
    if KEYS:
        x = tl.where(real[:, None], x - mean[None, :], 0.0)
        scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12), 127.0)
        tl.store(scales_ptr + row.to(tl.int64) * groups + group, scale)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12), 127.0)
        tl.store(scales_ptr + row.to(tl.int64) * groups + group, scale * factor * 1.4426950408889634)
        tl.store(shift_ptr + place, tl.sum(x * mean[None, :], 1) * factor)
    # As exactly as the reference: what lies between two integers must not round apart.
    x = tl.div_rn(x, scale)
    # The conversion cuts towards zero.
    y = (x + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int8)
    tl.store(y_ptr + place[:, None] * D + dims[None, :], y)


@triton.jit
def _round_channels(
    v_ptr, scales_ptr, y_ptr, sizes_ptr, v_b, v_h, v_s, sizes_b, sizes_h, heads, keys, slots_in_all,
    C: tl.constexpr, D: tl.constexpr, WOVEN: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """A block of values to e4m3, transposed."""
    kb, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    spots, dims = tl.arange(0, C), tl.arange(0, D)
    slots = spots
    if WOVEN:
        slots = (spots // 16) * 16 + ((spots // 2) % 2) * 8 + ((spots // 4) % 4) * 2 + spots % 2
    rows = kb * C + slots
    real = slots < real_keys(sizes_ptr + b * sizes_b + h * sizes_h, kb, keys, C, HAS_SIZES)
    v = tl.load(
        v_ptr + b * v_b + h * v_h + rows[:, None] * v_s + dims[None, :], mask=real[:, None], other=0.0
    )
    scale = tl.load(scales_ptr + row.to(tl.int64) * D + dims)
    y = tl.trans(tl.div_rn(v.to(tl.float32), scale[None, :]).to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + (row.to(tl.int64) * D + dims)[:, None] * slots_in_all + (kb * C + spots)[None, :], y)


@dataclass(frozen=True, slots=True)
class Rounded:
    """What the attention kernels read; NQ and NK are slots, whole blocks.

    Attributes:
        q, k: int8 (B, H, NQ, D) and (B, H, NK, D), or as they were given.
        v: e4m3 (B, H, D, NK), transposed, or (B, H, SK, D) as it was given.
        q_scales: (B, H, NQ / group), with the scale of scores and log2(e) in it.
        k_scales: (B, H, NK / block).
        v_scales: (B, H, D).
        shift: (B, H, NQ), products of queries with the mean of keys, scaled: what `lse` gets back.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scales: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    shift: torch.Tensor


def rounded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: torch.Tensor | None, scale: float,
    block: int, group: int, qk8: bool, pv8: bool, woven: bool,
) -> Rounded:  # fmt: skip
    """Round q (B, H, SQ, D), k and v (B, H, SK, D), all with contiguous channels.

    Args:
        sizes: real keys of every block (B, H, SK / block), or None.
        woven: of values: keys stand in the order in which Hopper's tensor cores hand out scores (every 16 of them).
    """
    (b, h, queries, d), keys, device = q.shape, k.shape[2], q.device
    nq, nk = -(-queries // block), -(-keys // block)
    # Where a tensor is not there, something stands in for a pointer that is never read.
    lengths, strides = (q, [0, 0]) if sizes is None else (sizes, list(sizes.stride()[:2]))
    known = {"D": d, "HAS_SIZES": sizes is not None}
    qr, kr, vr, qs, ks, shift = q, k, v, q, q, q
    mean, vs = (torch.empty((b, h, d), dtype=torch.float32, device=device) for _ in range(2))
    if qk8 or pv8:
        sums, peaks = (torch.empty((b, h, nk, d), dtype=torch.float32, device=device) for _ in range(2))
        launch(
            _statistics, (nk, b * h), k, v, sums, peaks, lengths, *k.stride()[:3], *v.stride()[:3], *strides, h, keys,
            C=block, QK8=qk8, PV8=pv8, **known,
        )  # fmt: skip
        launch(
            _combine, (b * h, d // min(d, 16)), sums, peaks, mean, vs, lengths, *strides, h, nk, keys,
            B=128, W=min(d, 16), QK8=qk8, PV8=pv8, **known,
        )  # fmt: skip
    if qk8:
        qr, kr = (torch.empty((b, h, n * block, d), dtype=torch.int8, device=device) for n in (nq, nk))
        qs, ks = (torch.empty((b, h, x.shape[2] // g), device=device) for x, g in ((qr, group), (kr, block)))
        shift = torch.empty((b, h, nq * block), device=device)
        for x, y, scales, length, g, of_keys in (
            (q, qr, qs, queries, group, False), (k, kr, ks, keys, block, True),
        ):  # fmt: skip
            launch(
                _round_rows, (scales.shape[2], b * h), x, mean, y, scales, shift, lengths,
                *x.stride()[:3], *strides, h, length, scale, C=block, G=g, KEYS=of_keys, **known,
            )  # fmt: skip
    if pv8:
        vr = torch.empty((b, h, d, nk * block), dtype=torch.float8_e4m3fn, device=device)
        launch(
            _round_channels, (nk, b * h), v, vs, vr, lengths, *v.stride()[:3], *strides, h, keys, nk * block,
            C=block, WOVEN=woven, **known,
        )  # fmt: skip
    return Rounded(qr, kr, vr, qs, ks, vs, shift)
