"""Radial attention: the further apart two frames are, the narrower the band of tokens that see each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.techniques.attention.block_sparse import BlockSparseAttention
from vivace.techniques.attention.patterns import radial
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob


@dataclass(frozen=True, kw_only=True)
class Radial(BlockSparseAttention):
    """Self- and joint attention whose density decays with the distance in time (arXiv 2506.19852), O(n log n).

    Frames up to `near` apart see each other fully; beyond, the band of tokens around the same place narrows whenever
    the distance doubles. Everybody sees the first `sink` frames. Text stays dense both ways.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="radial",
        paradigm=Paradigm.ATTENTION,
        summary="Attention that thins out with the distance in time; the first frame is seen by all.",
        objective="attention time per step, most in long clips",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
            arxiv="2506.19852",
            code="https://github.com/mit-han-lab/radial-attention",
            differs="blocks never cross a frame, and a pair of blocks is judged by the distance of its centres; "
            "the same place is always seen, where the original drops it in some far frames",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    decay: float = knob(1.0, low=0.0, high=4.0, identity=0.0, monotone="attention_pairs")
    """Halvings of the band's width for each doubling of the distance in time. 0 is dense, 1 is the paper's."""
    near: int = knob(1, low=0, high=8)
    """Frames (latent) up to this far apart see each other fully; 0 only the frame itself."""
    sink: int = knob(1, low=0, high=4)
    """First latent frames that everybody sees."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """A clip of two or three latent frames has no distance to speak of: start thinning at the next frame."""
        return (cls(near=0), cls(near=0, sink=0, dense_steps=2))

    def block_map(self, grid: TokenGrid) -> BlockMap:
        return radial(grid, self.decay, self.near, self.sink, self.block)
