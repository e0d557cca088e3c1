"""Number formats with exact numerics: how values are rounded, packed, and read back. Plain torch, any device.

| name  | values                      | share a scale          | scale                                          |
|-------|-----------------------------|------------------------|------------------------------------------------|
| int8  | integers -127 to 127        | a row, or a group      | fp32 for a row, bf16 rounded up for a group    |
| int4  | integers -7 to 7            | a row, or a group      | likewise                                       |
| fp8   | e4m3, up to 448             | a row, or the tensor   | fp32                                           |
| nvfp4 | e2m1, 0 .5 1 1.5 2 3 4 6    | 16 of a row            | e4m3, times one fp32 a tensor (or a row)       |
| mxfp8 | e4m3                        | 32 of a row            | power of two (e8m0)                            |
| mxfp4 | e2m1                        | 32 of a row            | power of two (e8m0)                            |

Integers leave out -128 and -8, so that negation stays exact. Every rounding is to the nearest, halves to the even
neighbour (the even code, for e2m1): so do IEEE 754 and the OCP MX specification v1.0, and halves, which are common
among values on a coarse grid, are not pushed to one side. What exceeds the largest value saturates. A power-of-two
scale is 2 ** (floor(log2(largest)) - e), e the exponent of the format's largest value (8 for e4m3, 2 for e2m1), as
section 6.3 of that specification has it: the largest value of a block may saturate, by an eighth of it at most (e4m3)
or a quarter (e2m1). A group's scale is rounded up to bf16, so that integers never saturate. NVFP4's block scale is
largest / 6 / outer with outer = largest of the tensor / (6 * 448); where it falls below half of e4m3's least value the
block is 0. Inputs must be finite.

Two 4-bit codes share a byte, the even column in the low half. A last block that is not full is filled with zeros, and
they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0, "nvfp4": 6.0, "mxfp8": 448.0, "mxfp4": 6.0}
"""Largest magnitude of a code."""
BLOCK = {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}
"""Values that share a scale, in the formats with blocks of their own."""
EXPONENT = {"mxfp8": 8, "mxfp4": 2}
"""Exponent of the largest value."""
HALF_BYTE = ("int4", "nvfp4", "mxfp4")
INTEGER = ("int8", "int4")
_E4M3_TOP = 448.0


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix.

    Attributes:
        name: of the format.
        columns: of the matrix, without padding.
        values: (R, P) int8, float8_e4m3fn, or uint8 with two codes a byte.
        scale: (R, blocks); (1, 1) for one scale a tensor. float32, bfloat16, float8_e4m3fn, or uint8: the exponent of a
            power of two plus 127.
        outer: float32 (1, 1) or (R, 1) of NVFP4, else None.
    """

    name: str
    columns: int
    values: torch.Tensor
    scale: torch.Tensor
    outer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return sum(t.nbytes for t in (self.values, self.scale, self.outer) if t is not None)


def quantise(x: torch.Tensor, name: str, group: int = 0, *, tensor: bool = False) -> Codes:
    """Round a matrix (R, K) of any float type.

    Args:
        x: finite values.
        name: a format of the table above.
        group: values of a row that share a scale, an even number; integers only. 0 for the whole row.
        tensor: one scale for the tensor instead of one for every row (int8, int4, fp8 without groups), or one outer
            scale (NVFP4). The MX formats have neither.

    Raises:
        ValueError: no such format, a shape that is no matrix, or a group or `tensor` that it does not have.
    """
    if name not in LARGEST or x.ndim != 2:
        raise ValueError(
            f"a matrix can be quantised to {', '.join(LARGEST)}; not {name} of {x.ndim} dimensions"
        )
    if (group and (name not in INTEGER or group % 2)) or (tensor and (group or name in EXPONENT)):
        raise ValueError(f"{name} has no groups of {group} with tensor={tensor}")
    columns = x.shape[1]
    blocks = _blocks(x.float(), width_of(name, columns, group))
    top = blocks.abs().amax(-1, keepdim=True)
    if tensor and name not in BLOCK:
        top = top.amax().view(1, 1, 1)
    scale, outer = _scales(top[..., 0], name, bool(group), tensor)
    step = _step(scale, outer)[..., None]
    codes = _encode(torch.where(step > 0, blocks / step, 0.0), name)
    return Codes(name, columns, codes.flatten(1), scale, outer)


