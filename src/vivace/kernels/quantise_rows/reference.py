"""The obviously right implementation of `spec`, in float32 (or wider)."""

from __future__ import annotations

import torch

from vivace.kernels.quantise_rows.spec import LARGEST, TINY, Before


def prepared(x: torch.Tensor, before: Before, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """f(x) of `spec`, (B, S, K) in `dtype`."""
    y = x.to(dtype)
    if before.gelu:
        return torch.nn.functional.gelu(y, approximate="tanh")
    if before.norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if before.norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + before.eps)
    if before.weight is not None:
        y = y * before.weight.to(dtype)
    if before.bias is not None:
        y = y + before.bias.to(dtype)
    if before.scale is not None and before.shift is not None:
        y = y * (1.0 + before.scale.to(dtype)) + before.shift.to(dtype)
    return y


def rounded(y: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales (..., S) of rows (..., S, K)."""
    y = y.float()
    scale = y.abs().amax(-1).clamp(min=TINY * LARGEST[kind]) / LARGEST[kind]
    ratio = y * (1.0 / scale)[..., None]
    if kind == "fp8":
        return ratio.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn), scale
    return torch.round(ratio).to(torch.int8), scale


def run(x: torch.Tensor, kind: str, before: Before) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    return rounded(prepared(x, before), kind)
