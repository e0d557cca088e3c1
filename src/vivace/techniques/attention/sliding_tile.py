"""Sliding-tile attention: every 3-D tile of tokens sees the tiles around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.techniques.attention.block_sparse import BlockSparseAttention
from vivace.techniques.attention.patterns import sliding_tiles
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob


@dataclass(frozen=True, kw_only=True)
class SlidingTile(BlockSparseAttention):
    """Self- and joint attention within a window of 3-D tiles (STA, arXiv 2502.04507); text stays dense both ways.

    Tokens are regrouped so that a tile is a block; the regrouping lives in the kernel's indices and costs no copy.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="sliding_tile",
        paradigm=Paradigm.ATTENTION,
        summary="Attention within a sliding window of 3-D tiles: near tokens only, in whole blocks.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Fast Video Generation with Sliding Tile Attention",
            arxiv="2502.04507",
            code="https://github.com/hao-ai-lab/FastVideo",
            differs="one window for all heads, given as a share of each axis; tiles adapt to any grid, also one "
            "they do not divide; windows end at the clip's border, where the original shifts them inwards",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    window: float = knob(0.25, low=0.05, high=1.0, identity=1.0)
    """Reach of a tile in each direction along each axis, as a share of the axis; at least the next tile. 1 is dense."""

    def block_map(self, grid: TokenGrid) -> BlockMap:
        return sliding_tiles(grid, self.window, self.block)
