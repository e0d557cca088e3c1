"""Linear layers on 8-bit codes, with what stands behind them in the same pass.

    scaled_matmul(a, a_scale, b, b_scale, bias=None, after=After(), dtype=bfloat16) -> y

    y[m, n] = g( a_scale[m] * b_scale[n] * sum_k a[m, k] b[n, k] + bias[n] )

* a (M, K) and b (N, K), both int8 or both float8_e4m3fn; a_scale (M,) and b_scale (N,) float32, as
  `vivace.kernels.quantise_rows` makes them; bias (N,); y (M, N) in `dtype`. b is the weight, one scale to an output
  channel.
* Products of int8 are exact in int32. Products of e4m3 are added up in float32 as the hardware does it (Hopper's tensor
  cores keep fewer bits while they add; torch._scaled_mm calls that fast accumulation).
* `after`, an `After`, is g, computed in float32: `gelu` (tanh approximation); or `residual + gate * y` with residual
  (M, N) and gate (B, N) for rows in B equal runs, or None for 1: the gated residual of an adaLN block.

No gradients. One custom operation of torch, `vivace::scaled_matmul`, with a fake implementation.

`hopper` is a persistent Gluon kernel for Hopper GPUs. `triton` runs on all GPUs that have the format. `vendor` is
cuBLAS (torch._scaled_mm by rows, torch._int_mm), with g in further passes. `reference` multiplies in float64.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.gpu import avoid_interpreted, capability, on_gpu, too_old, without_triton

if TYPE_CHECKING:
    import torch

OP = "scaled_matmul"


@dataclass(frozen=True, slots=True, eq=False)
class After:
    """What happens to a product; see the module."""

    gelu: bool = False
    residual: torch.Tensor | None = None
    gate: torch.Tensor | None = None


def check_inputs(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, bias: torch.Tensor | None,
    after: After,
) -> None:  # fmt: skip
    """Refuse what does not fit together.

    Raises:
        ValueError: the sentence says what.
    """
    import torch

    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"a and b must both be int8 or float8_e4m3fn, not {a.dtype} and {b.dtype}.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be (M, K) and (N, K).")
    (m, _), n = a.shape, b.shape[0]
    if tuple(a_scale.shape) != (m,) or tuple(b_scale.shape) != (n,):
        raise ValueError(
            f"scales must be ({m},) and ({n},), not {tuple(a_scale.shape)} and {tuple(b_scale.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be ({n},), not {tuple(bias.shape)}.")
    if after.gelu and (after.residual is not None or after.gate is not None):
        raise ValueError("gelu stands alone: no residual and no gate beside it.")
    if after.residual is not None and tuple(after.residual.shape) != (m, n):
        raise ValueError(f"residual must be ({m}, {n}), not {tuple(after.residual.shape)}.")
    if after.gate is not None:
        runs = after.gate.shape[0]
        if after.residual is None or tuple(after.gate.shape) != (runs, n) or runs == 0 or m % runs:
            raise ValueError(f"gate comes with a residual and is (B, {n}) with B dividing {m}.")


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    if reason := without_triton(context):
        return reason
    if context.get("columns", 16) % 16:
        return "the kernel takes K in multiples of 16"
    kind = context.get("kind", "int8")
    return too_old(context, f"{kind} products", (8, 9) if kind == "fp8" else (8, 0))


def _refuse_hopper(context: Mapping[str, Any]) -> str | None:
    if (
        importlib.util.find_spec("triton") is None
        or importlib.util.find_spec("triton.experimental.gluon") is None
    ):
        return "Triton with Gluon (3.5 or later) is not installed"
    if not on_gpu(context) or capability(context)[0] != 9:
        return "it is for Hopper GPUs (compute capability 9.0)"
    if context.get("columns", 16) % 16 or context.get("features", 8) % 8:
        return "it takes K in multiples of 16 and N in multiples of 8"
    return None


def _refuse_vendor(context: Mapping[str, Any]) -> str | None:
    columns, features = context.get("columns", 16), context.get("features", 16)
    if context.get("kind") == "fp8":
        if not on_gpu(context):
            return "torch._scaled_mm by rows needs a GPU"
        if columns % 16 or features % 16:
            return "torch._scaled_mm takes sizes in multiples of 16"
        return too_old(context, "products of e4m3", (8, 9))
    if on_gpu(context) and (columns % 8 or features % 8):
        return "torch._int_mm takes sizes in multiples of 8 on a GPU"
    return None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _avoid_reference(context: Mapping[str, Any]) -> str | None:
    return "multiplies in float64: for tests"


register(OP, Candidate("hopper", _refuse_hopper, _load("hopper")))
register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("vendor", _refuse_vendor, _load("vendor")))
register(OP, Candidate("reference", _never, _load("reference"), _avoid_reference))
