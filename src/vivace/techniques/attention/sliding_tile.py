"""Sliding-tile attention: every 3-D tile of tokens sees the tiles around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.techniques.attention.patterns import sliding_tiles
from vivace.techniques.attention.searched import SearchedSparse, example_file
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

PATTERNS = ("window:1.0", "window:0.5", "window:0.25", "window:0.1", "window:0.0")
"""What a search tries for every head."""


@dataclass(frozen=True, kw_only=True)
class SlidingTile(SearchedSparse):
    """Self- and joint attention within a window of 3-D tiles (STA, arXiv 2502.04507); text stays dense both ways.

    Tokens are regrouped so that a tile is a block; the regrouping lives in the kernel's indices and costs no copy.

    All heads have one `window`, or each its own from a mask file: `search_masks(pipeline, prompts, PATTERNS)` of
    `vivace.plans.mask_searching` makes one.
    """

    abstract: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("window",)
    card: ClassVar[Card] = Card(
        name="sliding_tile",
        paradigm=Paradigm.ATTENTION,
        summary="Attention within a sliding window of 3-D tiles: near tokens only, in whole blocks.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        calibration="optional",
        cite=Cite(
            title="Fast Video Generation with Sliding Tile Attention",
            arxiv="2502.04507",
            code="https://github.com/hao-ai-lab/FastVideo",
            differs="windows are shares of each axis; heads get their own only with a mask file, made by the error of "
            "their outputs on sampled queries; tiles adapt to any grid, also one they do not divide; windows end at "
            "the clip's border, where the original shifts them inwards",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    window: float = knob(0.25, low=0.05, high=1.0, identity=1.0)
    """Reach of a tile in each direction along each axis, as a share of the axis; at least the next tile. 1 is dense."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        found = example_file(workdir, pipeline, ("window:1.0", "window:0.5", "window:0.05"))
        return (cls(), cls(file=found, density=0.6))

    @property
    def is_identity(self) -> bool:
        """A file's windows are used whatever `window` says."""
        return not self.file and super().is_identity

    def uniform(self) -> str:
        return f"window:{self.window}"

    def block_map(self, grid: TokenGrid) -> BlockMap:
        return sliding_tiles(grid, self.window, self.block)
