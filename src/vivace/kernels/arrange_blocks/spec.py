"""Moving tokens into blocks and back. Shapes: B batch rows, S tokens, H heads, D channels, N blocks of C slots.

    arrange_blocks(x, places, copy=True, pool=False, alike=False) -> (blocks, mean, alike)
    restore_blocks(blocks, mean, places, dtype) -> x

* x (B, S, H, D) as models have it; blocks (B, H, N * C, D) of x's dtype, zero in slots that hold no token.
* `places` says where tokens stand: `slots` int32 (N, C), the token in every slot or -1, a block's tokens first;
  `back` int64 (S,), the slot of every token; `counts` int32 (N,), tokens of every block.
* mean (B, H, N, D) float32: over a block's tokens, summed in float32; zero for a block without tokens.
* alike (B, H, N) float32: the mean cosine between all pairs of a block's tokens, each with itself included; 1 for equal
  tokens. It has no gradient.
* `copy`, `pool` and `alike` say which of them are wanted; the others come back with no elements.
* `restore_blocks` is the transpose of what `arrange_blocks` does to blocks and means (either may be None): alone with
  blocks it is the inverse, with means it adds 1 / count of each to the block's tokens. So each is the other's gradient.

Every token is read once and written once, whatever is wanted. One custom operation of torch each
(`vivace::arrange_blocks`, `vivace::restore_blocks`) with fake implementations, differentiable. Float64 is summed in
float32 by the Triton kernel and as it is by the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register
from vivace.kernels.block_attention.spec import avoid_interpreted, on_gpu

if TYPE_CHECKING:
    import torch

OP = "arrange_blocks"


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where tokens stand; see the module."""

    slots: torch.Tensor
    back: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Mover:
    """Both operations on one backend. `fused`: means cost nothing beside a copy."""

    arrange: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    restore: Callable[..., torch.Tensor]
    fused: bool


def _load(name: str) -> Callable[[], Any]:
    def load() -> Any:
        return importlib.import_module(f"vivace.kernels.{OP}.op").mover(name)

    return load


def _refuse_triton(context: Mapping[str, Any]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not on_gpu(context) and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    return None


def _never(context: Mapping[str, Any]) -> str | None:
    return None


register(OP, Candidate("triton", _refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("reference", _never, _load("reference")))
