"""Rounding activations to 8 bits, a scale to a row, fused with the norm, modulation or GELU before a linear layer.

    quantise_rows(x, kind, before) -> (codes, scale)

* x (B, S, K) of any float dtype; codes (B, S, K) int8 or float8_e4m3fn; scale (B, S) float32, codes * scale ~ f(x).
* `kind`: `int8` (largest size of a row over 127) or `fp8` (over 448); numbers times the scale's reciprocal go to the
  nearest code, halves to the even one. Rows of zeros keep zeros, with the scale of 1e-12.
* `before`, a `Before`, is f, computed in float32:
  `norm` is `layer` (mean and variance over K), `rms` (mean square over K) or `none`; `weight` and `bias` (K) are the
  norm's own; then `x * (1 + scale) + shift`, where `scale` and `shift` are (B, 1, K) or (B, S, K): adaLN modulation;
  or `gelu`, the tanh approximation, which stands alone.

A row's result depends on that row only, so a sample's does not depend on its company. No gradients. One custom
operation of torch, `vivace::quantise_rows`, with a fake implementation. Every number is read once and written once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.gpu import avoid_interpreted, too_old, without_triton

if TYPE_CHECKING:
    import torch

OP = "quantise_rows"
KINDS = ("int8", "fp8")
NORMS = ("none", "layer", "rms")
LARGEST = {"int8": 127.0, "fp8": 448.0}
TINY = 1e-12
"""Smallest size that is divided by."""
WIDEST = 16_384
"""Longest row that the Triton kernel holds in registers."""


@dataclass(frozen=True, slots=True, eq=False)
class Before:
    """What happens to a row before it is rounded; see the module."""

    norm: str = "none"
    eps: float = 1e-6
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    gelu: bool = False


def check_inputs(x: torch.Tensor, kind: str, before: Before) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: the sentence says what.
        RuntimeError: gradients are asked for.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not '{kind}'.")
    if before.norm not in NORMS:
        raise ValueError(f"norm is one of {', '.join(NORMS)}, not '{before.norm}'.")
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x must be (B, S, K), not {tuple(x.shape)}.")
    b, s, k = x.shape
    for name in ("weight", "bias"):
        given = getattr(before, name)
        if given is not None and (before.norm == "none" or tuple(given.shape) != (k,)):
            raise ValueError(f"{name} belongs to a norm and has the shape ({k},), not {tuple(given.shape)}.")
    if (before.scale is None) != (before.shift is None):
        raise ValueError("modulation takes scale and shift together.")
    for name in ("scale", "shift"):
        given = getattr(before, name)
        if given is not None and tuple(given.shape) not in ((b, 1, k), (b, s, k)):
            raise ValueError(f"{name} must be {(b, 1, k)} or {(b, s, k)}, not {tuple(given.shape)}.")
    if before.scale is not None and before.shift is not None and before.scale.shape != before.shift.shape:
        raise ValueError("scale and shift must have the same shape.")
    if before.gelu and (before.norm != "none" or before.scale is not None):
        raise ValueError("gelu stands alone: no norm and no modulation beside it.")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("quantise_rows has no gradients: call it under torch.no_grad().")


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    if reason := without_triton(context):
        return reason
    if context.get("columns", 0) > WIDEST:
        return f"rows of {context['columns']} numbers do not fit; {WIDEST} at most"
    return too_old(context, "e4m3 numbers", (8, 9)) if context.get("kind") == "fp8" else None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))
