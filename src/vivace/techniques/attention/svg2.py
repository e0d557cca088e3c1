"""Sparse VideoGen 2: tokens are sorted by meaning before they are cut into blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.kernels.api import Choice, select
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.cluster_tokens.spec import OP as CLUSTER
from vivace.kernels.cluster_tokens.spec import Clustering, start
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout

CROWD = 16
"""Tokens that a cluster has on average at least: small clips get fewer clusters than asked for."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What stands in `View.select`: the selection of blocks as ever, and k-means beside it."""

    pick: Callable[..., Any]
    clustering: Clustering

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self.pick(*args, **more)


@dataclass(frozen=True, kw_only=True)
class Svg2(DynamicAttention):
    """k-means sorts queries and keys by meaning, per sample and head; blocks of like tokens are kept up to a mass.

    Queries and keys are clustered apart (arXiv 2505.18875). From the second step on, k-means starts at the centres of
    the step before and needs few iterations. The work of k-means is counted: assigning a token to one of K centres and
    moving them costs what K keys cost.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="svg2",
        paradigm=Paradigm.ATTENTION,
        summary="Tokens sorted by k-means into blocks of like meaning; key blocks up to a mass of the centroids' map.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
            arxiv="2505.18875",
            code="https://github.com/svg-project/Sparse-VideoGen",
            differs="tokens sorted by cluster are cut into even blocks, which are scored by their own means, where the "
            "original's blocks are the clusters and have any size; k-means starts from evenly spaced tokens, not from "
            "random ones",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    dense_steps: int = knob(10, low=0, high=50)
    """First steps that stay dense: 20 % of 50."""
    dense_layers: int = knob(1, low=0, high=8)
    """Layers that stay dense, at the front: 3 % of 30 or 40."""
    clusters_q: int = knob(300, low=1, high=1000)
    """Clusters of queries."""
    clusters_k: int = knob(1000, low=1, high=2000)
    """Clusters of keys."""
    mass: float = knob(0.9, low=0.1, high=1.0)
    """Of the probability of the map of block means that the kept blocks reach together."""
    share: float = knob(0.1, low=0.0, high=1.0)
    """Of the video's blocks that are kept at least."""
    first: int = knob(50, low=1, high=100)
    """Iterations of k-means where there are no earlier centres."""
    later: int = knob(2, low=1, high=20)
    """Iterations that start from the centres of the step before."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        main = cls(dense_steps=1, dense_layers=0, mass=0.5, first=5, clusters_q=4, clusters_k=4)
        return (main, main.replace(dense_steps=0, refresh=2))

    def least_share(self, blocks: int) -> float:
        return max(self.share, 1.0 / blocks)

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        once = sum(self._clusters(layout, name) for name in "qk") * float(layout.video_blocks * layout.block)
        least, most = sorted((self.first, self.later))
        return once * least if self.refresh == 1 else 0.0, once * most

    def _clusters(self, layout: Layout, name: str) -> int:
        asked = self.clusters_q if name == "q" else self.clusters_k
        return max(1, min(asked, (layout.video_blocks - 1) * layout.block // CROWD))

    def route(self, view: View) -> Routes:
        scores = view.pooled_scores() + view.layout.counts[: view.video].float().log()
        return view.routes(scores, share=self.share, mass=self.mass)

    def selector(self, **context: Any) -> Choice:
        """Both kernels: lists of blocks, and clusters."""
        pick, cluster = super().selector(**context), select(CLUSTER, **context)
        why = f"{pick.why}; {CLUSTER} by {cluster.name}: {cluster.why}"
        return Choice(pick.op, pick.name, why, Tools(pick.run, cluster.run()))

    def attention(self, view: View, kept: Routes | None) -> tuple[torch.Tensor, Routes]:
        """Sort, attend among the sorted blocks, and put the outputs back. `Routes` are those of the sorted blocks."""
        tools: Any = view.select
        if kept is None:
            orders = {name: self.order(view, name) for name in "qk"}
            if self.refresh > 1:
                view.memory["orders"] = orders
        else:
            orders = view.memory["orders"]
        take = tools.clustering.take
        q, k, v = take(view.q, orders["q"]), take(view.k, orders["k"]), take(view.v, orders["k"])
        if kept is None:
            sorted_view = View(q, k, v, view.layout, view.scale, {}, view.select, view.attend)
            routes = self.route(sorted_view)
        else:
            routes = kept
        out, _ = view.attend(q, k, v, routes, view.scale, view.bias)
        return tools.clustering.put(out, orders["q"]), routes

    def order(self, view: View, name: str) -> torch.Tensor:
        """The video's slots of q or k sorted by cluster, int32 (B, H, NV * C); text and its padding stay in place."""
        tools: Any = view.select
        layout = view.layout
        slots, clusters = layout.video_blocks * layout.block, self._clusters(layout, name)
        x, gone = getattr(view, name)[:, :, :slots].detach(), layout.gone[:slots]
        centres, iterations = view.memory.get(f"centres_{name}"), self.later
        if centres is None or centres.shape[:3] != (*x.shape[:2], clusters):
            # All blocks but the last are full.
            centres, iterations = start(x, clusters, slots - layout.block), self.first
        _, order, centres = tools.clustering.cluster(x, centres, iterations, gone)
        view.memory[f"centres_{name}"] = centres
        view.beside += float(iterations * clusters * slots)
        return order
