"""DraftAttention: an attention map of the shrunken clip says which regions see each other in full."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.arrangements import in_tiles
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.attention.patterns import fit_tile
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, kw_only=True)
class DraftAttention(DynamicAttention):
    """Regions of one frame attend to each other where a low-resolution attention map is largest (arXiv 2505.14708).

    Tokens are re-ordered so that a block is a rectangle of one frame, 8 x 16 tokens where the frame allows it. Queries
    and keys are averaged over it, and of the map between the averages every head keeps its largest entries, wherever
    they are: some rows may get many blocks and others few.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="draft_attention",
        paradigm=Paradigm.ATTENTION,
        summary="The largest entries of a low-resolution attention map say which regions of frames see each other.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance",
            arxiv="2505.14708",
            code="https://github.com/shawnricecake/draft-attention",
            differs="the rectangle is fitted to the frame, where the original takes 8 x 16 and frames that it divides; "
            "every row keeps at least its best block, where the original may leave a row with none",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.8,
    )

    block: int = knob(128, choices=(64, 128))
    """Most tokens of a region; small clips get smaller regions."""
    sparsity: float = knob(0.9, low=0.0, high=0.99, identity=0.0)
    """Share of the draft map's entries that every head leaves out. The authors' code has .9 and .75."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """A small clip has too few regions to leave out nine of ten."""
        return (cls(sparsity=0.5), cls(sparsity=0.75, dense_steps=1, dense_layers=1))

    def slots(self, grid: TokenGrid, block: int) -> np.ndarray:
        return in_tiles(grid, block, fit_tile(replace(grid, frames=1), block))

    def route(self, view: View) -> Routes:
        return view.routes(largest(view.pooled_scores().softmax(-1), 1.0 - self.sparsity))


def largest(draft: torch.Tensor, share: float) -> torch.Tensor:
    """Bool like a map (B, H, N, N): the share of each head's entries that are largest, and the largest of each row.

    Of equal entries at the edge the first ones are taken.
    """
    import torch

    flat = draft.flatten(2)
    number = max(1, math.ceil(share * flat.shape[-1] - 1e-9))
    # Sorting a whole map, to tell the first of equal ones, takes longer than the attention that it saves.
    edge = torch.topk(flat, number, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = flat > edge, flat == edge
    room = number - above.sum(-1, keepdim=True, dtype=torch.int32)
    keep = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return keep.view(draft.shape).scatter_(-1, draft.argmax(-1, keepdim=True), True)
