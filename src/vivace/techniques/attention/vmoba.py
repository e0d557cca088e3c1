"""VMoBA: layers take turns with 1-D, 2-D and 3-D partitions; pairs of blocks compete over a whole head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.arrangements import by_place, in_rows, in_tiles
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, kw_only=True)
class VideoMoba(DynamicAttention):
    """Pairs of query and key block are kept, best first over the whole head, up to a share of the head's similarity.

    Layers 0, 3, 6 ... cut the clip along the flattened order (near in time), layers 1, 4, 7 ... by the place in the
    plane over all frames, layers 2, 5, 8 ... into 3-D tiles (arXiv 2506.23858). A block always sees itself, so that no
    query is left without keys. The method is meant to be trained with; it is differentiable and also runs untrained.
    """

    abstract: ClassVar[bool] = False
    partitions: ClassVar[int] = 3
    card: ClassVar[Card] = Card(
        name="vmoba",
        paradigm=Paradigm.ATTENTION,
        summary="Blocks in 1, 2 and 3 dimensions in turn; pairs of blocks compete over the whole head.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        training="optional",
        cite=Cite(
            title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
            arxiv="2506.23858",
            code="https://github.com/KwaiVGI/VMoBA",
            differs="blocks of queries are chosen for, by their means, where the original chooses for every query; of "
            "the four rules in the authors' code ours is the one over a whole head; its default goes query by query; "
            "blocks have 64 or 128 tokens, the original's thousands; the second partition goes through the places of "
            "the plane row by row; blocks are added while the sum falls short, also none beside the own one, where the "
            "authors' code always adds one",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
    )

    dense_steps: int = knob(12, low=0, high=50)
    """First steps that stay dense when it runs untrained; FastVideo's settings have 12, the authors' code none."""
    threshold: float = knob(0.25, low=0.01, high=1.0)
    """Share of a head's similarity that the kept pairs reach together; .25 in the authors' code."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(dense_steps=1), cls(dense_steps=0, threshold=0.1))

    def slots_for(self, grid: TokenGrid, block: int, partition: int) -> np.ndarray:
        return (in_rows, by_place, in_tiles)[partition](grid, block)

    def route(self, view: View) -> Routes:
        import torch

        n, blocks = view.video, view.layout.blocks
        chosen = self.chosen(view.pooled_scores().detach())
        keep = torch.ones(*chosen.shape[:2], blocks, blocks, dtype=torch.bool, device=chosen.device)
        keep[:, :, :n, :n] = chosen
        return Routes.of_mask(keep, view.layout.sizes, view.layout.block)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """The pairs that are kept, bool, of scores (B, H, N, N).

        Similarities are the head's scores brought to 0 ... 1. Every block's pair with itself is taken first; of the
        others the best, of equal ones the first, while those before it sum to less than `threshold` of all.
        """
        import torch

        n = scores.shape[-1]
        flat = scores.flatten(2)
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        alike = (flat - low) / (high - low).clamp(min=1e-6)
        own = torch.eye(n, dtype=torch.bool, device=scores.device).flatten()
        order = torch.sort(alike.masked_fill(own, 2.0), dim=-1, descending=True, stable=True).indices
        sums = alike.gather(-1, order).double().cumsum(-1)
        before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
        enough = before >= self.threshold * sums[..., -1:]
        keep = torch.zeros_like(alike, dtype=torch.bool).scatter(-1, order, ~enough) | own
        return keep.unflatten(-1, (n, n))
