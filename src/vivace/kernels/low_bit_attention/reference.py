"""The 8-bit kernel's arithmetic in ordinary numbers: the same roundings in the same order, on any device.

Walks the lists as the kernel does, all blocks of queries at a time: it needs memory for S * C scores, not for S * S.
"""

from __future__ import annotations

import math

import torch

from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.low_bit_attention import quantise
from vivace.kernels.low_bit_attention.quantise import E4M3


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
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`; products and sums in `dtype`, in which those of 8-bit integers are exact."""
    (b, h, queries), keys = q.shape[:3], k.shape[2]
    sizes = None if routes is None else routes.sizes
    qs, ks, vs = (quantise.padded(x.to(dtype), block) for x in (q, k, v))
    real = quantise.real_slots(sizes, keys, ks.shape[2], block, k.device)
    ks, vs = quantise.cleared(ks, real), quantise.cleared(vs, real)
    added = torch.where(real, 0.0, float("-inf")).to(dtype)
    if bias is not None:
        added = added + torch.nn.functional.pad(bias.to(dtype), (0, -keys % block))[:, None]
    shift = torch.zeros(qs.shape[:3], dtype=dtype, device=q.device)
    if qk == "int8":
        mean = quantise.mean_of(ks, real)
        shift = (qs * mean[:, :, None]).sum(-1) * scale
        ks = quantise.cleared(ks - mean[:, :, None], real)
        qs = _restored(quantise.to_int8(qs, group), group, dtype)
        ks = _restored(quantise.to_int8(ks, block), block, dtype)
    if pv == "fp8":
        rounded = quantise.to_e4m3(vs)
        vs = rounded.values.to(dtype) * rounded.scales[:, :, None].to(dtype)
    qs, ks, vs = (x.unflatten(2, (-1, block)) for x in (qs, ks, vs))
    added = added.expand(b, h, -1).unflatten(2, (-1, block))
    nq, nk = qs.shape[2], ks.shape[2]
    if routes is None:
        index = torch.arange(nk, device=q.device).expand(1, 1, 1, nk)
        count = torch.full((1, 1, 1), nk, device=q.device)
    else:
        index, count = routes.index.long(), routes.count
    index, count = index.expand(b, h, nq, -1), count.expand(b, h, nq)

    top = torch.full((b, h, nq, block), float("-inf"), dtype=dtype, device=q.device)
    total, acc = torch.zeros_like(top), torch.zeros_like(qs)
    for j in range(index.shape[-1]):
        kb = index[..., j].clamp(min=0, max=nk - 1)
        kj, vj, more = (_blocks(x, kb) for x in (ks, vs, added))
        more = more.masked_fill((count <= j)[..., None], float("-inf"))
        s = qs @ kj.transpose(-1, -2) * scale + more[..., None, :]
        higher = torch.maximum(top, s.amax(-1))
        base = higher.masked_fill(torch.isneginf(higher), 0.0)
        p, decay = (s - base[..., None]).exp(), (top - base).exp()
        total = total * decay + p.sum(-1)
        if pv == "fp8":
            p = (p * E4M3).clamp(max=E4M3).to(torch.float8_e4m3fn).to(dtype) / E4M3
        elif v.dtype != torch.float32:
            p = p.to(v.dtype).to(dtype)
        acc = acc * decay[..., None] + p @ vj
        top = higher
    seen = total > 0.0
    out = (acc / total.masked_fill(~seen, 1.0)[..., None]).flatten(2, 3)
    lse = (top + total.log()).flatten(2) + shift
    lse = lse.masked_fill(~seen.flatten(2), -math.inf)
    return out[:, :, :queries].to(q.dtype), lse[:, :, :queries].float()


def _restored(rounded: quantise.Rounded, group: int, dtype: torch.dtype) -> torch.Tensor:
    """What the integers stand for."""
    return rounded.values.to(dtype) * rounded.scales.to(dtype).repeat_interleave(group, 2)[..., None]


def _blocks(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Blocks of (B, H, NK, ...) by number (B, H, NQ): (B, H, NQ, ...)."""
    where = number.reshape(*number.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
    return x.gather(2, where)
