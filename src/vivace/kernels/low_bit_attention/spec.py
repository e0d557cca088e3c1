"""Attention whose products run in 8 bits: INT8 scores of smoothed keys, FP8 values (arXiv 2410.02367, 2411.10958).

    low_bit_attention(q, k, v, routes=None, scale=None, bias=None, qk="int8", pv="fp8") -> (out, lse)

Tensors, `Routes`, bias and results are those of `vivace.kernels.block_attention`, so that one can stand for the other.
With `routes=None` every query sees every key: q (B, H, SQ, D), k and v (B, H, SK, D) of any length, bias (B, SK).

How numbers are rounded, with C slots to a block:

* The mean of each head's keys is subtracted from them. It moves all scores of a query alike, so that the softmax does
  not notice; `lse` gets q . mean * scale back.
* `qk="int8"`: queries and smoothed keys are rounded to the nearest of -127 .. 127 times a scale, the largest size
  among them over 127. `group` queries share one (`group` divides C, and 0 means C), and so do the keys of a block.
  Products are exact in int32.
* `pv="fp8"`: values are rounded to e4m3 with a scale per channel of a head, its largest size over 448. Probabilities
  relative to the running maximum lie in 0 .. 1 and are rounded to e4m3 after multiplication by 448. Their sum, the
  denominator, is of the numbers before rounding. Sums over a block of keys are added up in float32 (two levels).
* `qk="bf16"` and `pv="bf16"` leave a product in the dtype of its inputs, whichever that is.

What stands in the slots behind a block's keys is never a key; it must be finite. Slots behind a block's queries are
rounded together with them and must not hold larger numbers; `Layout.arrange` leaves zeros. No gradients. One custom
operation of torch, `vivace::low_bit_attention`, with a fake implementation.

`hopper` is the fast kernel for Hopper GPUs with INT8 scores, `triton` the one for all GPUs that have the number formats
(compute capability 8.9 for FP8). `reference` does the same roundings with ordinary numbers: emulated, slower than plain
attention, and taken on a GPU only by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, Choice, register, select
from vivace.kernels.block_attention.spec import Routes, avoid_interpreted, on_gpu
from vivace.kernels.block_attention.spec import check_inputs as check_block_inputs
from vivace.kernels.block_attention.spec import refuse_hopper as refuse_block_hopper
from vivace.kernels.block_attention.spec import refuse_triton as refuse_block_triton

if TYPE_CHECKING:
    import torch

OP = "low_bit_attention"
QK = ("int8", "bf16")
PV = ("fp8", "bf16")
BLOCK = 64
"""Slots of a block where no routes say it."""
GROUP = 32
"""Queries that share a scale."""
ERROR = 3e-2
"""Largest relative L2 error against exact attention, on tensors as video transformers have them."""
TOLERANCE = 2e-3
"""Largest relative L2 distance between two implementations; they may round a probability apart now and then."""
EMULATED = "emulated: rounds as the 8-bit kernel does, in ordinary numbers and without its speed"


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, routes: Routes | None, bias: torch.Tensor | None,
    qk: str, pv: str, block: int, group: int,
) -> None:  # fmt: skip
    """Refuse tensors and modes that do not fit each other.

    Raises:
        ValueError: the sentence says which.
        RuntimeError: gradients are asked for.
    """
    import torch

    if qk not in QK or pv not in PV:
        raise ValueError(
            f"qk is one of {', '.join(QK)} and pv one of {', '.join(PV)}, not '{qk}' and '{pv}'."
        )
    if group < 1 or block % group:
        raise ValueError(f"a group of {group} rows does not divide a block of {block}.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError(
            "low-bit attention has no gradients: call it under torch.no_grad(), or use block_attention for training."
        )
    if routes is not None:
        check_block_inputs(q, k, v, routes, bias)
    elif k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}.")
    elif bias is not None and tuple(bias.shape) != (q.shape[0], k.shape[2]):
        raise ValueError(f"bias must be {(q.shape[0], k.shape[2])}, not {tuple(bias.shape)}.")


def choose(prefer: str = "auto", **context: Any) -> Choice:
    """As `vivace.kernels.api.select`; a choice that only emulates says so in its reason."""
    choice = select(OP, prefer, **context)
    return replace(choice, why=f"{EMULATED}; {choice.why}") if choice.name == "reference" else choice


def capability(context: Mapping[str, Any]) -> tuple[int, int]:
    """Compute capability of the context's GPU (`capability`, or that of the current device)."""
    import torch

    return tuple(context.get("capability") or torch.cuda.get_device_capability())  # type: ignore[return-value]


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    if reason := refuse_block_triton(context):
        return reason
    if context.get("head_dim", 64) < 32:
        return f"8-bit products need a head dimension of 32 at least, not {context['head_dim']}"
    if not on_gpu(context):
        return None
    qk, pv = context.get("qk", "int8"), context.get("pv", "fp8")
    has = capability(context)
    if pv == "fp8" and has < (8, 9):
        return (
            f'FP8 products need compute capability 8.9, and this GPU has {has[0]}.{has[1]} (pv="bf16" runs)'
        )
    if qk == "int8" and has < (8, 0):
        return f"INT8 products need compute capability 8.0, and this GPU has {has[0]}.{has[1]}"
    return None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _avoid_emulation(context: Mapping[str, Any]) -> str | None:
    return EMULATED if on_gpu(context) else None


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


def _refuse_hopper(context: Mapping[str, Any]) -> str | None:
    if reason := refuse_block_hopper(context):
        return reason
    qk = context.get("qk", "int8")
    return None if qk == "int8" else f"it is for int8 scores, not {qk}"


register(OP, Candidate("hopper", _refuse_hopper, _load("hopper")))
register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference"), _avoid_emulation))
