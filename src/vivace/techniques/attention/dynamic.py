"""One engine for attention whose blocks are chosen as the clip is made: arrange -> score -> select -> attend -> finish.

    arrange   how tokens are cut into blocks (`vivace.techniques.attention.arrangements`), once for a grid
    score     how much each block of queries wants each block of keys, from this call's q and k
    select    which blocks it gets: a share, a mass of probability, forced ones (`vivace.kernels.block_select`)
    attend    exact attention over the lists (`vivace.kernels.block_attention`)
    finish    what is done about the blocks that were left out; nothing, for most methods
    schedule  first steps and outer layers dense, lists kept for `refresh` steps

A published method is a thin subclass. The choice between dense, routing and kept lists is made around the transformer,
before its blocks run, so that a compiled block sees plain attributes and is compiled once for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.shapes import TokenGrid, Workload
from vivace.kernels.api import Choice, select
from vivace.kernels.block_attention.spec import OP as ATTEND
from vivace.kernels.block_attention.spec import Routes
from vivace.kernels.block_select.spec import OP as SELECT
from vivace.kernels.low_bit_attention.spec import OP as ATTEND_LOW
from vivace.kernels.low_bit_attention.spec import choose as select_low
from vivace.models.adapter import AttentionSite, Expert, ModelDescription, RootCall
from vivace.techniques.attention.arrangements import block_size, in_rows, with_text
from vivace.techniques.attention.placed import PlacedAttention, own_backend
from vivace.techniques.base import Estimate, Problem, Target, knob

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vivace.kernels.block_attention.layout import Layout


@dataclass(slots=True, eq=False)
class View:
    """One attention call as a method sees it. q, k, v stand in blocks: (B, H, N * C, D), padding zero.

    Attributes:
        layout: where tokens stand; video blocks come first.
        scale: of scores.
        memory: what the method keeps for this site, branch and expert from step to step; empty at first.
        select: `vivace.kernels.block_select`, on the backend chosen for this device.
        attend: `vivace.kernels.block_attention`, likewise.
        bias: of keys (B, N * C), or None.
        weights: trained tensors of this site by name; empty for most methods.
        beside: pairs that the work beside the lists is worth, for one head of one sample; the method adds what it does.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: Layout
    scale: float
    memory: dict[str, Any]
    select: Callable[..., Any]
    attend: Callable[..., Any]
    bias: torch.Tensor | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    beside: float = 0.0
    _means: dict[str, torch.Tensor] = field(default_factory=dict)
    _alike: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        alike: bool = False,
        **rest: Any,
    ) -> View:
        """A view of (B, S, H, D) tensors; where the layout's kernel has means in the same pass, with those.

        Args:
            alike: also the likeness of q's and k's blocks.
            rest: the other attributes.
        """
        if not layout.fused:
            return cls(*(layout.arrange(x) for x in (q, k, v)), layout=layout, **rest)
        means, likes, blocks = {}, {}, []
        for name, x in (("q", q), ("k", k), ("v", v)):
            there, means[name], like = layout.arrange_pooled(x, alike and name != "v")
            blocks.append(there)
            if like is not None:
                likes[name] = like
        return cls(*blocks, layout=layout, **rest, _means=means, _alike=likes)

    @property
    def video(self) -> int:
        """Video blocks."""
        return self.layout.video_blocks

    def mean(self, name: str) -> torch.Tensor:
        """Means of the real tokens of every block of `q`, `k` or `v`: float32 (B, H, N, D)."""
        if name not in self._means:
            self._means[name] = self.layout.mean(getattr(self, name))
        return self._means[name]

    def alike(self, name: str) -> torch.Tensor:
        """Mean cosine between all pairs of real tokens of each block of `q` or `k`: float32 (B, H, N), no gradient."""
        if name not in self._alike:
            import torch

            unit = torch.nn.functional.normalize(getattr(self, name).detach().float(), dim=-1)
            # The mean over pairs of x.y is the square of the mean's length.
            self._alike[name] = self.layout.mean(unit).square().sum(-1)
        return self._alike[name]

    def pooled_scores(self) -> torch.Tensor:
        """Scaled products of block means, video against video: float32 (B, H, NV, NV)."""
        q, k = (self.mean(n)[:, :, : self.video] for n in ("q", "k"))
        # The scale on the smaller side: the scores are not read and written once more.
        return (q * self.scale) @ k.transpose(-1, -2)

    def routes(
        self,
        scores: torch.Tensor,
        share: float = 0.0,
        mass: float = 0.0,
        forced: torch.Tensor | None = None,
        softmax: bool = True,
        also: torch.Tensor | None = None,
    ) -> Routes:
        """Lists of the video's best blocks by `scores` (B, H, NV, NV), all text in every list.

        Bool scores are a selection that is made already; it is turned into lists.

        Args:
            share: of the video's blocks that every row gets, at least one block.
            mass: of probability that its blocks reach together.
            forced: bool (NV, NV), blocks that are taken in any case.
            softmax: whether probabilities are the softmax of the scores, or the scores themselves.
            also: bool (B or 1, H or 1, NV, NV), blocks that are taken besides and count towards nothing.
        """
        top = max(1, math.ceil(share * self.video - 1e-9)) if share > 0.0 else 0
        extra = {} if also is None else {"also": also}
        index, count = self.select(scores, top, mass, forced, self.layout.text_blocks, softmax, **extra)
        return Routes(index, count, self.layout.sizes, self.layout.block)


