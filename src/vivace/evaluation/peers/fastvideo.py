"""fastvideo-kernel: block-sparse attention over tiles of 64 tokens, routed (VSA) or in a window (STA)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from vivace.core.errors import ShapeError
from vivace.core.shapes import TokenGrid
from vivace.evaluation.peers._kernels import AttentionPeer
from vivace.evaluation.peers.base import PeerCard
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Cite, Paradigm

TILE = (4, 4, 4)
TOKENS = 64
_CODE = "https://github.com/hao-ai-lab/FastVideo"
_UNTRAINED = (
    "No training for sparsity: the original trains the model with it. Its kernel is used as a drop-in, so this "
    "says what the kernel gives an untrained model."
)
_TORCH = "The wheel asks for the torch it was built with; beside another one its Triton version of the kernel runs."


class _Tiled(AttentionPeer):
    """What the two have in common."""

    abstract = True

    def refuse(self, model: ModelDescription) -> str:
        if reason := super().refuse(model):
            return reason
        wrong = [e.head_dim for e in model.experts if e.head_dim not in (64, 128)]
        return f"{self.name} needs heads of 64 or 128 channels, not {wrong[0]}." if wrong else ""


class VideoSparseAttention(_Tiled):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="fastvideo.vsa",
        package="fastvideo-kernel",
        family=Paradigm.ATTENTION,
        summary="Every tile of 4x4x4 queries attends to the tiles whose mean keys it likes best.",
        knob="keep",
        sweep=(0.75, 0.5, 0.25, 0.125),
        default={"keep": 0.25},
        range_=(0.01, 1.0),
        notes=(
            _UNTRAINED,
            "The coarse branch, whose gate an untrained model has at zero, adds nothing to the output and is paid for.",
            _TORCH,
        ),
        cite=Cite(
            title="VSA: Faster Video Diffusion with Trainable Sparse Attention",
            arxiv="2505.13389",
            code=_CODE,
        ),
        needs_cuda=True,
    )

    def kernel(self, grid: Callable[[], TokenGrid], called: Callable[[], None], **settings: Any) -> Any:
        return RoutedTiles(grid, called, settings["keep"])


class SlidingTileAttention(_Tiled):
    """See the card."""

    abstract = False
    card: ClassVar[PeerCard] = PeerCard(
        name="fastvideo.sta",
        package="fastvideo-kernel",
        family=Paradigm.ATTENTION,
        summary="Every tile of 4x4x4 queries attends to a window of tiles around it.",
        knob="window",
        sweep=(3, 2, 1),
        default={"window": 2},
        range_=(1, 1000),
        notes=(
            "The library's own sliding-tile kernel knows three clip sizes and tiles of 384 tokens; here the window is "
            "laid over its block-sparse kernel with tiles of 64 tokens. The window counts tiles along height and "
            "width, covers all frames, and is shifted inwards at the border, as in the original.",
            "One window for all heads; the original searches a window for each head.",
            _TORCH,
        ),
        cite=Cite(title="Fast Video Generation with Sliding Tile Attention", arxiv="2502.04507", code=_CODE),
        needs_cuda=True,
    )

    def kernel(self, grid: Callable[[], TokenGrid], called: Callable[[], None], **settings: Any) -> Any:
        return WindowedTiles(grid, called, settings["window"])


class Tiles:
    """Regroups tokens by tiles around a kernel over tiles; a subclass gives the kernel and the tiles it keeps."""

    def __init__(self, grid: Callable[[], TokenGrid], called: Callable[[], None], knob: float) -> None:
        self.grid, self.called, self.knob = grid, called, knob
        self._orders: dict[tuple[TokenGrid, Any], tuple[Any, Any, Any]] = {}

    def kept(self) -> int:
        """Tiles of keys that a tile of queries attends to."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    def attend(self, q: Any, k: Any, v: Any, sizes: Any) -> Any:
        """Attention over tiles, (B, H, S, D) with the tokens of a tile side by side; `sizes` int32 (tiles,)."""
        raise TypeError(f"{type(self).__name__} does not attend")

    def overhead(self) -> int:
        """Further pairs for each batch row and head: the routing's."""
        return 0

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Query-key pairs visited."""
        return float(batch) * heads * (queries * min(self.kept() * TOKENS, keys) + self.overhead())

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        self.called()
        order, back, sizes = self._order(q.device)
        q, k, v = (x[:, order].transpose(1, 2).contiguous() for x in (q, k, v))
        return self.attend(q, k, v, sizes).transpose(1, 2)[:, back]

    def _order(self, device: Any) -> tuple[Any, Any, Any]:
        import torch

        grid = self.grid()
        if (grid, device) not in self._orders:
            order = tile_order(grid)
            tiles = len(order) // TOKENS
            self._orders[grid, device] = (
                torch.from_numpy(order).to(device),
                torch.from_numpy(np.argsort(order)).to(device),
                torch.full((tiles,), TOKENS, dtype=torch.int32, device=device),
            )
        return self._orders[grid, device]


class RoutedTiles(Tiles):
    """VSA: the tiles with the best products of mean query and mean key."""

    def kept(self) -> int:
        return max(1, round(self.knob * self.grid().video / TOKENS))

    def overhead(self) -> int:
        return (self.grid().video // TOKENS) ** 2

    def attend(self, q: Any, k: Any, v: Any, sizes: Any) -> Any:
        from fastvideo_kernel import video_sparse_attn  # pyright: ignore[reportMissingImports]

        gate = q.new_zeros(1, 1, 1, 1)
        return video_sparse_attn(
            q, k, v, sizes, sizes, topk=self.kept(), block_size=TILE, compress_attn_weight=gate
        )


class WindowedTiles(Tiles):
    """STA: a window of tiles."""

    def kept(self) -> int:
        return int(window_map(self.grid(), int(self.knob))[0].sum())

    def attend(self, q: Any, k: Any, v: Any, sizes: Any) -> Any:
        import torch
        from fastvideo_kernel import (  # pyright: ignore[reportMissingImports]
            block_sparse_attn_from_indices,
        )

        seen = window_map(self.grid(), int(self.knob))
        columns = np.stack([np.flatnonzero(row) for row in seen]).astype(np.int32)
        index = torch.from_numpy(columns).to(q.device).expand(*q.shape[:2], *columns.shape)
        count = torch.full(index.shape[:3], columns.shape[1], dtype=torch.int32, device=q.device)
        return block_sparse_attn_from_indices(q, k, v, index, count, sizes)[0]


def tiles_of(grid: TokenGrid) -> tuple[int, int, int]:
    """Tiles along frames, height and width.

    Raises:
        ShapeError: the grid is not made of whole tiles.
    """
    sides = (grid.frames, grid.height, grid.width)
    if any(side % tile for side, tile in zip(sides, TILE, strict=True)):
        raise ShapeError(
            f"a token grid of {grid} has no whole tiles of 4x4x4; choose a clip whose grid does."
        )
    t, h, w = (side // tile for side, tile in zip(sides, TILE, strict=True))
    return t, h, w


def tile_order(grid: TokenGrid) -> np.ndarray:
    """Token of every place when tiles lie side by side, int64 (tokens,)."""
    t, h, w = tiles_of(grid)
    order = np.arange(grid.video).reshape(t, TILE[0], h, TILE[1], w, TILE[2])
    return order.transpose(0, 2, 4, 1, 3, 5).reshape(-1)


def window_map(grid: TokenGrid, window: int) -> np.ndarray:
    """Tiles that see each other, bool (tiles, tiles): all frames, `window` tiles along height and along width."""
    sides = tiles_of(grid)
    seen = np.ones((1, 1), dtype=bool)
    for side, reach in zip(sides, (sides[0], window, window), strict=True):
        reach = min(reach, side)
        start = np.clip(np.arange(side) - math.floor((reach - 1) / 2), 0, side - reach)
        columns = np.arange(side)
        seen = np.kron(seen, (columns >= start[:, None]) & (columns < start[:, None] + reach))
    return seen
