"""AdaSpa: the exact shares of blocks are found at a few steps and serve the steps in between, head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout


@dataclass(frozen=True, kw_only=True)
class AdaSpa(DynamicAttention):
    """Blocks by their exact share of attention, searched rarely; heads divide the budget (arXiv 2502.21079).

    A search goes through the whole attention map, piece by piece, with the exact softmax of every row. It costs half a
    dense attention and is repeated only every `refresh` steps, since the pattern changes little from step to step.
    Every row of a head gets equally many blocks, its best ones. How many is the head's own number: they are given out
    one by one where they recover most probability, until the budget of all heads is spent.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="adaspa",
        paradigm=Paradigm.ATTENTION,
        summary="Blocks by their exact share of attention, searched at a few steps; heads divide one budget.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
            arxiv="2502.21079",
            differs="the search computes the rows' sums itself, where the original keeps them (LSE) from a dense pass; "
            "its step attends sparsely already; heads get the numbers of blocks with the largest mean recall for the "
            "budget, where the original has three levels: heads with a recall above .8 get half as many blocks, and as "
            "many heads with the lowest recall half as many again",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
    )

    dense_steps: int = knob(10, low=0, high=50)
    """First steps that stay dense, of 50, as in the paper; lower it for few-step models."""
    refresh: int = knob(20, low=1, high=50)
    """Steps from one search to the next: after 10 dense steps of 50, at steps 10 and 30, as in the paper."""
    sparsity: float = knob(0.8, low=0.0, high=0.99, identity=0.0)
    """Share of the blocks of the video's map that are left out, on average over a layer's heads; .8 in the paper."""
    mass: float = knob(0.0, low=0.0, high=0.99)
    """Probability that is recovered on average over the heads at least, text included, whatever the sparsity."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """A clip of a few steps has none to spare for a dense start."""
        return (
            cls(dense_steps=0, refresh=2, sparsity=0.5),
            cls(dense_steps=1, refresh=3, sparsity=0.9, mass=0.8),
        )

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        work = self._work(layout)
        return (work if self.refresh == 1 else 0.0), work

    @staticmethod
    def _work(layout: Layout) -> float:
        """A search in pairs: scores of the video with the video, no products with values.

        Text differs in length from call to call, and estimates are made before it is known.
        """
        return 0.5 * (layout.video_blocks * layout.block) ** 2

    def route(self, view: View) -> Routes:
        view.beside += self._work(view.layout)
        keep = best_for_all(
            exact_shares(view), view.layout.counts[: view.video], 1.0 - self.sparsity, self.mass
        )
        return view.routes(keep.float().masked_fill(~keep, float("-inf")), share=1.0)


def exact_shares(view: View) -> torch.Tensor:
    """Shares of the video's key blocks in the exact attention of its blocks of queries: float32 (B, H, NV, NV).

    A row sums to one, less what falls on text.
    """
    import torch

    from vivace.kernels.block_mass import block_mass

    layout, slots = view.layout, view.video * view.layout.block
    bias = view.bias
    if layout.padded:
        gone = torch.zeros(layout.gone.shape, device=layout.gone.device).masked_fill(
            layout.gone, float("-inf")
        )
        bias = gone.expand(len(view.q), -1) if bias is None else bias + gone
    q, real = view.q[:, :, :slots], ~layout.gone[:slots]
    return block_mass(q, view.k, real, bias, view.video, layout.blocks, view.scale)[..., : view.video]


def best_for_all(shares: torch.Tensor, tokens: torch.Tensor, share: float, mass: float) -> torch.Tensor:
    """Each row's best blocks, equally many in all rows of a head, so many that all heads together recover most.

    The c-th best block of every row adds to a head's recall what it adds on average over queries, less and less as c
    grows; so taking the largest additions of all heads first is the best division of any budget.

    Args:
        shares: (B, H, N, N), see `exact_shares`.
        tokens: (N,) real queries of every block.
        share: of the blocks of all heads that are taken, at least one for each row.
        mass: mean recall over heads that is reached, with as many more blocks as that takes.

    Returns:
        Bool (B, H, N, N).
    """
    import torch

    b, h, n, _ = shares.shape
    ranked, order = torch.sort(shares, dim=-1, descending=True, stable=True)
    weight = tokens.to(shares) / tokens.sum()
    gains = (ranked * weight[:, None]).sum(2)  # (B, H, c)
    best, place = torch.sort(gains.flatten(1), dim=-1, descending=True, stable=True)
    recall = best.cumsum(-1) / h
    before = torch.cat([torch.zeros_like(recall[:, :1]), recall[:, :-1]], -1)
    text = 1.0 - gains.sum((1, 2), keepdim=True)[:, 0] / h
    budget = math.ceil(share * h * n - 1e-9)
    taken = (torch.arange(h * n, device=shares.device) < budget) | (before + text < mass)
    number = torch.zeros_like(taken).scatter_(-1, place, taken).view(b, h, n).sum(-1).clamp(min=1)
    keep = (torch.arange(n, device=shares.device) < number[..., None, None]).expand(shares.shape)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
