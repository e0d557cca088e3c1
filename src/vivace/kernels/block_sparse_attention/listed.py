"""A static map as lists of key blocks for `vivace.kernels.block_attention`: our Triton kernel on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from vivace.kernels.block_attention.layout import Layout
from vivace.kernels.block_attention.op import block_attention
from vivace.kernels.block_attention.spec import BLOCKS, Routes
from vivace.kernels.block_sparse_attention.spec import BlockMap, check_call


class ListedAttention:
    """See `spec`. Differentiable. Tokens are put in order by one copy each way, or none where they stand in order.

    Args:
        block_map: the pattern; blocks are widened to the next size that the kernel takes.
        device: of the calls.
        backend: of `vivace.kernels.block_attention`.
    """

    def __init__(
        self, block_map: BlockMap, device: torch.device | str = "cpu", backend: str = "triton"
    ) -> None:
        self.block_map, self.backend = block_map, backend
        self.tokens, self.head_groups = block_map.tokens, len(block_map.keep)
        least = BLOCKS[0] if torch.device(device).type == "cuda" else 16
        self.layout = Layout(_widened(block_map.slots, least), device=device)
        keep = torch.from_numpy(block_map.keep & (block_map.counts > 0)).to(device)[None]
        lists = Routes.of_mask(keep, self.layout.sizes, self.layout.block)
        longest = max(1, int(lists.count.max()))
        self.routes = Routes(
            lists.index[..., :longest].contiguous(), lists.count, lists.sizes, self.layout.block
        )

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_call(self.tokens, self.head_groups, q, mask)
        q, k, v = (self.layout.arrange(x) for x in (q, k, v))
        bias = self.layout.key_bias(mask, len(q))
        return self.layout.restore(block_attention(q, k, v, self.routes, bias=bias, backend=self.backend)[0])

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """The map's pairs; what the padding of blocks adds is not work asked for and not counted."""
        return float(self.block_map.pairs(batch, heads))


class HopperAttention(ListedAttention):
    """The same by the kernel for Hopper GPUs."""

    def __init__(self, block_map: BlockMap, device: torch.device | str = "cpu") -> None:
        super().__init__(block_map, device, backend="hopper")


def _widened(slots: np.ndarray, least: int) -> np.ndarray:
    """Slots with every block's tokens first, as wide as the kernel wants them."""
    sizes = [b for b in (16, 32, *BLOCKS) if b >= least]
    width = next((b for b in sizes if b >= slots.shape[1]), slots.shape[1])
    first = np.take_along_axis(slots, np.argsort(slots < 0, axis=1, kind="stable"), 1)
    return np.pad(first, ((0, 0), (0, width - slots.shape[1])), constant_values=-1)