def dequantise(codes: Codes) -> torch.Tensor:
    """The values that codes stand for: float32 (R, K). A code times its scale is rounded once at most."""
    values = decode(codes.values, codes.name)
    rows, stored = values.shape
    count = codes.scale.shape[1]
    out = values.view(rows, count, stored // count) * decoded_scale(codes.scale)[..., None]
    if codes.outer is not None:
        out = out * codes.outer[..., None]
    return out.view(rows, stored)[:, : codes.columns]


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Every row of x (M, K) to a format and back, with scales of its own: float32 (M, K).

    The same bits as `dequantise(quantise(x, name))`, without packing.
    """
    blocks = _blocks(x.float(), width_of(name, x.shape[1]))
    scale, outer = _scales(blocks.abs().amax(-1), name, False, False)
    whole = decoded_scale(scale)[..., None]
    step = whole if outer is None else whole * outer[..., None]
    out = _nearest(torch.where(step > 0, blocks / step, 0.0), name) * whole
    if outer is not None:
        out = out * outer[..., None]
    return out.flatten(1)[:, : x.shape[1]]


def integers(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every row of x (M, K) with a scale of its own, one a byte: int8 (M, K) and float32 (M, 1)."""
    x = x.float()
    # Two reductions instead of abs().amax(): no copy of x.
    top = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = top / LARGEST[name]
    codes = torch.where(scale > 0, x / scale, 0.0).round_().clamp_(-LARGEST[name], LARGEST[name])
    return codes.to(torch.int8), scale


def width_of(name: str, columns: int, group: int = 0) -> int:
    """Values that share a scale in a row of so many."""
    if name in BLOCK:
        return BLOCK[name]
    return group or columns + columns % 2 * (name in HALF_BYTE)


def decode(values: torch.Tensor, name: str) -> torch.Tensor:
    """Stored codes as float32 (R, columns with padding), without their scales."""
    if name in INTEGER:
        return as_int8(values, name).float()
    if name not in HALF_BYTE:
        return values.float()
    codes = _unpack(values)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    # Subnormals 0 and 1/2 have exponent 0; the others are (1 + m/2) * 2 ** (exponent - 1).
    size = torch.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent).float() * 0.25
    return torch.where(codes >= 8, -size, size)


def as_int8(values: torch.Tensor, name: str) -> torch.Tensor:
    """Stored integers one a byte: int8 (R, columns with padding)."""
    if name not in HALF_BYTE:
        return values
    return ((_unpack(values) ^ 8) - 8).to(torch.int8)


def decoded_scale(scale: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32."""
    if scale.dtype != torch.uint8:
        return scale.float()
    exponent = scale.to(torch.int32)
    # 2 ** -127 has no place among the normal numbers of fp32: it is half of the least one.
    return torch.where(exponent == 0, 1 << 22, exponent << 23).to(torch.int32).view(torch.float32)


def _blocks(x: torch.Tensor, width: int) -> torch.Tensor:
    """(R, K) to (R, blocks, width), filled up with zeros."""
    if x.shape[1] % width:
        x = F.pad(x, (0, -x.shape[1] % width))
    return x.reshape(x.shape[0], -1, width)


def _scales(
    top: torch.Tensor, name: str, grouped: bool, tensor: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scales for the blocks' largest magnitudes (R, blocks), and NVFP4's outer one."""
    if name in EXPONENT:
        # The exponent bits of a float32 are floor(log2) + 127.
        bits = (top.view(torch.int32) >> 23) - EXPONENT[name]
        return bits.clamp(0, 254).to(torch.uint8), None
    if name == "nvfp4":
        whole = top.amax().view(1, 1) if tensor else top.amax(-1, keepdim=True)
        outer = whole / (LARGEST[name] * _E4M3_TOP)
        scale = torch.where(outer > 0, top / LARGEST[name] / outer, 0.0)
        return scale.clamp(max=_E4M3_TOP).to(E4M3), outer
    scale = top / LARGEST[name]
    return (_up(scale) if grouped else scale), None


def _up(x: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 rounded up to bfloat16."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _step(scale: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
    step = decoded_scale(scale)
    return step if outer is None else step * outer


def _encode(x: torch.Tensor, name: str) -> torch.Tensor:
    """Values in units of their scale to codes, two a byte for the 4-bit formats."""
    top = LARGEST[name]
    if name in INTEGER:
        codes = x.round().clamp(-top, top).to(torch.int8)
        return _pack(codes & 15) if name in HALF_BYTE else codes
    if name not in HALF_BYTE:
        return x.clamp(-top, top).to(E4M3)
    a = x.abs()
    # Of two neighbours the even code takes the half between them.
    code = (a > 0.25).to(torch.uint8) + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
    code = code + (a > 2.5) + (a >= 3.5) + (a > 5.0)
    return _pack(code | (torch.signbit(x).to(torch.uint8) << 3))


def _nearest(x: torch.Tensor, name: str) -> torch.Tensor:
    """Values in units of their scale to the values of their codes."""
    top = LARGEST[name]
    if name in INTEGER:
        return x.round().clamp(-top, top)
    x = x.clamp(-top, top)
    if name not in HALF_BYTE:
        return x.to(E4M3).float()
    # Steps of 1/2 up to 2, of 1 up to 4, of 2 above. Rounding to even does what `_encode` does: 5 becomes 4, 2.5
    # becomes 2, and so on, since even multiples of a step are even codes.
    a = x.abs()
    step = torch.where(a < 2.0, 0.5, torch.where(a < 4.0, 1.0, 2.0))
    return (x / step).round() * step


def _pack(codes: torch.Tensor) -> torch.Tensor:
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _unpack(values: torch.Tensor) -> torch.Tensor:
    """uint8 (R, P) to int32 (R, 2 P), numbers from 0 to 15."""
    values = values.to(torch.int32)
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
