"""Sparse VideoGen: every head is spatial or temporal, and a few sampled queries tell which, at every call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from vivace.core.shapes import TokenGrid
from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.arrangements import block_size
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout

LEAST_SAMPLED = 16
"""Of so many video tokens at most one is sampled, so that small clips do not pay more for the choice than it saves."""


@dataclass(frozen=True, kw_only=True)
class SparseVideoGen(DynamicAttention):
    """Each head of each sample sees near frames, or its own place in all frames (arXiv 2502.01776).

    For a few queries the output is computed densely and under both patterns; the pattern with the smaller squared error
    serves the head. Both patterns are bands of the same width, one in the order of frames and one in the order of
    places, plus the first frame. Blocks never cross a frame, so both are patterns of the same blocks, and a head's
    choice is nothing but another list: no head has to be laid out anew.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="sparse_videogen",
        paradigm=Paradigm.ATTENTION,
        summary="Every head sees near frames or its own place in all frames, whichever fits some sampled queries.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity",
            arxiv="2502.01776",
            code="https://github.com/svg-project/Sparse-VideoGen",
            differs="temporal heads keep the frame-major order and the band is one of blocks of neighbours within a "
            "frame, where the original transposes their tokens; sampled queries are evenly spaced over the clip, where "
            "the original draws them from its beginning; the density is that of the video, text not taken off; every "
            "model has the first frame as a sink; dense steps are counted, not a share",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
    )

    block: int = knob(64, choices=(64, 128))
    """Most tokens of a block; small clips get smaller blocks."""
    dense_steps: int = knob(5, low=0, high=50)
    """First steps that stay dense. 5 of 50 is the 10 % of the paper; lower it for few-step models."""
    dense_layers: int = knob(1, low=0, high=8)
    """Layers that stay dense, at the front. 1 is the paper's 3 % of most models."""
    density: float = knob(0.25, low=0.02, high=1.0, identity=1.0)
    """Share of the pairs that lie in either band, before blocks round it and the first frame is added."""
    samples: int = knob(64, low=1, high=256)
    """Queries that decide for a head; fewer in small clips."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """A clip of a few steps has none to spare for a dense start, nor a model of a few layers."""
        return (
            cls(dense_steps=0, dense_layers=0),
            cls(dense_steps=1, dense_layers=1, refresh=2, density=0.1),
        )

    def slots(self, grid: TokenGrid, block: int) -> np.ndarray:
        return in_frames(grid, block)

    def layout(self, grid: TokenGrid, device: Any = "cpu", partition: int = 0) -> Layout:
        import torch

        layout = super().layout(grid, device, partition)
        parts = len(self.slots(grid, block_size(grid, self.block))) // grid.frames
        keep = np.ones((2, layout.blocks, layout.blocks), dtype=bool)
        keep[:, : layout.video_blocks, : layout.video_blocks] = bands(grid, parts, self.density)
        count = keep.sum(-1)
        index = np.argsort(~keep, axis=-1, kind="stable")[..., : count.max()]
        real = np.flatnonzero(layout.slots[: layout.video_blocks] >= 0)
        number = min(self.samples, max(1, len(real) // LEAST_SAMPLED))
        rows = real[((np.arange(number) + 0.5) * len(real) / number).astype(np.int64)]
        seen = keep[:, rows // layout.block].repeat(layout.block, axis=-1) & (layout.slots >= 0).reshape(-1)
        tables = {
            "count": count.astype(np.int32),
            "index": index.astype(np.int32),
            "rows": rows,
            "seen": seen,
        }
        layout.tables.update({name: torch.from_numpy(table).to(device) for name, table in tables.items()})
        return layout

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        work = self._work(layout)
        return (work if self.refresh == 1 else 0.0), work

    @staticmethod
    def _work(layout: Layout) -> float:
        """The choice in pairs: scores of the sampled queries once, products with values three times; video keys alone.

        Text differs in length from call to call, and estimates are made before it is known.
        """
        return 2.0 * len(layout.tables["rows"]) * layout.video_blocks * layout.block

    def route(self, view: View) -> Routes:
        import torch

        layout, tables = view.layout, view.layout.tables
        view.beside += self._work(layout)
        spatial, temporal = (error_under(view, seen) for seen in tables["seen"].unbind())
        first = (spatial <= temporal)[..., None]
        count = torch.where(first, *tables["count"].unbind())
        index = torch.where(first[..., None], *tables["index"].unbind())
        return Routes(index, count, layout.sizes, layout.block)


def in_frames(grid: TokenGrid, block: int) -> np.ndarray:
    """Neighbours in the flattened order, no block across two frames: slots (frames * parts, C), about equally full."""
    area = grid.height * grid.width
    parts = -(-area // block)
    edges = np.linspace(0, area, parts + 1).round().astype(np.int64)
    place = edges[:-1, None] + np.arange(block)
    frame = np.where(place < edges[1:, None], place, -1)
    starts = np.arange(grid.frames)[:, None, None] * area
    return np.where(frame >= 0, frame + starts, -1).reshape(-1, block)


def bands(grid: TokenGrid, parts: int, density: float) -> np.ndarray:
    """The spatial and the temporal pattern over `parts` blocks of every frame: bool (2, N, N).

    A band that covers `density` of a square map reaches 1 - sqrt(1 - density) of its side to either side of the
    diagonal. Blocks are in it when their centres are, in frame-major order for the spatial pattern and in place-major
    order for the temporal one. A block sees itself in both, and all see the first frame.
    """
    area, width = grid.height * grid.width, 1.0 - math.sqrt(1.0 - density)
    edges = np.linspace(0, area, parts + 1).round()
    place = np.tile((edges[:-1] + edges[1:]) / 2, grid.frames)
    frame = np.repeat(np.arange(grid.frames), parts)
    keep = np.stack([apart(frame * area + place) <= width * grid.video, apart(place) <= width * area])
    return keep | (frame == 0)


def apart(x: np.ndarray) -> np.ndarray:
    """Distances between all numbers (N,): (N, N)."""
    return np.abs(np.subtract.outer(x, x))


def error_under(view: View, seen: torch.Tensor) -> torch.Tensor:
    """Mean squared error that a mask makes on the sampled queries' outputs, for every sample and head: (B, H).

    Args:
        seen: bool (R, N * C), the keys that each of the sampled queries sees; no padding among them.
    """
    import torch

    scores = view.q.index_select(2, view.layout.tables["rows"]) @ view.k.transpose(-1, -2)
    scores = scores.float() * view.scale
    if view.bias is not None:
        scores = scores + view.bias[:, None, None]

    def output(allowed: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
        return (p.to(view.v.dtype) @ view.v).float()

    return (output(seen) - output(~view.layout.gone)).square().mean((-1, -2))