class SparseSite:
    """The kernel of one attention site: dense as the model has it, or sparse when the engine says so.

    `layout` None means dense. `kept` are lists of an earlier step that are to be used again; `last` are those that this
    call used. The engine sets the first two before the transformer runs and reads the third afterwards. `weights` are
    trained tensors of this site by name.
    """

    varies = True
    """For the counters: `pairs` speaks of the last call alone."""

    def __init__(
        self, technique: DynamicAttention, backend: Any, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._technique, self._dispatch, self._backend = technique, dispatch_attention_fn, backend
        self.layout: Layout | None = None
        self.kept: Routes | None = None
        self.last: Routes | None = None
        self.memory: dict[str, Any] = {}
        self.weights = {} if weights is None else weights
        self.beside = 0.0
        self.select: Callable[..., Any] | None = None
        self.attend: Callable[..., Any] | None = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        layout = self.layout
        if layout is None or q.shape[1] != layout.tokens or k.shape[1] != layout.tokens:
            return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)
        assert self.select is not None
        assert self.attend is not None
        view = View.of(
            q,
            k,
            v,
            layout,
            self._technique.alike and self.kept is None,
            scale=q.shape[-1] ** -0.5,
            memory=self.memory,
            select=self.select,
            attend=self.attend,
            bias=layout.key_bias(mask, len(q)),
            weights=self.weights,
        )
        out, self.last = self._technique.attention(view, self.kept)
        self.beside = view.beside
        return layout.restore(out)

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float | torch.Tensor:
        """Query-key pairs that the last call visited, padding left out."""
        layout = self.layout
        if layout is None or self.last is None or queries != layout.tokens or keys != layout.tokens:
            return float(batch) * heads * queries * keys
        from vivace.kernels.block_select.op import visited_pairs

        # What a method leaves in the place of lists (`chipmunk`) has none to go through, and knows its own number.
        by = "triton" if layout.fused and isinstance(self.last, Routes) else "reference"
        return visited_pairs(self.last, layout.counts, batch, heads, by) + self.beside * batch * heads


