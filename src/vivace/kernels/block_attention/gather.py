"""Gathered key blocks and torch's own attention: any device, any block size; the fast path on a CPU.

Rows (a batch row, a head and a block of queries) whose lists are equally long share a call. A few rows go at a time, so
that their gathered keys stay in a CPU's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vivace.kernels.block_attention.spec import Routes

CACHED_KEYS = 8192
"""Key tokens that are gathered at a time on a CPU: few calls, and what they gather stays in its cache (measured)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that attend together: n rows, each over m key slots.

    Attributes:
        n: rows.
        rows: where they stand among B * H * NQ, (n,) or a slice: views in the place of copies.
        blocks: (n * lists,) among B * H * NK.
        bias: (n, m) float32 added to scores, -inf where a slot holds no key; None where nothing is added.
    """

    n: int
    rows: torch.Tensor | slice
    blocks: torch.Tensor
    bias: torch.Tensor | None


def parts(routes: Routes, bias: torch.Tensor | None, b: int, h: int, key_blocks: int) -> Iterator[Part]:
    """The work in pieces. Synchronises: list lengths decide."""
    block, (nq, m) = routes.block, routes.index.shape[2:]
    index = routes.index.expand(b, h, nq, m).reshape(-1, m).long()
    count = routes.count.expand(b, h, nq).reshape(-1)
    at_once = CACHED_KEYS if index.device.type == "cpu" else sys.maxsize
    sizes = None if routes.sizes is None else routes.sizes.expand(b, h, -1).reshape(-1)
    if sizes is not None and bool((sizes == block).all()):
        sizes = None
    slots = torch.arange(block, device=index.device)
    heads = torch.arange(b * h, device=index.device).repeat_interleave(nq)
    # Once for all rows: on a CPU a small operation costs as much as the attention of a row.
    among = index + heads[:, None] * key_blocks
    lengths = torch.unique(count).tolist()
    for length in lengths:
        if not length:
            continue
        if len(lengths) == 1:
            size = max(1, at_once // (length * block))
            pieces = [slice(i, min(i + size, len(count))) for i in range(0, len(count), size)]
        else:
            pieces = (count == length).nonzero()[:, 0].split(max(1, at_once // (length * block)))
        for rows in pieces:
            blocks = among[rows, :length]
            added = None
            if bias is not None:
                of_row = bias.view(b, key_blocks, block)[heads[rows] // h]
                added = torch.take_along_dim(of_row, index[rows, :length, None], 1).float()
            if sizes is not None:
                here = sizes[blocks]
                if bool((here < block).any()):
                    gone = torch.where(slots < here[..., None], 0.0, float("-inf"))
                    added = gone if added is None else added + gone
            yield Part(len(blocks), rows, blocks.flatten(), None if added is None else added.flatten(1))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    b, h, s, d = q.shape
    block, key_blocks = routes.block, k.shape[2] // routes.block
    qs = q.reshape(-1, block, d)
    ks, vs = (x.reshape(-1, block, d) for x in (k, v))
    out = torch.zeros(qs.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(qs.shape[:2], float("-inf"), device=q.device)
    for part in parts(routes, bias, b, h, key_blocks):
        n = part.n
        qr, kr = qs[part.rows], ks.index_select(0, part.blocks).view(n, -1, d)
        vr = vs.index_select(0, part.blocks).view(n, -1, d)
        o, o_lse = _attend(qr, kr, vr, scale, part.bias)
        out[part.rows], lse[part.rows] = o, o_lse
    return out.view(b, h, s, d), lse.view(b, h, s)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of n independent rows; q (n, C, D), k and v (n, m, D), bias (n, m)."""
    if bias is not None:
        # Slots behind a block's keys may hold anything, and 0 * nan is nan.
        gone = torch.isneginf(bias)[..., None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    if q.device.type == "cpu":
        added = None if bias is None else bias[:, None, None].expand(-1, 1, q.shape[1], -1).to(q.dtype)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], 0.0, False, attn_mask=added, scale=scale
        )
        o, lse = o[:, 0], lse.reshape(len(q), -1).float()
    else:
        scores = q @ k.transpose(-1, -2) * scale
        scores = scores.float() if bias is None else scores.float() + bias[:, None]
        lse = torch.logsumexp(scores, -1)
        o = (scores - lse[..., None]).exp().nan_to_num(0.0).to(v.dtype) @ v
    if bias is not None:
        none_left = torch.isneginf(bias).all(-1)
        o = o.masked_fill(none_left[:, None, None], 0.0)
        lse = lse.masked_fill(none_left[:, None], float("-inf"))
    return o, lse


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routes: Routes,
    scale: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their dtypes; sums in float32."""
    b, h, _, d = q.shape
    block, key_blocks = routes.block, k.shape[2] // routes.block
    qs, gs = (x.reshape(-1, block, d).float() for x in (q, grad_out))
    ks, vs = (x.reshape(-1, block, d).float() for x in (k, v))
    known = lse.reshape(-1, block)
    delta = ((grad_out.float() * out.float()).sum(-1) - grad_lse.float()).reshape(-1, block)
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    for part in parts(routes, bias, b, h, key_blocks):
        n = part.n
        qr, gr = qs[part.rows], gs[part.rows]
        kr, vr = (x.index_select(0, part.blocks).view(n, -1, d) for x in (ks, vs))
        scores = qr @ kr.transpose(-1, -2) * scale
        if part.bias is not None:
            gone = torch.isneginf(part.bias)
            kr, vr = (x.masked_fill(gone[..., None], 0.0) for x in (kr, vr))
            scores = torch.where(gone[:, None], float("-inf"), scores + part.bias[:, None])
        top = known[part.rows].masked_fill(torch.isneginf(known[part.rows]), 0.0)
        p = (scores - top[..., None]).exp()
        ds = p * (gr @ vr.transpose(-1, -2) - delta[part.rows][..., None])
        dq[part.rows] = ds @ kr * scale
        dk.index_add_(0, part.blocks, (ds.transpose(-1, -2) @ qr * scale).view(-1, block, d))
        dv.index_add_(0, part.blocks, (p.transpose(-1, -2) @ gr).view(-1, block, d))
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)
