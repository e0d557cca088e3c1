"""Column-sparse attention: blocks of queries recompute single keys of a dense result (Chipmunk, arXiv 2506.03275).

Shapes: B batch rows, H heads, NQ blocks of C queries, S keys, D head dimension, M columns of a block.

    select("column_delta", ...).run() -> Columns(sums, attend)

    sums(q, k, lse, block, scale, bias=None) -> (B, H, NQ, S) float32
        the probabilities of every key summed over a block's queries, exp(q . k * scale + bias - lse); a query whose lse
        is +inf counts nothing.
    attend(q, k, v, index, scale, bias=None) -> (out, lse)
        exact attention of the queries of a block over its own columns, `index` int32 (B, H, NQ, M), none twice. out is
        like q, lse (B, H, NQ * C) float32, -inf where all columns are masked (out is zero there).

q (B, H, NQ * C, D), k and v (B, H, S, D), one dtype; bias None or (B, S) float32. No gradients. Both are custom
operations of torch with fake implementations.

The delta is kept without its denominator. Of a dense result (out, lse) and the part of some columns (o, l), `remainder`
keeps what the other columns contributed, as multiples of exp(lse); `renewed` adds the same columns as they are now:

    rest = out - exp(l - lse) o,   weight = 1 - exp(l - lse)
    out' = (rest + exp(l' - lse) o') / (weight + exp(l' - lse))

So the result is a softmax over new scores in the chosen columns and old scores in the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.block_attention.spec import avoid_interpreted, refuse_triton

if TYPE_CHECKING:
    import torch

OP = "column_delta"
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclass(frozen=True, slots=True)
class Columns:
    """The two operations on one backend."""

    sums: Callable[..., Any]
    attend: Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """What some columns contributed to a dense result, in multiples of exp(lse).

    Attributes:
        out: (B, H, S, D), their values times their probabilities.
        weight: (B, H, S) float32, the sum of their probabilities.
        lse: (B, H, S) float32, of all columns.
    """

    out: torch.Tensor
    weight: torch.Tensor
    lse: torch.Tensor


def remainder(dense: tuple[torch.Tensor, torch.Tensor], part: tuple[torch.Tensor, torch.Tensor]) -> Rest:
    """A dense result (out, lse) without the columns whose own result is `part`."""
    (out, lse), (chosen, of_chosen) = dense, part
    # Queries that see nothing: -inf - -inf is no number.
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    taken = (of_chosen - lse).exp()
    return Rest((out - taken[..., None] * chosen).to(out.dtype), (1.0 - taken).clamp(min=0.0), lse)


def renewed(rest: Rest, part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The result with the columns of `part` as they are now: like `rest.out`."""
    chosen, lse = part
    growth = lse - rest.lse
    # Scores may have grown beyond what an exponential holds.
    top = growth.clamp(min=0.0)
    old, new = (-top).exp(), (growth - top).exp()
    total = (rest.weight * old + new).clamp(min=1e-30)
    return ((rest.out * old[..., None] + new[..., None] * chosen) / total[..., None]).to(rest.out.dtype)


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    divisor: int,
    bias: torch.Tensor | None,
    index: torch.Tensor | None = None,
) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        ValueError: the sentence says which.
        RuntimeError: gradients are asked for.
    """
    import torch

    (b, h, s, d), keys = q.shape, k.shape[2]
    if k.shape[:2] != (b, h) or k.shape[3] != d or s % divisor:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}, or that is not whole blocks.")
    if bias is not None and tuple(bias.shape) != (b, keys):
        raise ValueError(f"bias must be {(b, keys)}, not {tuple(bias.shape)}.")
    if index is not None and tuple(index.shape[:2]) != (b, h):
        raise ValueError(f"index is for {tuple(index.shape[:2])} rows and heads and the call has {(b, h)}.")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError("column-sparse attention has no gradients: call it under torch.no_grad().")


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


register(OP, Candidate("triton", refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))
