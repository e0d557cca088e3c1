"""Low-bit attention in Triton, for GPUs with INT8 and FP8 products (SageAttention, arXiv 2410.02367 and 2411.10958).

Three small kernels read keys and values once for their statistics and once to round them; a fourth walks the lists as
`vivace.kernels.block_attention.triton` does. Values are stored transposed, keys innermost: 8-bit products of Hopper
take no other layout. The scale of the scores, log2(e) and the scales of the queries are one factor; the 448 of the
probabilities is part of the exponent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.launch import launch
from vivace.kernels.low_bit_attention.quantise import E4M3, TINY


@triton.jit
def _size(sizes_ptr, kb, keys, C: tl.constexpr, HAS_SIZES: tl.constexpr):
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
    size = _size(sizes_ptr + b * sizes_b + h * sizes_h, kb, keys, C, HAS_SIZES)
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
        real = rows - kb * C < _size(sizes_ptr + b * sizes_b + h * sizes_h, kb, length, C, HAS_SIZES)
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
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12) / 127.0
        tl.store(scales_ptr + row.to(tl.int64) * groups + group, scale)
    else:
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12) / 127.0
        tl.store(scales_ptr + row.to(tl.int64) * groups + group, scale * factor * 1.4426950408889634)
        tl.store(shift_ptr + place, tl.sum(x * mean[None, :], 1) * factor)
    x = x / scale
    # The conversion cuts towards zero.
    y = (x + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int8)
    tl.store(y_ptr + place[:, None] * D + dims[None, :], y)


@triton.jit
def _round_channels(
    v_ptr, scales_ptr, y_ptr, sizes_ptr, v_b, v_h, v_s, sizes_b, sizes_h, heads, keys, slots_in_all,
    C: tl.constexpr, D: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    """A block of values to e4m3, transposed."""
    kb, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    slots, dims = tl.arange(0, C), tl.arange(0, D)
    rows = kb * C + slots
    real = slots < _size(sizes_ptr + b * sizes_b + h * sizes_h, kb, keys, C, HAS_SIZES)
    v = tl.load(
        v_ptr + b * v_b + h * v_h + rows[:, None] * v_s + dims[None, :], mask=real[:, None], other=0.0
    )
    scale = tl.load(scales_ptr + row.to(tl.int64) * D + dims)
    y = tl.trans((v.to(tl.float32) / scale[None, :]).to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + (row.to(tl.int64) * D + dims)[:, None] * slots_in_all + rows[None, :], y)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, qs_ptr, ks_ptr, vs_ptr, shift_ptr,
    index_ptr, count_ptr, sizes_ptr, bias_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, v_d, index_b, index_h, index_n, count_b, count_h, sizes_b, sizes_h,
    bias_b, heads, queries, keys, query_slots, key_slots, factor,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, QK8: tl.constexpr, PV8: tl.constexpr,
    DENSE: tl.constexpr, TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SIZES: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    wide = row.to(tl.int64)
    slots, dims = tl.arange(0, C), tl.arange(0, D)
    mine = block * C + slots
    q = tl.load(
        q_ptr + b * q_b + h * q_h + mine[:, None] * q_s + dims[None, :],
        mask=(mine < query_slots)[:, None],
        other=0,
    )
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    index_ptr += b * index_b + h * index_h + block * index_n
    sizes_ptr += b * sizes_b + h * sizes_h
    bias_ptr += b * bias_b
    if QK8:
        q_scale = tl.load(qs_ptr + (wide * query_slots + mine) // G)
        ks_ptr += wide * key_slots // G
    count = tl.cdiv(keys, C) if DENSE else tl.load(count_ptr + b * count_b + h * count_h + block)
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, D], tl.float32)
    for j in range(count):
        kb = j if DENSE else tl.load(index_ptr + j)
        rows = kb * C + slots
        if TAIL or HAS_SIZES:
            real = slots < _size(sizes_ptr, kb, keys, C, HAS_SIZES)
        else:
            real = slots < C
        if QK8:
            # The rounded copies are whole blocks, zero behind the keys.
            kt = tl.load(k_ptr + rows[None, :] * k_s + dims[:, None])
            s = tl.dot(q, kt, out_dtype=tl.int32).to(tl.float32)
            if G == C:
                s *= (q_scale * tl.load(ks_ptr + kb))[:, None]
            else:
                s *= q_scale[:, None] * tl.load(ks_ptr + rows // G)[None, :]
        else:
            if TAIL or HAS_SIZES:
                kt = tl.load(k_ptr + rows[None, :] * k_s + dims[:, None], mask=real[None, :], other=0.0)
            else:
                kt = tl.load(k_ptr + rows[None, :] * k_s + dims[:, None])
            s = tl.dot(q, kt, input_precision="ieee") * (factor * 1.4426950408889634)
        if HAS_BIAS:
            s += tl.load(bias_ptr + rows, mask=rows < keys, other=0.0)[None, :] * 1.4426950408889634
        if TAIL or HAS_SIZES:
            s = tl.where(real[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # Rows that have seen nothing yet stay at -inf, and -inf - -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher) if HAS_SIZES or HAS_BIAS else higher
        decay = tl.exp2(top - base)
        # 8.807... is log2(448): probabilities fill the range of e4m3, and the factor cancels in acc / total.
        p = tl.exp2(s - (base - 8.807354922057604)[:, None]) if PV8 else tl.exp2(s - base[:, None])
        acc = acc * decay[:, None]
        total = total * decay + tl.sum(p, 1)
        if PV8:
            v = tl.load(v_ptr + rows[:, None] * v_s + dims[None, :] * v_d)
            # The tensor cores add up FP8 products in few bits: one block of keys at most, then float32.
            acc = tl.dot(p.to(v.dtype), v, acc, max_num_imprecise_acc=C)
        else:
            if TAIL or HAS_SIZES:
                v = tl.load(v_ptr + rows[:, None] * v_s + dims[None, :] * v_d, mask=real[:, None], other=0.0)
            else:
                v = tl.load(v_ptr + rows[:, None] * v_s + dims[None, :] * v_d)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = higher
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total[:, None]
    lse = top + tl.log2(total)
    if PV8:
        acc *= tl.load(vs_ptr + wide * D + dims)[None, :]
        lse -= 8.807354922057604
    lse = lse * 0.6931471805599453
    if QK8:
        lse += tl.load(shift_ptr + wide * query_slots + mine)
    lse = tl.where(seen, lse, float("-inf"))
    place = wide * queries + mine
    here = mine < queries
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=here[:, None]
    )
    tl.store(lse_ptr + place, lse, mask=here)


def settings(block: int, dim: int) -> dict[str, int]:
    """Warps and pipeline depth of the attention kernel."""
    return {"num_warps": 8 if block == 128 else 4, "num_stages": 3 if dim <= 128 else 2}


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
    """See `spec`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (b, h, queries, d), keys, device = q.shape, k.shape[2], q.device
    nq, nk, low_qk, low_pv = -(-queries // block), -(-keys // block), qk == "int8", pv == "fp8"
    sizes = None if routes is None or routes.sizes is None else routes.sizes.contiguous().expand(b, h, -1)
    known = {"C": block, "D": d, "HAS_SIZES": sizes is not None}
    # Where a tensor is not there, something stands in for a pointer that is never read.
    lengths, strides = (q, [0, 0]) if sizes is None else (sizes, list(sizes.stride()[:2]))
    qs = ks = vs = shift = q
    kr, vr, qr = k, v, q
    if low_qk or low_pv:
        sums, peaks = (torch.empty((b, h, nk, d), dtype=torch.float32, device=device) for _ in range(2))
        launch(
            _statistics, (nk, b * h), k, v, sums, peaks, lengths, *k.stride()[:3], *v.stride()[:3], *strides, h, keys,
            QK8=low_qk, PV8=low_pv, **known,
        )  # fmt: skip
    if low_qk:
        number = (
            torch.full((1, 1, 1), float(keys), device=device) if sizes is None else sizes.sum(-1)[..., None]
        )
        mean = (sums.sum(2) / number.clamp(min=1)).contiguous()
        qr, kr = (torch.empty((b, h, n * block, d), dtype=torch.int8, device=device) for n in (nq, nk))
        qs, ks = (torch.empty((b, h, x.shape[2] // group), device=device) for x in (qr, kr))
        shift = torch.empty((b, h, nq * block), device=device)
        for x, y, scales, length, of_keys in ((q, qr, qs, queries, False), (k, kr, ks, keys, True)):
            launch(
                _round_rows, (scales.shape[2], b * h), x, mean, y, scales, shift, lengths,
                *x.stride()[:3], *strides, h, length, scale, G=group, KEYS=of_keys, **known,
            )  # fmt: skip
    if low_pv:
        vs = (peaks.amax(2).clamp(min=TINY) / E4M3).contiguous()
        turned = torch.empty((b, h, d, nk * block), dtype=torch.float8_e4m3fn, device=device)
        launch(
            _round_channels, (nk, b * h), v, vs, turned, lengths, *v.stride()[:3], *strides, h, keys, nk * block,
            **known,
        )  # fmt: skip
        vr = turned.transpose(-1, -2)
    out = torch.empty((b, h, queries, d), dtype=q.dtype, device=device)
    lse = torch.empty((b, h, queries), dtype=torch.float32, device=device)
    index, count, of_lists = lengths, lengths, [0] * 5
    if routes is not None:
        index = routes.index.contiguous().expand(b, h, -1, -1)
        count = routes.count.contiguous().expand(b, h, -1)
        of_lists = [*index.stride()[:3], *count.stride()[:2]]
    added = q if bias is None else bias.float().contiguous()
    launch(
        _attend, (nq, b * h), qr, kr, vr, out, lse, qs, ks, vs, shift, index, count, lengths, added,
        *qr.stride()[:3], *kr.stride()[:3], *vr.stride(), *of_lists, *strides,
        0 if bias is None else added.stride(0), h, queries, keys, qr.shape[2], kr.shape[2], scale,
        G=group, QK8=low_qk, PV8=low_pv, DENSE=routes is None, TAIL=keys % block != 0, HAS_BIAS=bias is not None,
        **known, **settings(block, d),
    )  # fmt: skip
    return out, lse
