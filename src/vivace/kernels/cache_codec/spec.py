"""Keys, values and remembered features in few bits: codes with a scale for each group, and back.

    pack(x, form, group, axis) -> Packed        unpack(packed) -> tensor of x's shape, dtype and device

* x: any shape, any float dtype, finite. Numbers that follow each other along `axis` share a scale, `group` of them at
  a time; 0 is the whole axis. An axis that is shorter than a group, or leaves a last one that is not full, is filled
  up with its last number, which changes no scale; codes of the filling are stored.
* Forms, with r = x in float32 and a group's largest and smallest number:

  | form | code                     | scale s                      | reads back as   | error at most          |
  |------|--------------------------|------------------------------|-----------------|------------------------|
  | int8 | -127 to 127, one a byte  | max |r| / 127                | code * s        | s / 2                  |
  | fp8  | e4m3, one a byte         | max |r| / 448                | code * s        | max(|r| / 16, s / 1024)|
  | int4 | 0 to 15, two a byte      | (max r - min r) / 15         | min r + code * s| s / 2                  |
  | int2 | 0 to 3, four a byte      | (max r - min r) / 3          | min r + code * s| s / 2                  |

  To the nearest, halves to even. The errors come on top of float32 rounding (2^-22 of the largest number) and of the
  rounding to x's dtype. int8 and fp8 are symmetric, so a zero stays zero; int4 and int2 are asymmetric, as KIVI's.
* Scales and minima are float32 for float32 numbers, and else bfloat16: minima rounded down and scales up, so that no
  code saturates and the bounds hold with the scale that is stored. A group of equal numbers has the scale 0 (int4,
  int2) and reads back as its minimum; a group of zeros has the scale 0 in every form.
* Numbers that are codes times a storable scale (plus a storable minimum) and reach both ends come back bit for bit.

Along which axis groups lie is KIVI's question (arXiv 2402.02750): a few channels of keys are large in all tokens, so
keys share scales along the tokens of a channel (`axis` of S), and values along the channels of a token (`axis` of D).
`pack_pair` does that for (B, S, H, D), and keeps the newest tokens in full. A group never crosses a sample, a head or a
row, so a sample's numbers do not depend on its company. No gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register

if TYPE_CHECKING:
    import torch

OP = "cache_codec"
FORMS = ("int8", "fp8", "int4", "int2")
PER_BYTE = {"int8": 1, "fp8": 1, "int4": 2, "int2": 4}
LEVELS = {"int8": 127.0, "fp8": 448.0, "int4": 15.0, "int2": 3.0}
"""Steps from zero (int8, fp8) or from the smallest number (int4, int2) to the largest."""
LOW = ("int4", "int2")
"""Forms with a minimum for each group."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A tensor in few bits.

    Attributes:
        form: one of `FORMS`.
        shape, dtype: of the tensor.
        axis: along which groups lie, from the end: -1 is the last.
        codes: (..., groups, bytes of a group), the axis last; int8, float8_e4m3fn, or uint8.
        scale: (..., groups) float32 or bfloat16.
        low: as `scale`, the groups' minima; None for symmetric forms.
    """

    form: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.low) if t is not None)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        """With every tensor moved elsewhere (to the host, to a device)."""
        low = None if self.low is None else move(self.low)
        return Packed(self.form, self.shape, self.dtype, self.axis, move(self.codes), move(self.scale), low)


def width_of(length: int, form: str, group: int) -> int:
    """Numbers of a group along an axis of so many: whole bytes, and no more than the axis needs."""
    per = PER_BYTE[form]
    return -(-min(group or length, length) // per) * per


def bytes_of(shape: tuple[int, ...], form: str, group: int, axis: int, scale_bytes: int) -> int:
    """`Packed.nbytes` of a shape, without a tensor. `scale_bytes`: 4 for float32 numbers, else 2."""
    length, rest = shape[axis], 1
    for i, n in enumerate(shape):
        rest *= 1 if i == axis % len(shape) else n
    width = width_of(length, form, group)
    groups = -(-length // width)
    each = width // PER_BYTE[form] + scale_bytes * (2 if form in LOW else 1)
    return rest * groups * each


def check_inputs(x: torch.Tensor, form: str, group: int, axis: int) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: the sentence says what.
        RuntimeError: gradients are asked for.
    """
    import torch

    if form not in FORMS:
        raise ValueError(f"form is one of {', '.join(FORMS)}, not '{form}'.")
    if not x.is_floating_point() or x.ndim == 0 or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"x must have floats along axis {axis}, and is {tuple(x.shape)} of {x.dtype}.")
    if x.shape[axis] == 0:
        raise ValueError(f"there is nothing along axis {axis} of {tuple(x.shape)}.")
    if group < 0 or group % PER_BYTE[form]:
        raise ValueError(f"a group of {form} has a multiple of {PER_BYTE[form]} numbers, not {group}.")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("cache_codec has no gradients: call it under torch.no_grad().")


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _reference() -> Callable[..., Any]:
    return importlib.import_module(f"vivace.kernels.{OP}.reference").pack


register(OP, Candidate("reference", _never, _reference))
