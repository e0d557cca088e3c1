"""Chipmunk: between dense steps only the strongest columns of the attention map are computed anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.shapes import Workload
from vivace.kernels.api import Choice, select
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.column_delta.spec import OP as COLUMNS
from vivace.kernels.column_delta.spec import Rest, remainder, renewed
from vivace.models.adapter import ModelDescription
from vivace.techniques.attention.dynamic import DynamicAttention, View
from vivace.techniques.base import Card, Cite, Estimate, Need, Paradigm, Stage, exclusive, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_attention.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What a dense step leaves for the steps after it, in the place of `Routes`.

    Attributes:
        index: int32 (B, H, NV, M), the columns that every block of video queries computes anew, rising.
        rest: of the video's queries, without those columns.
        visited: pairs of the call that returned this, for one head of one sample.
    """

    index: torch.Tensor
    rest: Rest
    visited: float

    def pairs(self, query_sizes: torch.Tensor, batch: int, heads: int) -> float:
        """As `Routes.pairs`."""
        return self.visited * batch * heads


@dataclass(frozen=True, kw_only=True)
class Chipmunk(DynamicAttention):
    """Column-sparse differences to the last dense step (arXiv 2506.03275).

    A dense step sums the probabilities of every key over each block of queries, remembers the strongest keys, and keeps
    its output without their contribution. The steps until the next dense one compute only these columns, from the new
    queries, keys and values, and add them to what was kept. Text is always computed, as keys and as queries.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="chipmunk",
        paradigm=Paradigm.ATTENTION,
        summary="Between dense steps only the strongest columns of the map are computed and added to the kept output.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        cite=Cite(
            title="Chipmunk: Training-Free Acceleration of Diffusion Transformers with Dynamic Column-Sparse Deltas",
            arxiv="2506.03275",
            code="https://github.com/sandyresearch/chipmunk",
            differs="new and kept columns share one softmax denominator, where the original adds outputs that were "
            "normalised apart; column sums use this step's own denominators, not the last dense step's; blocks of 64 "
            "or 128 queries (192 there); no random or local columns, no reordering of tokens, dense steps at a fixed "
            "distance; attention only, not the feed-forward layers",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.5,
    )

    block: int = knob(128, choices=(64, 128))
    """Most queries that share their columns; small clips get smaller blocks."""
    columns: float = knob(0.1, low=0.01, high=1.0)
    """Share of the video's keys that every block of queries computes anew."""
    refresh: int = knob(10, low=2, high=50)
    """Steps from one dense step to the next."""
    dense_steps: int = knob(1, low=0, high=50)
    """First steps that stay dense and keep nothing."""

    # -- one call -----------------------------------------------------------------------------------------------

    def attention(self, view: View, kept: Any) -> tuple[torch.Tensor, Any]:
        import torch

        cut = view.video * view.layout.block
        tools: Any = view.select()
        queries = view.q[:, :, :cut]
        video, text, columns = self._sizes(view.layout)
        tokens = video + text
        if kept is None:
            out, lse = view.attend(view.q, view.k, view.v, everything(view.layout), view.scale, view.bias)
            dense = out[:, :, :cut], lse[:, :, :cut]
            index = self._strongest(view, tools, dense[1], columns)
            part = tools.attend(queries, view.k, view.v, index, view.scale, view.bias)
            # Sums need scores without values: half the work of attention.
            visited = tokens * tokens + video * (0.5 * tokens + columns)
            return out, Delta(index, remainder(dense, part), visited)
        part = tools.attend(queries, view.k, view.v, kept.index, view.scale, view.bias)
        out = renewed(kept.rest, part)
        if view.layout.text_blocks:
            routes = everything(view.layout, first=view.video)
            more, _ = view.attend(view.q[:, :, cut:], view.k, view.v, routes, view.scale, view.bias)
            out = torch.cat([out, more], 2)
        return out, Delta(kept.index, kept.rest, float(video * columns + text * tokens))

    def _sizes(self, layout: Layout) -> tuple[int, int, int]:
        """Video tokens, text tokens, and columns of a block of queries."""
        video = int((layout.slots[: layout.video_blocks] >= 0).sum())
        text = layout.tokens - video
        return video, text, min(video, max(1, math.ceil(self.columns * video - 1e-9))) + text

    @staticmethod
    def _strongest(view: View, tools: Any, lse: torch.Tensor, columns: int) -> torch.Tensor:
        """The keys with the largest sums, all text among them: (B, H, NV, M), rising."""
        import torch

        layout, cut = view.layout, view.video * view.layout.block
        # Neither slots without a query nor queries that see nothing have a say.
        silent = layout.gone[:cut] | lse.isneginf()
        lse = lse.masked_fill(silent, float("inf"))
        sums = tools.sums(view.q[:, :, :cut], view.k, lse, layout.block, view.scale, view.bias)
        behind = torch.arange(sums.shape[-1], device=sums.device) >= cut
        sums = sums.masked_fill(behind, float("inf")).masked_fill(layout.gone, float("-inf"))
        return sums.topk(columns, dim=-1).indices.sort(-1).values.to(torch.int32)

    # -- counts and kernels -------------------------------------------------------------------------------------

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: text may be of another length than described, and every expert begins with a dense step."""
        grid = model.grid(workload)
        if grid is None or (layout := self.layout(grid)).video_blocks < 2:
            return base
        video, text, columns = self._sizes(layout)
        columns -= text
        expert = model.experts[0]
        a_step = (
            base.nfe[0] * workload.batch / workload.steps * expert.heads * len(self._described(model, expert))
        )
        if not a_step:
            return base
        active = max(0, workload.steps - self.dense_steps)
        fresh = math.ceil(active / self.refresh)
        # All pairs of a dense run are no fewer than those of its video and text with themselves.
        longest = (
            max(text, math.sqrt(base.attention_pairs[1] / (a_step * workload.steps)) - video) if text else 0
        )

        def change(dense: int, text: float) -> float:
            """Pairs of `dense` steps that keep something, and of the steps after them, beside those of a dense run."""
            costs = video * (0.5 * (video + text) + columns + text)
            return a_step * (dense * costs - (active - dense) * video * (video - columns))

        low, high = change(fresh, 0.0), change(min(active, fresh + len(model.experts) - 1), longest)
        per_pair = 4.0 * expert.head_dim
        pairs, flops = base.attention_pairs, base.flops
        return Estimate(
            base.nfe,
            base.blocks_run,
            (pairs[0] + low, pairs[1] + high),
            (flops[0] + per_pair * low, flops[1] + per_pair * high),
        )

    def selector(self, **context: Any) -> Choice:
        """Columns are chosen, not blocks: their kernels stand in `View.select`."""
        return select(COLUMNS, **context)


def everything(layout: Layout, first: int = 0) -> Routes:
    """Lists of all blocks, for the blocks of queries from `first` on."""
    import torch

    rows = layout.blocks - first
    index = torch.arange(layout.blocks, dtype=torch.int32, device=layout.device).expand(1, 1, rows, -1)
    count = torch.full((1, 1, rows), layout.blocks, dtype=torch.int32, device=layout.device)
    return Routes(index, count, layout.sizes, layout.block)
