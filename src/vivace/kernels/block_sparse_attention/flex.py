"""Compiled `torch.nn.attention.flex_attention` on the permuted, padded sequence: the fast path on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vivace.kernels.block_sparse_attention.spec import BlockMap, check_call

MIN_BLOCK = {"cuda": 128}
"""Smallest block that the generated kernel takes, by device; 16 elsewhere."""


class FlexAttention:
    """See `spec`. The block mask and the compiled function belong to the instance: one per map and device."""

    def __init__(self, block_map: BlockMap, device: torch.device | str = "cpu") -> None:
        self.block_map = block_map
        self.tokens, self.head_groups = block_map.tokens, len(block_map.keep)
        device = torch.device(device)
        slots = _padded(block_map.slots, MIN_BLOCK.get(device.type, 16))
        flat = slots.reshape(-1)
        # Padding repeats token 0: it has to hold finite numbers, and the mask keeps every query away from it.
        self.order = torch.from_numpy(np.maximum(flat, 0)).to(device)
        self.back = torch.from_numpy(np.flatnonzero(flat >= 0)[np.argsort(flat[flat >= 0])]).to(device)
        self.real = torch.from_numpy(flat >= 0).to(device)
        self.block_mask = self._block_mask(slots, device)
        self._compiled: Callable[..., torch.Tensor] = torch.compile(
            flex_attention, fullgraph=True, dynamic=False
        )

    def _block_mask(self, slots: np.ndarray, device: torch.device) -> BlockMask:
        full = (slots >= 0).all(-1)
        some = (slots >= 0).any(-1)
        real = self.real

        def not_padding(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return real[kv]

        partial_blocks = _listed(self.block_map.keep & some & ~full, device)
        full_blocks = _listed(self.block_map.keep & full, device)
        block = slots.shape[1]
        return BlockMask.from_kv_blocks(
            *partial_blocks, *full_blocks, BLOCK_SIZE=(block, block), mask_mod=not_padding
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_call(self.tokens, self.head_groups, q, mask)
        # Inside somebody's compiled graph the plain function is what belongs there; it is compiled with the rest.
        run = flex_attention if torch.compiler.is_compiling() else self._compiled
        qb, kb, vb = (x.index_select(1, self.order).transpose(1, 2) for x in (q, k, v))
        out = run(qb, kb, vb, score_mod=self._bias(q, mask), block_mask=self.block_mask)
        return out.transpose(1, 2).index_select(1, self.back)

    def _bias(self, q: torch.Tensor, mask: torch.Tensor | None) -> Callable[..., torch.Tensor] | None:
        """A key mask as what is added to every score."""
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        bias = mask[:, 0, 0].expand(q.shape[0], -1).index_select(1, self.order)

        def add(
            score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, qi: torch.Tensor, kv: torch.Tensor
        ) -> torch.Tensor:
            return score + bias[b, kv]

        return add

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """The map's pairs; what the padding of blocks adds is not work asked for and not counted."""
        return float(self.block_map.pairs(batch, heads))


def _padded(slots: np.ndarray, least: int) -> np.ndarray:
    """Slots with blocks widened to a power of two of at least `least`."""
    width = max(least, 1 << (slots.shape[1] - 1).bit_length())
    return np.pad(slots, ((0, 0), (0, width - slots.shape[1])), constant_values=-1)


def _listed(keep: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(number of key blocks, their indices first) of every block of queries: int32 (1, R, N) and (1, R, N, N)."""
    number = keep.sum(-1).astype(np.int32)[None]
    index = np.argsort(~keep, axis=-1, kind="stable").astype(np.int32)[None]
    return torch.from_numpy(number).to(device), torch.from_numpy(index).to(device)
