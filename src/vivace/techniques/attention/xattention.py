"""XAttention: a block is worth what the antidiagonals of its attention map add up to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.kernels.block_attention.spec import Routes
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout


@dataclass(frozen=True, kw_only=True)
class XAttention(DynamicAttention):
    """Keeps, for every block of queries, key blocks up to a mass of a strided antidiagonal map (arXiv 2503.16428).

    The map is cut into squares of `stride` x `stride` tokens, and a square is represented by the sum along its
    antidiagonal, which crosses every row and every column of it. The softmax over these sums, added up over the squares
    of a block, is the block's share (algorithm 1 of the paper).
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="x_attention",
        paradigm=Paradigm.ATTENTION,
        summary="Key blocks up to a mass of an attention map made of sums along antidiagonals.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
            arxiv="2503.16428",
            code="https://github.com/mit-han-lab/x-attention",
            differs="the map is one of video tokens alone, and text is always kept; every head has the same threshold, "
            "where the paper can also search one for each head; blocks are smaller than 128 in small clips",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    block: int = knob(128, choices=(64, 128))
    """Most tokens of a block; small clips get smaller blocks."""
    dense_steps: int = knob(5, low=0, high=50)
    """First steps that stay dense. 5 of 50 is the paper's for video; lower it for few-step models."""
    stride: int = knob(8, choices=(4, 8, 16))
    """Side of the squares in tokens: 1 / stride of all products are computed."""
    mass: float = knob(0.9, low=0.1, high=1.0)
    """Of the antidiagonal map's probability that the kept blocks reach together; the paper has .9 and .95 for video."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        """A clip of a few steps has none to spare for a dense start."""
        return (cls(dense_steps=0, mass=0.5), cls(dense_steps=1, stride=4, mass=0.7, refresh=2))

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        work = self._work(layout)
        return (work if self.refresh == 1 else 0.0), work

    def _work(self, layout: Layout) -> float:
        """The map's products in pairs: a row stands for `stride` tokens, and there is no product with values."""
        return 0.5 * (layout.video_blocks * layout.block) ** 2 / min(self.stride, layout.block)

    def route(self, view: View) -> Routes:
        view.beside += self._work(view.layout)
        return view.routes(antidiagonal_mass(view, self.stride), mass=self.mass, softmax=False)


def antidiagonal_mass(view: View, stride: int) -> torch.Tensor:
    """Shares of the video's key blocks in the antidiagonal map: float32 (B, H, NV, NV), rows sum to one.

    `stride` consecutive tokens of one side make a row of stride * D numbers, those of the other side in reversed
    order, so that one product of rows is the sum along an antidiagonal. Padding is zero and adds nothing; squares
    without a single key are left out.
    """
    import torch

    from vivace.kernels.block_mass import block_mass

    layout, n = view.layout, view.video
    stride = min(stride, layout.block)
    slots = n * layout.block
    q = view.q[:, :, :slots].unflatten(2, (-1, stride)).flatten(3)
    k = view.k[:, :, :slots].unflatten(2, (-1, stride)).flip(3).flatten(3)
    # A block's tokens stand first, so a square has a key where its first slot has.
    real = ~layout.gone[:slots:stride]
    bias = None
    if layout.padded:
        bias = torch.zeros(real.shape, device=real.device).masked_fill(~real, float("-inf"))
        bias = bias.expand(len(q), -1)
    return block_mass(q, k, real, bias, n, n, view.scale / stride)
