"""PISA: the best key blocks exactly, all the others by a Taylor expansion around their means.

For a key k of block b, with the block's mean m_b and s the scale of scores,

    exp(s q.k) = exp(s q.m_b) exp(s q.(k - m_b)) = exp(s q.m_b) (1 + s q.(k - m_b) + ...)

Summed over the n_b keys of the block the first-order term vanishes in the denominator, because deviations from a mean
sum to zero. In the numerator it leaves C_b, the covariance (D, D) of the block's keys with its values:

    sum_j exp(s q.k_j)     ~  n_b exp(s q.m_b)
    sum_j exp(s q.k_j) v_j ~  n_b exp(s q.m_b) (mean of v in b  +  s q C_b)

With p_b(q) the share of block b in the sum of n_b exp(s q.m_b) over the blocks left out, these blocks give together

    sum_b p_b(q) (mean of v in b)  +  s q (sum_b p_b(q) C_b)

The second sum would need a matrix for every query. All queries of a block share the one of their own mean, p_b(mean q).
The result is merged with the exact part by the logarithms of both denominators.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.kernels.block_attention.spec import Routes, merge
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout

MOST = 2**27
"""Scores of queries and block means that are held at once."""


@dataclass(frozen=True, kw_only=True)
class Pisa(DynamicAttention):
    """Exact attention to the best share of key blocks, and block means with a first-order correction for the rest.

    Nothing is dropped: a query's weights cover all keys (arXiv 2602.01077). Text is always exact. The work on means is
    counted in pairs: a mean costs what a key costs, a product with a (D, D) matrix what D / 2 keys cost.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="pisa",
        paradigm=Paradigm.ATTENTION,
        summary="The best key blocks exactly, every other block by its means and a first-order correction.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers",
            arxiv="2602.01077",
            code="https://github.com/xie-lab-ml/piecewise-sparse-attention",
            differs="the first-order correction weighs the covariances of the blocks left out by the scores of each "
            "block of queries, where the original takes one unweighted mean over all blocks of a head; exact and "
            "approximate parts are two passes merged by their denominators, not one fused kernel; the share is "
            "rounded up, not down",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    dense_steps: int = knob(10, low=0, high=50)
    """First steps that stay dense: 10 to 15 of 50 in the paper."""
    share: float = knob(0.125, low=0.01, high=1.0)
    """Of the video's key blocks that every block of queries sees exactly; at least one block."""
    order: int = knob(1, choices=(0, 1))
    """Of the expansion: 0 leaves the correction out."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(dense_steps=1), cls(dense_steps=0, order=0))

    def least_share(self, blocks: int) -> float:
        return self.share

    def most_share(self, blocks: int) -> float:
        return self.share

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        work = self._work(layout, head_dim)
        return work, work

    def _work(self, layout: Layout, head_dim: int) -> float:
        """Pairs of one head that the approximate part is worth."""
        blocks, slots = layout.video_blocks, layout.video_blocks * layout.block
        work = float(slots) * blocks
        if self.order:
            # Covariances (C products of D x D a block), their sums for every block of queries, and q times those.
            work += (slots + blocks**2 + slots) * head_dim / 2
        return work

    def route(self, view: View) -> Routes:
        return view.routes(view.pooled_scores(), share=self.share)

    def finish(self, view: View, routes: Routes, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        import torch

        n, c = view.video, view.layout.block
        view.beside += self._work(view.layout, out.shape[-1])
        exact = out[:, :, : n * c], lse[:, :, : n * c]
        rest = self.rest(view, routes.mask(view.layout.blocks)[:, :, :n, :n])
        video, _ = merge(exact, rest)
        return torch.cat([video, out[:, :, n * c :]], 2)

    def rest(self, view: View, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks left out, approximately: (out, lse) of the video's queries.

        Args:
            view: the call.
            exact: bool (B or 1, H or 1, NV, NV), the pairs of blocks that are computed exactly.
        """
        import torch

        n, c, dtype = view.video, view.layout.block, view.q.dtype
        q = view.q[:, :, : n * c].unflatten(2, (n, c))
        mq, mk, mv = (view.mean(name)[:, :, :n] for name in ("q", "k", "v"))
        b, h, _, d = mk.shape
        # -inf leaves a block out; where all are left out the sum is -inf and the weights are nothing.
        known = view.layout.counts[:n].float().log().masked_fill(exact, float("-inf"))  # (B, H, NV, NV)
        covariance = self._covariance(view, mk, mv) if self.order else None
        keys, values = mk.to(dtype).transpose(-1, -2), mv.to(dtype)
        outs, sums = [], []
        step = max(1, MOST // (b * h * c * n))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            part = q[:, :, rows]  # (B, H, R, C, D)
            scores = (part.flatten(2, 3) @ keys).float().unflatten(2, part.shape[2:4]) * view.scale
            scores = scores + known[:, :, rows, None]
            lse = torch.logsumexp(scores, -1)
            weights = (scores - lse[..., None]).exp().nan_to_num(0.0).to(dtype)
            out = (weights.flatten(2, 3) @ values).unflatten(2, part.shape[2:4])
            if covariance is not None:
                shared = mq[:, :, rows] @ mk.transpose(-1, -2) * view.scale + known[:, :, rows]
                shared = torch.softmax(shared, -1).nan_to_num(0.0).to(dtype)
                out = out + (part * view.scale) @ (shared @ covariance).unflatten(-1, (d, d))
            outs.append(out)
            sums.append(lse)
        return torch.cat(outs, 2).flatten(2, 3), torch.cat(sums, 2).flatten(2, 3)

    @staticmethod
    def _covariance(view: View, mk: torch.Tensor, mv: torch.Tensor) -> torch.Tensor:
        """Of keys with values in every block, (B, H, NV, D * D) in the call's dtype."""
        n, c, dtype = view.video, view.layout.block, view.q.dtype
        k, v = (x[:, :, : n * c].unflatten(2, (n, c)) for x in (view.k, view.v))
        away = (k.float() - mk[:, :, :, None]).masked_fill(view.layout.gone.view(-1, c)[:n, :, None], 0.0)
        products = away.to(dtype).transpose(-1, -2) @ (v.float() - mv[:, :, :, None]).to(dtype)
        return (products.float() / view.layout.counts[:n, None, None]).to(dtype).flatten(3)
