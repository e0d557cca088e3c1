"""SpargeAttn's first filter: blocks of similar tokens are judged by their means, the others are always computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SpargeAttention(DynamicAttention):
    """Keeps, for every block of queries, key blocks up to a mass of the softmax over block means (arXiv 2502.18137).

    A block whose tokens differ among themselves says little by its mean: as keys it is always kept, as queries it sees
    everything.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="sparge_attention",
        paradigm=Paradigm.ATTENTION,
        summary="Key blocks up to a mass of the pooled attention map; blocks that their mean does not describe stay.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
            arxiv="2502.18137",
            code="https://github.com/thu-ml/SpargeAttn",
            differs="queries and keys have blocks of one size, in the flattened order; the second filter acts on a "
            "whole tile at a time and in the Triton kernel only, elsewhere everything is computed",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    alike: ClassVar[bool] = True

    mass: float = knob(0.9, low=0.1, high=1.0)
    """Of the pooled map's probability that the kept blocks reach together."""
    similar: float = knob(0.5, low=-1.0, high=1.0)
    """Mean cosine between the tokens of a block from which on its mean speaks for it."""
    share: float = knob(0.0, low=0.0, high=1.0)
    """Where positive: the share of key blocks that is kept, in the place of a mass (the original's top-k)."""
    skip: float = knob(0.0, low=0.0, high=40.0)
    """Where positive: how far (natural logarithm) all scores of a tile must lie below their rows' largest so far for
    the product with its values to be left out; the paper's is 15 to 40."""

    def route(self, view: View) -> Routes:
        n = view.video
        alike_q, alike_k = (view.alike(name)[:, :, :n] >= self.similar for name in ("q", "k"))
        scores = view.pooled_scores().masked_fill(~alike_k[:, :, None], float("-inf"))
        share, mass = (self.share, 0.0) if self.share > 0.0 else (1.0 / n, self.mass)
        return view.routes(scores, share=share, mass=mass, also=~(alike_q[..., None] & alike_k[:, :, None]))

    def attention(self, view: View, kept: Routes | None) -> tuple[torch.Tensor, Routes]:
        if self.skip <= 0.0 or self.precision != "full":
            return super().attention(view, kept)
        routes = self.route(view) if kept is None else kept
        out, _ = view.attend(view.q, view.k, view.v, routes, view.scale, view.bias, skip=self.skip)
        return out, routes
