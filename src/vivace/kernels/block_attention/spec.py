"""Attention of blocks of queries over lists of key blocks: one operation under every sparse method.

    out[b, h, i] = sum_j softmax_j(q[b, h, i] . k[b, h, j] * scale) v[b, h, j]

over the keys j of the blocks that i's block lists. Shapes: B batch rows, H heads, NQ and NK blocks of queries and keys,
C slots of a block, D head dimension, M the longest list.

    block_attention(q, k, v, routes, scale=None, bias=None) -> (out, lse)

* q (B, H, NQ * C, D), k and v (B, H, NK * C, D), one dtype: tokens arranged in blocks, every block's real tokens first
  (`vivace.kernels.block_attention.layout`). What stands in the slots behind them is never a key; it must be finite.
* `bias`, None or (B, NK * C) float32, is added to the scores of a key (a padding mask of text, for example).
* out like q; lse (B, H, NQ * C) float32, the natural logarithm of the sum of exponentials, -inf where nothing was seen
  (out is zero there). Two results over disjoint lists can be merged by it (`merge`).
* Differentiable in q, k and v, through both results.
* One custom operation of torch, `vivace::block_attention`, with a fake implementation: `torch.compile(fullgraph=True)`
  sees one node, whatever backend runs it.

Block lists come as `Routes`. Tolerance against the float64 reference: `TOLERANCE`, the largest error on inputs of unit
variance.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vivace.kernels.api import Candidate, register

if TYPE_CHECKING:
    import torch

OP = "block_attention"
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
BLOCKS = (64, 128)
"""Block sizes that the GPU kernels are made for."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Which key blocks every block of queries sees.

    Attributes:
        index: int32 (B or 1, H or 1, NQ, M), block numbers, the first `count` of each row valid, none twice.
        count: int32 (B or 1, H or 1, NQ).
        sizes: int32 (B or 1, H or 1, NK), real keys at the front of every key block; None: all blocks are full.
        block: C.
    """

    index: torch.Tensor
    count: torch.Tensor
    sizes: torch.Tensor | None
    block: int

    @classmethod
    def of_mask(cls, keep: torch.Tensor, sizes: torch.Tensor | None, block: int) -> Routes:
        """Routes of a bool mask (B or 1, H or 1, NQ, NK). No synchronisation: lists are as long as NK."""
        import torch

        count = keep.sum(-1, dtype=torch.int32)
        index = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
        return cls(index, count, sizes, block)

    def mask(self, key_blocks: int) -> torch.Tensor:
        """Bool (B or 1, H or 1, NQ, NK): the inverse of `of_mask`."""
        import torch

        b, h, nq, m = self.index.shape
        valid = torch.arange(m, device=self.index.device) < self.count[..., None]
        out = torch.zeros(b, h, nq, key_blocks + 1, dtype=torch.bool, device=self.index.device)
        where = torch.where(valid, self.index, key_blocks).long()
        return out.scatter_(-1, where, True)[..., :key_blocks]

    def pairs(self, query_sizes: torch.Tensor, batch: int, heads: int) -> float:
        """Query-key pairs visited by `batch` rows of `heads` heads, padding left out. Synchronises.

        Args:
            query_sizes: (NQ,) or (B or 1, H or 1, NQ) real queries in every block.
        """
        import torch

        b, h, _, m = self.index.shape
        valid = torch.arange(m, device=self.index.device) < self.count[..., None]
        if self.sizes is None:
            keys = self.count.double() * self.block
        else:
            full = self.sizes.expand(b, h, -1).double()
            seen = full.gather(-1, self.index.flatten(2).long().clamp(max=full.shape[-1] - 1))
            keys = (seen.view(self.index.shape) * valid).sum(-1)
        total = (keys * query_sizes.to(keys)).sum()
        return float(total) * (batch / b) * (heads / h)


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result over the union of two disjoint sets of keys, from (out, lse) of each."""
    import torch

    (a, la), (b, lb) = first, second
    lse = torch.logaddexp(la, lb)
    # Where nothing was seen in either, -inf - -inf is no weight.
    wa, wb = ((x - lse).exp().nan_to_num(0.0)[..., None] for x in (la, lb))
    return (a * wa + b * wb).to(a.dtype), lse


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, routes: Routes, bias: torch.Tensor | None
) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        ValueError: the sentence says which.
    """
    b, h, s, d = q.shape
    if k.shape != v.shape or k.shape[:2] != (b, h) or k.shape[3] != d:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}.")
    if s != routes.index.shape[2] * routes.block or k.shape[2] % routes.block:
        raise ValueError(
            f"{s} queries and {k.shape[2]} keys are not {routes.index.shape[2]} blocks of {routes.block} "
            "and whole blocks of keys."
        )
    for name, shape in (("index", routes.index.shape[:2]), ("count", routes.count.shape[:2])):
        if shape[0] not in (1, b) or shape[1] not in (1, h):
            raise ValueError(f"routes.{name} is for {tuple(shape)} rows and heads and the call has {(b, h)}.")
    if routes.sizes is not None and routes.sizes.shape[2] * routes.block != k.shape[2]:
        raise ValueError(f"routes.sizes tells {routes.sizes.shape[2]} blocks, and k has {k.shape[2]} slots.")
    if bias is not None and tuple(bias.shape) != (b, k.shape[2]):
        raise ValueError(f"bias must be {(b, k.shape[2])}, not {tuple(bias.shape)}.")


def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        return importlib.import_module(f"vivace.kernels.{OP}.op").runner(name)

    return load


def on_gpu(context: Mapping[str, Any]) -> bool:
    """Whether a context is for CUDA."""
    return str(context.get("device", "cpu")).startswith("cuda")


def refuse_triton(context: Mapping[str, Any]) -> str | None:
    """Why no Triton kernel of this operation can run in a context."""
    import os

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not on_gpu(context) and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU (or TRITON_INTERPRET=1, for tests)"
    if (block := context.get("block", 64)) not in BLOCKS and on_gpu(context):
        return f"its blocks have {' or '.join(map(str, BLOCKS))} tokens, not {block}"
    if context.get("head_dim", 64) not in (16, 32, 64, 128, 256):
        return f"it needs a head dimension that is a power of two from 16 to 256, not {context['head_dim']}"
    return None


def avoid_interpreted(context: Mapping[str, Any]) -> str | None:
    """Why a Triton kernel is taken only by name: without a GPU it is interpreted, program after program."""
    return None if on_gpu(context) else "Triton would be interpreted here, which is for tests"


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def refuse_hopper(context: Mapping[str, Any]) -> str | None:
    """Why the kernel for Hopper GPUs cannot run in a context."""
    if not on_gpu(context):
        return "it needs a Hopper GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (capability := context.get("capability") or _capability()) != (9, 0):
        return f"it is for compute capability 9.0, not {'.'.join(map(str, capability or ('none',)))}"
    if context.get("dtype", "bfloat16") not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {context['dtype']}"
    if (block := context.get("block", 64)) not in BLOCKS:
        return f"its blocks have {' or '.join(map(str, BLOCKS))} tokens, not {block}"
    if context.get("head_dim", 64) not in (64, 128):
        return f"it needs a head dimension of 64 or 128, not {context['head_dim']}"
    return None


def _capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


register(OP, Candidate("hopper", refuse_hopper, _load("hopper")))
register(OP, Candidate("triton", refuse_triton, _load("triton"), avoid_interpreted))
register(OP, Candidate("gather", _never, _load("gather")))
register(OP, Candidate("reference", _never, _load("reference")))
