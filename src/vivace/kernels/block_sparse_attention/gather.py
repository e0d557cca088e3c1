"""Gathered keys and plain SDPA: no padding, no mask, any device; the fast path on a CPU.

Blocks of queries that see the same keys are joined; each copies its keys and values next to each other and attends to
them densely. Those with equally many queries and keys share one SDPA call, so rows of unequal length cost nothing
extra. Since single tokens are gathered, any permutation of the tokens is free: it is already in the indices.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from vivace.kernels.block_sparse_attention.spec import BlockMap, check_call

T = TypeVar("T")

CACHED_KEYS = 2048
"""Key tokens gathered at a time on a CPU: what fits its second-level cache (measured: up to 2x for blocks of 64)."""


class Group(NamedTuple):
    """Blocks of queries that attend in one SDPA call: G blocks of n queries that see m keys each.

    Indices point into the sequence in which the R head groups of a token stand side by side (token * R + group).
    """

    queries: torch.Tensor
    """int64 (G * n,)"""
    keys: torch.Tensor
    """int64 (G * m,)"""
    blocks: int


class GatherAttention:
    """See `spec`. Differentiable, since it is SDPA on gathered tensors."""

    def __init__(self, block_map: BlockMap, device: torch.device | str = "cpu") -> None:
        self.block_map = block_map
        self.tokens, self.head_groups = block_map.tokens, len(block_map.keep)
        at_once = CACHED_KEYS if torch.device(device).type == "cpu" else sys.maxsize
        rows: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        for group, keep in enumerate(block_map.keep):
            different, which = np.unique(keep, axis=0, return_inverse=True)
            for row, seen in enumerate(different):
                queries, keys = _tokens(block_map.slots[which.ravel() == row]), _tokens(block_map.slots[seen])
                if queries.size:
                    pair = (queries * self.head_groups + group, keys * self.head_groups + group)
                    rows.setdefault((queries.size, keys.size), []).append(pair)
        self.groups = [
            Group(
                torch.from_numpy(np.concatenate([q for q, _ in members])).to(device),
                torch.from_numpy(np.concatenate([k for _, k in members])).to(device),
                len(members),
            )
            for (_, keys_each), alike in rows.items()
            for members in _batched(alike, max(1, at_once // keys_each))
        ]
        # Where every (token, head group) went in the groups' outputs laid end to end.
        self.back = torch.argsort(torch.cat([g.queries for g in self.groups]))

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_call(self.tokens, self.head_groups, q, mask)
        batch, tokens, heads, dim = q.shape
        split = (batch, tokens * self.head_groups, heads // self.head_groups, dim)
        qs, ks, vs = q.reshape(split), k.reshape(split), v.reshape(split)
        parts = [self._attend(group, qs, ks, vs, mask) for group in self.groups]
        return torch.cat(parts, dim=1).index_select(1, self.back).view(q.shape)

    def _attend(
        self, group: Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, G * n, H / R, D) of one group; q, k, v (B, S * R, H / R, D)."""

        def blocks(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            chosen = x.index_select(1, index)
            return chosen.view(x.shape[0] * group.blocks, -1, *x.shape[2:]).transpose(1, 2)

        if mask is not None:
            seen = mask.expand(q.shape[0], -1, -1, -1)[:, 0, 0].index_select(
                1, group.keys // self.head_groups
            )
            mask = seen.view(q.shape[0] * group.blocks, 1, 1, -1)
            mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        out = F.scaled_dot_product_attention(
            blocks(q, group.queries), blocks(k, group.keys), blocks(v, group.keys), attn_mask=mask
        )
        if mask is not None:
            none_left = ~mask if mask.dtype == torch.bool else torch.isneginf(mask)
            out = out.masked_fill(none_left.all(-1, keepdim=True), 0.0)
        return out.transpose(1, 2).reshape(q.shape[0], -1, *q.shape[2:])

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Exactly the map's pairs: nothing is padded."""
        return float(self.block_map.pairs(batch, heads))


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _tokens(slots: np.ndarray) -> np.ndarray:
    return slots[slots >= 0]