@dataclass(frozen=True, kw_only=True)
class DynamicAttention(PlacedAttention):
    """Base of the methods that choose blocks from q and k. A subclass gives `route`."""

    abstract: ClassVar[bool] = True
    partitions: ClassVar[int] = 1
    """Ways to cut a clip that layers take in turns."""
    alike: ClassVar[bool] = False
    """Whether `route` asks how alike the tokens of a block are (`View.alike`)."""

    block: int = knob(64, choices=(64, 128))
    """Most tokens of a block; small clips get smaller blocks."""
    dense_steps: int = knob(0, low=0, high=50)
    """First steps that stay dense: they settle the layout of the clip."""
    dense_layers: int = knob(0, low=0, high=8)
    """Layers that stay dense, at the front."""
    refresh: int = knob(1, low=1, high=16)
    """Steps for which chosen blocks are kept."""
    precision: str = "full"
    """Of the attention over chosen blocks: `full`, or `int8` scores and FP8 values (emulated on a CPU)."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.block_attention`, or `low_bit_attention` with int8), or `auto`."""

    # -- what a method says -------------------------------------------------------------------------------------

    def slots(self, grid: TokenGrid, block: int) -> np.ndarray:
        """How the video is cut into blocks of at most `block` tokens: slots (N, C)."""
        return in_rows(grid, block)

    def slots_for(self, grid: TokenGrid, block: int, partition: int) -> np.ndarray:
        """As `slots`, for the layers whose index is `partition` modulo `partitions`."""
        return self.slots(grid, block)

    def weights(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """Trained tensors of a site, for `View.weights`."""
        return {}

    def route(self, view: View) -> Routes:
        """Which key blocks every block of queries sees."""
        raise TypeError(f"{type(self).__name__} does not say which blocks it keeps")

    def attention(self, view: View, kept: Routes | None) -> tuple[torch.Tensor, Routes]:
        """The output (B, H, N * C, D), and the lists it used: new ones, or `kept`."""
        routes = self.route(view) if kept is None else kept
        out, lse = view.attend(view.q, view.k, view.v, routes, view.scale, view.bias)
        return self.finish(view, routes, out, lse), routes

    def selector(self, **context: Any) -> Choice:
        """The kernel of `View.select` for a context (device, block, blocks, head_dim)."""
        return select(SELECT, **context)

    def finish(self, view: View, routes: Routes, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """What is made of the attention over the chosen blocks; as it is, for most methods."""
        return out

    def least_share(self, blocks: int) -> float:
        """The least share of video pairs that can be visited, for estimates."""
        return 1.0 / blocks

    def most_share(self, blocks: int) -> float:
        """The largest share of video pairs that can be visited, for estimates."""
        return 1.0

    def beside(self, layout: Layout, head_dim: int) -> tuple[float, float]:
        """The least and the most that a call adds to `View.beside`, for estimates."""
        return 0.0, 0.0

    # -- before anything is loaded ------------------------------------------------------------------------------

    def layout(self, grid: TokenGrid, device: Any = "cpu", partition: int = 0) -> Layout:
        """The blocks of a grid."""
        from vivace.kernels.block_attention.layout import Layout

        slots, text = with_text(grid, self.slots_for(grid, block_size(grid, self.block), partition))
        return Layout(slots, text, device)

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if self.precision not in ("full", "int8"):
            found.append(self.problem("setting", f"precision must be full or int8, not '{self.precision}'."))
        op = ATTEND_LOW if self.precision == "int8" else ATTEND
        return [*found, *self.misplaced(model, op, self.backend)]

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: what is chosen depends on the clip."""
        grid = model.grid(workload)
        if grid is None:
            return base
        layouts = [self.layout(grid, partition=n) for n in range(self.partitions)]
        expert = model.experts[0]
        evaluations = base.nfe[0] * workload.batch * max(0.0, 1.0 - self.dense_steps / workload.steps)
        sites = expert.heads * len(self._described(model, expert)) * evaluations

        def saved(layout: Layout, least: bool) -> float:
            """Pairs that are not visited when every row gets the most blocks, the largest first, or the opposite."""
            blocks, sizes = layout.video_blocks, sorted(layout.counts[: layout.video_blocks].tolist())
            if blocks < 2:  # stays dense
                return 0.0
            share = self.most_share(blocks) if least else self.least_share(blocks)
            number = min(blocks, max(1, math.ceil(share * blocks - 1e-9)))
            gone = grid.video * (grid.video - sum((sizes[::-1] if least else sizes)[:number]))
            return (gone - self.beside(layout, expert.head_dim)[int(least)]) * sites

        most, least = max(saved(x, False) for x in layouts), min(saved(x, True) for x in layouts)
        pairs, flops = base.attention_pairs, base.flops
        cost = 4.0 * expert.head_dim
        return Estimate(
            base.nfe,
            base.blocks_run,
            (pairs[0] - most, pairs[1] - least),
            (flops[0] - cost * most, flops[1] - cost * least),
        )

    # -- on a live pipeline -------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            sites = self._sites(expert)
            placed = [(site, SparseSite(self, own_backend(site), self.weights(site))) for site in sites]
            for site, kernel in placed:
                target.set_kernel(site, kernel)
            if placed:
                target.around_expert(expert, self._handler(target, expert, placed))
                target.report(self.card.name, "sites", len(placed))

    def _handler(
        self, target: Target, expert: Expert, placed: list[tuple[AttentionSite, SparseSite]]
    ) -> Callable[..., Any]:
        built: dict[Any, tuple[list[Layout], Callable[..., Any], Callable[..., Any]]] = {}

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            clock, evaluation = target.clock, target.clock.evaluation
            assert evaluation is not None  # around_expert calls handlers inside an evaluation only
            if clock.step < self.dense_steps:
                evaluation.variant += (f"{self.card.name}: dense",)
                return run(call)
            layouts, choose, attend = self._built(target, expert, call, built)
            if min(layout.video_blocks for layout in layouts) < 2:
                return run(call)
            evaluation.mark(self.card.name)
            target.report(self.card.name, "sparse_evaluations", 1)
            # A call of a part of the batch has other rows than the lists that are kept.
            memories = self._memories(target, placed) if clock.samples is None else None
            fresh = memories is None or (clock.step - self.dense_steps) % self.refresh == 0
            for number, (site, kernel) in enumerate(placed):
                kernel.memory = {} if memories is None else memories[number]
                kernel.kept = None if fresh else kernel.memory.get("routes")
                kernel.layout = layouts[site.index % self.partitions]
                kernel.select, kernel.attend = choose, attend
            if not fresh:
                evaluation.variant += (f"{self.card.name}: kept",)
            try:
                return run(call)
            finally:
                for _, kernel in placed:
                    if self.refresh > 1 and memories is not None and kernel.last is not None:
                        kernel.memory["routes"] = kernel.last
                    kernel.layout = kernel.kept = kernel.last = None
                    kernel.memory = {}

        return handler

    def _memories(
        self, target: Target, placed: list[tuple[AttentionSite, SparseSite]]
    ) -> list[dict[str, Any]]:
        return [target.store.get(self.card.name, site.site, dict[str, Any]) for site, _ in placed]

    def _built(
        self, target: Target, expert: Expert, call: RootCall, built: dict[Any, Any]
    ) -> tuple[list[Layout], Callable[..., Any], Callable[..., Any]]:
        assert target.adapter is not None  # without one there are no sites
        # The grid of what reaches the network, which need not be what the pipeline asked for.
        grid = target.adapter.grid_of_call(expert.config, call.values)
        hidden = call.values["hidden_states"]
        device, dtype = hidden.device, str(hidden.dtype).removeprefix("torch.")
        if (grid, device, dtype) not in built:
            layouts = [self.layout(grid, device, n) for n in range(self.partitions)]
            head_dim, block = expert.attentions[0].head_dim, layouts[0].block
            context = {"device": device.type, "block": block, "head_dim": head_dim, "dtype": dtype}
            if self.precision == "int8":
                attend = select_low(self.backend, **context)
            else:
                attend = select(ATTEND, self.backend, **context)
            choose = self.selector(**context, blocks=max(layout.blocks for layout in layouts))
            target.chosen(attend)
            target.chosen(choose)
            target.chosen(layouts[0].moves)
            built[grid, device, dtype] = layouts, choose.run, attend.run
        return built[grid, device, dtype]
