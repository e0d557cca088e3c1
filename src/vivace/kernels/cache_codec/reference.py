"""The obviously right implementation of `spec`, in float32; plain torch, any device, no wait for the device."""

from __future__ import annotations

import torch

from vivace.kernels.cache_codec.spec import LEVELS, LOW, PER_BYTE, Packed, check_inputs, width_of


def pack(x: torch.Tensor, form: str, group: int = 64, axis: int = -1) -> Packed:
    """Codes of a tensor; see `spec`.

    Raises:
        ValueError: no such form, or a group or an axis that x does not have.
        RuntimeError: gradients are asked for.
    """
    check_inputs(x, form, group, axis)
    axis = axis if axis < 0 else axis - x.ndim
    rows = x.movedim(axis, -1)
    length = rows.shape[-1]
    width = width_of(length, form, group)
    if more := -length % width:
        rows = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], more)], dim=-1)
    grouped = rows.unflatten(-1, (-1, width)).float()
    scale, low = _scales(grouped, form, x.dtype == torch.float32)
    start = 0.0 if low is None else low.float()[..., None]
    step = scale.float()[..., None]
    # Of a step of zero there are only groups of equal numbers.
    codes = torch.where(step > 0, (grouped - start) / step, 0.0)
    return Packed(form, tuple(x.shape), x.dtype, axis, _encode(codes, form), scale, low)


def unpack(packed: Packed) -> torch.Tensor:
    """The tensor that codes stand for, in its shape and dtype."""
    out = _decode(packed.codes, packed.form) * packed.scale.float()[..., None]
    if packed.low is not None:
        out = out + packed.low.float()[..., None]
    length = packed.shape[packed.axis]
    rows = out.flatten(-2)[..., :length]
    return rows.movedim(-1, packed.axis).to(packed.dtype).contiguous()


def _scales(x: torch.Tensor, form: str, exact: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scales and minima of groups (..., width); in float32 where `exact`, else rounded outwards to bfloat16."""
    top, bottom = x.amax(-1), x.amin(-1)
    if form not in LOW:
        scale = torch.maximum(top, -bottom) / LEVELS[form]
        return (scale if exact else _up(scale)), None
    low = bottom if exact else _down(bottom)
    scale = (top - low.float()) / LEVELS[form]
    return (scale if exact else _up(scale)), low


def _up(x: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 rounded up to bfloat16."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _down(x: torch.Tensor) -> torch.Tensor:
    """Float32 rounded down to bfloat16: towards zero above it, away from it below."""
    bits = x.contiguous().view(torch.int32)
    return (torch.where(x < 0, bits + 0xFFFF, bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _encode(codes: torch.Tensor, form: str) -> torch.Tensor:
    """Numbers in units of their scale to stored codes (..., bytes)."""
    top = LEVELS[form]
    if form == "fp8":
        return codes.clamp(-top, top).to(torch.float8_e4m3fn)
    if form == "int8":
        return codes.round().clamp(-top, top).to(torch.int8)
    small, per = codes.round().clamp(0, top).to(torch.uint8), PER_BYTE[form]
    bits = 8 // per
    out = small[..., ::per]
    for i in range(1, per):
        out = out | (small[..., i::per] << (bits * i))
    return out


def _decode(stored: torch.Tensor, form: str) -> torch.Tensor:
    """Stored codes as float32 (..., width)."""
    per = PER_BYTE[form]
    if per == 1:
        return stored.float()
    bits = 8 // per
    parts = [(stored >> (bits * i)) & (2**bits - 1) for i in range(per)]
    return torch.stack(parts, dim=-1).flatten(-2).float()
