"""How tokens stand in blocks: from (B, S, H, D) as models have them to the blocks of `spec`, and back.

Video tokens come first, in blocks of C slots; text tokens of joint attention follow in blocks of their own.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from vivace.kernels.api import Choice, select
from vivace.kernels.arrange_blocks.spec import OP as ARRANGE
from vivace.kernels.arrange_blocks.spec import Places


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    """A key mask (B or 1, 1, 1, S), bool or additive, as a bias of keys (B or 1, S) float32."""
    keys = mask[:, 0, 0]
    if keys.dtype != torch.bool:
        return keys.float()
    return torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, float("-inf"))


class Layout:
    """The place of every token.

    Args:
        slots: int64 (N, C), the token in every slot of every block; -1 behind a block's tokens. Every token 0 .. S-1
            stands in exactly one slot.
        text_blocks: how many of the last blocks hold text.
        device: of the index tensors.
        backend: of `vivace.kernels.arrange_blocks`; `moves` tells which was chosen and why.

    Raises:
        ValueError: a token is missing or doubled, or padding stands before a token.
    """

    def __init__(
        self,
        slots: np.ndarray,
        text_blocks: int = 0,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        filled = slots >= 0
        flat = slots.reshape(-1)
        if not np.array_equal(np.sort(flat[flat >= 0]), np.arange(filled.sum())) or not filled.any():
            raise ValueError("slots must hold every token 0 .. S-1 exactly once, and -1 elsewhere.")
        if (np.diff(filled.astype(np.int8), axis=1) > 0).any():
            raise ValueError("padding must stand behind the tokens of a block.")
        self.slots, self.text_blocks, self.device = slots, text_blocks, torch.device(device)
        self.blocks, self.block = slots.shape
        self.tokens = int(filled.sum())
        self.padded = not filled.all()
        self.in_order = not self.padded and np.array_equal(flat, np.arange(flat.size))
        self.order = torch.from_numpy(np.maximum(flat, 0)).to(device)
        self.back = torch.from_numpy(np.flatnonzero(flat >= 0)[np.argsort(flat[flat >= 0])]).to(device)
        self.gone = torch.from_numpy(flat < 0).to(device)
        self.counts = torch.from_numpy(filled.sum(1).astype(np.int32)).to(device)
        self.places = Places(torch.from_numpy(slots.astype(np.int32)).to(device), self.back, self.counts)
        self.moves: Choice = select(ARRANGE, backend, device=self.device.type)
        # The loaded function of a choice makes the call; here it is both directions in one.
        self._mover: Any = self.moves.run
        # Of what is arranged already: every slot is its own token.
        own = torch.arange(flat.size, device=device)
        there = torch.where(self.gone, -1, own).to(torch.int32).view(slots.shape)
        self._arranged = Places(there, own, self.counts)
        # What a method knows beforehand of the blocks of a grid, by name.
        self.tables: dict[str, torch.Tensor] = {}

    @property
    def video_blocks(self) -> int:
        """Blocks that hold video tokens: the first ones."""
        return self.blocks - self.text_blocks

    @cached_property
    def sizes(self) -> torch.Tensor | None:
        """For `Routes`: int32 (1, 1, N), or None where all blocks are full."""
        return self.counts[None, None] if self.padded else None

    @property
    def fused(self) -> bool:
        """Whether `arrange_pooled` has means and likenesses without another pass over the tokens."""
        return self._mover.fused

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, H, D) to (B, H, N * C, D); zeros in the padding. No copy where tokens stand in order."""
        if self.in_order:
            return x.transpose(1, 2)
        return self._mover.arrange(x, self.places)[0]

    def arrange_pooled(
        self, x: torch.Tensor, alike: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `arrange`, with the means of `mean` and, where asked for, the likeness of every block's tokens.

        Returns:
            blocks (B, H, N * C, D), means (B, H, N, D) float32, mean cosines (B, H, N) float32 or None.
        """
        blocks, mean, cosine = self._mover.arrange(x, self.places, not self.in_order, True, alike)
        return (x.transpose(1, 2) if self.in_order else blocks), mean, (cosine if alike else None)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """(B, H, N * C, D) to (B, S, H, D)."""
        if self.in_order:
            return y.transpose(1, 2)
        return self._mover.restore(y, None, self.places)

    def key_bias(self, mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """A key mask (B or 1, 1, 1, S), bool or additive, as the bias (B, N * C) float32 of `spec`.

        Raises:
            ValueError: the mask is not one of keys alone.
        """
        if mask is None:
            return None
        if mask.ndim != 4 or tuple(mask.shape[1:]) != (1, 1, self.tokens) or mask.shape[0] not in (1, batch):
            raise ValueError(
                f"block attention takes a key mask (1 or {batch}, 1, 1, {self.tokens}), not {tuple(mask.shape)}."
            )
        return bias_of(mask).expand(batch, -1).index_select(1, self.order)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Means over the real tokens of every block: (B, H, N * C, D) to float32 (B, H, N, D)."""
        if self.fused:
            return self._mover.arrange(x.transpose(1, 2), self._arranged, False, True)[1]
        blocks = x.unflatten(2, (self.blocks, self.block))
        if not self.padded:
            return blocks.float().mean(3)
        # The padding of an arranged tensor is zero.
        return blocks.float().sum(3) / self.counts[:, None].clamp(min=1)
