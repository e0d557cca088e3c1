"""Jenga's attention carving: blocks along a space-filling curve, the best of each row, and its neighbours in space."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.arrangements import along_curve, block_size
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    from vivace.kernels.block_attention.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Jenga(DynamicAttention):
    """Keeps the best blocks of a pooled map, more where the map is flat, and all neighbours (arXiv 2505.16864).

    Blocks are stretches of a space-filling curve, compact in space and time. A row keeps its best 1 - `drop` of the
    blocks, or as many as reach the cut-off `mass` where that is more, together with every block that touches it in the
    grid. Text is always seen. Its growing resolution and skipped steps are techniques of their own here
    (`progressive_resolution` and the caches), to be put into one plan with this one.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="jenga",
        paradigm=Paradigm.ATTENTION,
        summary="Blocks along a space-filling curve: the best of each row, up to a mass, and those that touch it.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Training-Free Efficient Video Generation via Dynamic Token Carving",
            arxiv="2505.16864",
            code="https://github.com/dvlab-research/Jenga",
            differs="the curve is Hilbert's through the enclosing cube, where the original's fits the grid; the model "
            "keeps its own token order between layers; text keeps its weight, which the original raises at low "
            "resolution; one drop rate for all steps, where the original has one for each resolution",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
    )

    block: int = knob(128, choices=(64, 128))
    """Most tokens of a block; small clips get smaller blocks."""
    drop: float = knob(0.7, low=0.0, high=0.95, identity=0.0)
    """Share of key blocks that are not among a row's best. The paper has .7 at low and .8 at full resolution."""
    mass: float = knob(0.3, low=0.0, high=0.99)
    """Of the pooled map's probability that a row's best blocks reach together, however many that takes."""
    neighbours: bool = True
    """Whether blocks that touch a row's block, by a corner at least, are kept as well."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """In a small clip nearly all blocks touch each other."""
        return (
            cls(neighbours=False),
            cls(mass=0.6, neighbours=False, dense_steps=1, refresh=2),
            cls(drop=0.9),
        )

    def slots(self, grid: TokenGrid, block: int) -> np.ndarray:
        return along_curve(grid, block)

    def layout(self, grid: TokenGrid, device: Any = "cpu", partition: int = 0) -> Layout:
        import torch

        layout = super().layout(grid, device, partition)
        if self.neighbours:
            near = touching(grid, self.slots(grid, block_size(grid, self.block)))
            layout.tables["near"] = torch.from_numpy(near).to(device)
        return layout

    def least_share(self, blocks: int) -> float:
        return max(1.0 - self.drop, 1.0 / blocks)

    def route(self, view: View) -> Routes:
        near = view.layout.tables["near"][None, None] if self.neighbours else None
        return view.routes(view.pooled_scores(), share=1.0 - self.drop, mass=self.mass, also=near)


def touching(grid: TokenGrid, slots: np.ndarray) -> np.ndarray:
    """Which blocks hold tokens that are the same or next to each other in the grid, corners included: bool (N, N)."""
    block_of = np.empty(grid.video, dtype=np.int64)
    block, slot = np.nonzero(slots >= 0)
    block_of[slots[block, slot]] = block
    cells = block_of.reshape(grid.frames, grid.height, grid.width)
    near = np.eye(len(slots), dtype=bool)
    for shift in itertools.product((-1, 0, 1), repeat=3):
        here = cells[
            tuple(slice(max(0, -d), side - max(0, d)) for d, side in zip(shift, cells.shape, strict=True))
        ]
        there = cells[
            tuple(slice(max(0, d), side - max(0, -d)) for d, side in zip(shift, cells.shape, strict=True))
        ]
        near[here.reshape(-1), there.reshape(-1)] = True
    return near
