"""The obviously right implementation: dense attention under the token mask, in float64 (float32 on request)."""

from __future__ import annotations

import torch

from vivace.kernels.block_sparse_attention.spec import BlockMap, check_call


class ReferenceAttention:
    """See `spec`. Computes in `dtype` and returns the inputs' dtype; visits every pair and masks."""

    def __init__(
        self, block_map: BlockMap, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> None:
        self.tokens, self.head_groups, self.dtype = block_map.tokens, len(block_map.keep), dtype
        self.allowed = torch.from_numpy(block_map.token_mask()).to(device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_call(self.tokens, self.head_groups, q, mask)
        qh, kh, vh = (x.to(self.dtype).transpose(1, 2) for x in (q, k, v))
        scores = qh @ kh.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.allowed, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        # A row with no key left would be 0/0; the operation defines it as zeros.
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
        return (weights @ vh).transpose(1, 2).to(q.dtype)

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Every pair: the mask is applied afterwards."""
        return float(batch) * heads * queries * keys
