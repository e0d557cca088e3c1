"""Column-sparse attention by gathering, one block of queries at a time: readable, any device."""

from __future__ import annotations

import torch


def sums(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, block: int, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """See `spec`."""
    found = []
    for queries, known in zip(q.split(block, 2), lse.split(block, 2), strict=True):
        scores = (queries @ k.transpose(-1, -2)).float() * scale
        if bias is not None:
            scores = scores + bias[:, None, None]
        found.append((scores - known[..., None]).exp().sum(2))
    return torch.stack(found, 2)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spec`."""
    (b, h, s, d), m = q.shape, index.shape[-1]
    outs, sizes = [], []
    for number, queries in enumerate(q.split(s // index.shape[2], 2)):
        columns = index[:, :, number].long()
        of_keys = columns[..., None].expand(b, h, m, d)
        scores = (queries @ k.gather(2, of_keys).transpose(-1, -2)).float() * scale
        if bias is not None:
            scores = scores + bias[:, None].expand(b, h, -1).gather(2, columns)[:, :, None]
        lse = torch.logsumexp(scores, -1)
        weights = (scores - lse[..., None]).exp().nan_to_num(0.0).to(v.dtype)
        outs.append(weights @ v.gather(2, of_keys))
        sizes.append(lse)
    return torch.cat(outs, 2), torch.cat(sizes, 2)
