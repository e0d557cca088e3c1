"""The roundings of `spec` in plain torch: what the Triton kernels do, readable, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

INT8, E4M3 = 127.0, 448.0
"""Largest numbers of the two formats."""
TINY = 1e-12
"""Smallest size that is divided by: a group of zeros keeps zeros."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Integers or e4m3 numbers, and the scales that make them what they stand for.

    Attributes:
        values: like the tensor that was rounded.
        scales: float32; (B, H, S / group) for rows, (B, H, D) for channels.
    """

    values: torch.Tensor
    scales: torch.Tensor


def real_slots(
    sizes: torch.Tensor | None, keys: int, slots: int, block: int, device: torch.device
) -> torch.Tensor:
    """Bool (B or 1, H or 1, slots): which slots hold a key.

    Args:
        sizes: of `Routes`.
        keys: of the tensor, before it was padded to `slots`.
    """
    place = torch.arange(slots, device=device)
    if sizes is None:
        return (place < keys)[None, None]
    return (torch.arange(block, device=device) < sizes[..., None]).flatten(2)


def padded(x: torch.Tensor, block: int) -> torch.Tensor:
    """(B, H, S, D) with zeros behind, to whole blocks."""
    return pad(x, (0, 0, 0, -x.shape[2] % block))


def cleared(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Zeros in the slots of (B, H, S, D) that hold nothing."""
    return x.masked_fill(~real[..., None], 0.0)


def mean_of(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over the real slots of a cleared (B, H, S, D): (B, H, D)."""
    return x.sum(2) / real.sum(-1, dtype=x.dtype).clamp(min=1.0)[..., None]


def to_int8(x: torch.Tensor, group: int) -> Rounded:
    """Rows of (B, H, S, D), `group` of which share a scale; values as int8. Halves go away from zero."""
    rows = x.unflatten(2, (-1, group))
    scales = rows.abs().amax((3, 4)).clamp(min=TINY) / INT8
    ratio = rows / scales[..., None, None]
    values = torch.trunc(ratio + torch.copysign(torch.full_like(ratio, 0.5), ratio))
    return Rounded(values.to(torch.int8).flatten(2, 3), scales)


def to_e4m3(x: torch.Tensor) -> Rounded:
    """Channels of (B, H, S, D), each with its scale; values as float8_e4m3fn."""
    scales = x.abs().amax(2).clamp(min=TINY) / E4M3
    values = (x / scales[:, :, None]).clamp(-E4M3, E4M3)
    return Rounded(values.to(torch.float8_e4m3fn), scales)
