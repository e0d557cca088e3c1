"""Block-sparse attention: the operation, its static pattern, and its implementations.

    out[b, i, h] = sum_j softmax_j(q[b, i, h] . k[b, j, h] / sqrt(D)) v[b, j, h]     over the keys j that i may see

Tokens are dealt out to *blocks* in any order; a block map says which blocks of keys every block of queries sees.
Shapes: B batch rows, S tokens, H heads, D head dimension, N blocks, C slots of a block, R head groups.

An implementation is a class `Kernel(block_map, device)` whose instances are called as `kernel(q, k, v, mask=None)`
with q, k, v (B, S, H, D) of one dtype on that device and return (B, S, H, D):

* `mask` is None or a key mask (B or 1, 1, 1, S), bool (True = may be seen) or additive; it comes on top of the map.
  A query that sees no key at all gets zeros. Any other mask is refused with a ValueError.
* Inputs may have any strides and are never written to.
* `kernel.pairs(batch, heads, queries, keys)` is the exact number of query-key pairs it visits.
* Fit for `torch.compile(fullgraph=True)`: index tensors are made in the constructor.

Tolerance against the float64 reference: see `TOLERANCE`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from vivace.kernels.api import Candidate, register

OP = "block_sparse_attention"
TOLERANCE: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""Largest absolute error against the float64 reference for unit-variance inputs, by dtype."""


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which blocks of tokens see which.

    Args:
        slots: int64 (N, C), the token in every slot of every block; -1 marks padding. Every token 0 .. S-1 stands in
            exactly one slot.
        keep: bool (R, N, N), [head group, block of queries, block of keys]. R is 1 (one map for all heads) or the
            number of heads.

    Raises:
        ValueError: a token is missing or doubled, or a block of queries would see nothing.
    """

    slots: np.ndarray
    keep: np.ndarray

    def __post_init__(self) -> None:
        filled = np.sort(self.slots[self.slots >= 0])
        if self.slots.ndim != 2 or not np.array_equal(filled, np.arange(filled.size)) or not filled.size:
            raise ValueError("slots must hold every token 0 .. S-1 exactly once, and -1 elsewhere.")
        blocks = len(self.slots)
        if self.keep.ndim != 3 or self.keep.shape[1:] != (blocks, blocks) or self.keep.dtype != np.bool_:
            raise ValueError(f"keep must be bool (1 or heads, {blocks}, {blocks}), not {self.keep.shape}.")
        filled_blocks = np.flatnonzero(self.counts)
        if not self.keep[:, filled_blocks][:, :, filled_blocks].any(axis=-1).all():
            raise ValueError("every block of queries must see at least one block of keys that is not empty.")

    @classmethod
    def contiguous(cls, keep: np.ndarray, block: int, tokens: int) -> BlockMap:
        """Blocks of `block` neighbouring tokens; the last one is padded. `keep` bool (R, N, N)."""
        blocks = -(-tokens // block)
        slots = np.full(blocks * block, -1, dtype=np.int64)
        slots[:tokens] = np.arange(tokens)
        return cls(slots.reshape(blocks, block), keep)

    @property
    def tokens(self) -> int:
        """S."""
        return int(self.counts.sum())

    @cached_property
    def counts(self) -> np.ndarray:
        """Tokens in every block, int64 (N,)."""
        return (self.slots >= 0).sum(-1)

    @cached_property
    def _pairs(self) -> np.ndarray:
        """Visited pairs by head group, int64 (R,)."""
        return np.einsum("q,rqk,k->r", self.counts, self.keep.astype(np.int64), self.counts)

    def pairs(self, batch: int, heads: int) -> int:
        """Query-key pairs visited by `batch` rows of `heads` heads; padding is not counted."""
        return int(self._pairs.sum()) * (heads // len(self.keep)) * batch

    @property
    def density(self) -> float:
        """Share of all query-key pairs that is visited, 0 to 1."""
        return self.pairs(1, len(self.keep)) / (len(self.keep) * self.tokens**2)

    def token_mask(self) -> np.ndarray:
        """The map token by token, bool (R, S, S). For tests and small sizes."""
        block_of = np.empty(self.tokens, dtype=np.int64)
        block, slot = np.nonzero(self.slots >= 0)
        block_of[self.slots[block, slot]] = block
        return self.keep[:, block_of[:, None], block_of[None, :]]


class Kernel(Protocol):
    """An instance of an implementation; see the module."""

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any: ...

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float: ...


def check_call(tokens: int, maps: int, q: Any, mask: Any) -> None:
    """Refuse a call that does not fit the map of `tokens` tokens and `maps` head groups.

    Takes plain numbers, since it also runs inside compiled graphs.

    Raises:
        ValueError: other token or head count than the map's, or a mask that is not a key mask.
    """
    if q.shape[1] != tokens:
        raise ValueError(f"the block map is for {tokens} tokens and the call has {q.shape[1]}.")
    if maps not in (1, q.shape[2]):
        raise ValueError(f"the block map is for {maps} heads and the call has {q.shape[2]}.")
    if mask is not None and (
        mask.ndim != 4 or tuple(mask.shape[1:]) != (1, 1, tokens) or mask.shape[0] not in (1, q.shape[0])
    ):
        raise ValueError(
            f"block-sparse attention takes a key mask (1 or {q.shape[0]}, 1, 1, {tokens}), "
            f"not one of shape {tuple(mask.shape)}."
        )


def _load(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        import importlib

        return getattr(importlib.import_module(f"vivace.kernels.{OP}.{module}"), name)

    return load


def _on_gpu(context: Mapping[str, Any]) -> bool:
    return str(context.get("device", "cpu")).startswith("cuda")


def _refuse_flex(context: Mapping[str, Any]) -> str | None:
    if _on_gpu(context):
        small = context.get("head_dim", 16) < 16
        return "flex_attention on a GPU needs heads of at least 16 dimensions" if small else None
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return "compiled flex_attention needs a C++ compiler on a CPU"
    return None


def _avoid_flex(context: Mapping[str, Any]) -> str | None:
    return None if _on_gpu(context) else "compiles for seconds on a CPU and is no faster there than gather"


def _never(context: Mapping[str, Any]) -> str | None:
    return None


def _refuse_listed(context: Mapping[str, Any]) -> str | None:
    from vivace.kernels.block_attention.spec import refuse_triton

    if not _on_gpu(context):
        return "Triton needs a GPU"
    # Blocks are widened to a size that it takes.
    return refuse_triton({k: v for k, v in context.items() if k != "block"})


def _refuse_hopper(context: Mapping[str, Any]) -> str | None:
    from vivace.kernels.block_attention.spec import refuse_hopper

    return refuse_hopper({k: v for k, v in context.items() if k != "block"})


register(OP, Candidate("hopper", _refuse_hopper, _load("listed", "HopperAttention")))
register(OP, Candidate("triton", _refuse_listed, _load("listed", "ListedAttention")))
register(OP, Candidate("flex", _refuse_flex, _load("flex", "FlexAttention"), _avoid_flex))
register(OP, Candidate("gather", _never, _load("gather", "GatherAttention")))
register(OP, Candidate("reference", _never, _load("reference", "ReferenceAttention")))
