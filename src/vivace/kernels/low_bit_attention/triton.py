"""Low-bit attention in Triton, for GPUs with INT8 and FP8 products (SageAttention, arXiv 2410.02367 and 2411.10958).

Keys, values and queries are rounded first (`rounding`); one kernel then walks the lists as
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
from vivace.kernels.low_bit_attention.rounding import real_keys, rounded


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
        ks_ptr += wide * key_slots // C
    count = tl.cdiv(keys, C) if DENSE else tl.load(count_ptr + b * count_b + h * count_h + block)
    top = tl.full([C], float("-inf"), tl.float32)
    total = tl.zeros([C], tl.float32)
    acc = tl.zeros([C, D], tl.float32)
    for j in range(count):
        kb = j if DENSE else tl.load(index_ptr + j)
        rows = kb * C + slots
        if TAIL or HAS_SIZES:
            real = slots < real_keys(sizes_ptr, kb, keys, C, HAS_SIZES)
        else:
            real = slots < C
        if QK8:
            # The rounded copies are whole blocks, zero behind the keys.
            kt = tl.load(k_ptr + rows[None, :] * k_s + dims[:, None])
            s = tl.dot(q, kt, out_dtype=tl.int32).to(tl.float32)
            s *= (q_scale * tl.load(ks_ptr + kb))[:, None]
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
    nq, low_qk, low_pv = -(-queries // block), qk == "int8", pv == "fp8"
    sizes = None if routes is None or routes.sizes is None else routes.sizes.contiguous().expand(b, h, -1)
    known = {"C": block, "D": d, "HAS_SIZES": sizes is not None}
    # Where a tensor is not there, something stands in for a pointer that is never read.
    lengths, strides = (q, [0, 0]) if sizes is None else (sizes, list(sizes.stride()[:2]))
    r = rounded(q, k, v, sizes, scale, block, group, low_qk, low_pv, woven=False)
    qr, kr, vr = r.q, r.k, r.v.transpose(-1, -2) if low_pv else r.v
    out = torch.empty((b, h, queries, d), dtype=q.dtype, device=device)
    lse = torch.empty((b, h, queries), dtype=torch.float32, device=device)
    index, count, of_lists = lengths, lengths, [0] * 5
    if routes is not None:
        index = routes.index.contiguous().expand(b, h, -1, -1)
        count = routes.count.contiguous().expand(b, h, -1)
        of_lists = [*index.stride()[:3], *count.stride()[:2]]
    added = q if bias is None else bias.float().contiguous()
    launch(
        _attend, (nq, b * h), qr, kr, vr, out, lse, r.q_scales, r.k_scales, r.v_scales, r.shift,
        index, count, lengths, added,
        *qr.stride()[:3], *kr.stride()[:3], *vr.stride(), *of_lists, *strides,
        0 if bias is None else added.stride(0), h, queries, keys, qr.shape[2], kr.shape[2], scale,
        G=group, QK8=low_qk, PV8=low_pv, DENSE=routes is None, TAIL=keys % block != 0, HAS_BIAS=bias is not None,
        **known, **settings(block, d),
    )  # fmt: skip
    return out, lse
