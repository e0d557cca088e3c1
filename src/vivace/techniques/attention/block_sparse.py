"""What every static block-sparse attention has in common: where it sits, when it is dense, and what it costs.

The choice between dense and sparse is made around the transformer, before its blocks run, so that a compiled block
sees a plain attribute and compiles at most twice (dense and sparse).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.shapes import TokenGrid, Workload
from vivace.kernels.api import select
from vivace.models.adapter import AttentionSite, Expert, ModelDescription, RootCall
from vivace.techniques.attention.placed import PlacedAttention, own_backend
from vivace.techniques.base import Estimate, Problem, Target, knob

if TYPE_CHECKING:
    import torch

    from vivace.kernels.block_sparse_attention.spec import BlockMap, Kernel

OP = "block_sparse_attention"
NO_GAIN = 0.6
"""Share of visited pairs above which gathering keys on a CPU costs what it saves (measured on 2,048 tokens)."""


class SwitchedAttention:
    """The kernel at one or more sites: the model's own dense attention, or a block-sparse kernel when one is set."""

    def __init__(self, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch, self._backend = dispatch_attention_fn, backend
        self.sparse: Kernel | None = None

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        if self.sparse is not None:
            return self.sparse(q, k, v, mask)
        return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Query-key pairs visited as things stand."""
        if self.sparse is not None:
            return self.sparse.pairs(batch, heads, queries, keys)
        return float(batch) * heads * queries * keys


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttention(PlacedAttention):
    """Base of the static patterns: a subclass gives the map of a grid."""

    abstract: ClassVar[bool] = True

    block: int = knob(128, choices=(64, 128))
    """Most tokens of a block; small clips get smaller blocks."""
    dense_steps: int = knob(0, low=0, high=16)
    """First steps that stay dense: they settle the layout of the clip."""
    dense_layers: int = knob(0, low=0, high=4)
    """Layers that stay dense, at the front and likewise at the back."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.block_sparse_attention`), or `auto`."""

    def block_map(self, grid: TokenGrid) -> BlockMap:
        """The pattern of a grid, without weights or tensors."""
        raise TypeError(f"{type(self).__name__} does not say which blocks it keeps")

    @property
    def operation(self) -> str:
        """The operation (folder under `vivace.kernels`) that `backend` names a kernel of."""
        return OP

    @property
    def per_site(self) -> bool:
        """Whether every attention site has a kernel of its own; the sites of an expert share one otherwise."""
        return False

    def visited_share(self, model: ModelDescription, grid: TokenGrid) -> float:
        """Share of the pairs of a grid that the sparse layers visit."""
        return self.block_map(grid).density

    # -- before anything is loaded ----------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        found = self.misplaced(model, self.operation, self.backend)
        grid = model.grid(model.workload())
        share = self.visited_share(model, grid) if grid is not None else 0.0
        if share > NO_GAIN:
            found.append(
                self.problem(
                    "no gain",
                    f"the pattern visits {share:.0%} of the pairs of a {grid} clip: little or no gain at this shape.",
                    severity="warning",
                )
            )
        return found

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        grid = model.grid(workload)
        if grid is None or self.backend == "reference":
            return base
        # Text is dense both ways, so what is saved does not depend on it (its length may differ between branches).
        video = replace(grid, text=0)
        expert = model.experts[0]
        skipped = video.video**2 - self.block_map(video).pairs(1, 1)
        evaluations = base.nfe[0] * workload.batch * max(0.0, 1.0 - self.dense_steps / workload.steps)
        saved = skipped * expert.heads * len(self._described(model, expert)) * evaluations
        pairs, flops = base.attention_pairs[0] - saved, base.flops[0] - 4.0 * saved * expert.head_dim
        return Estimate.exact(base.nfe[0], base.blocks_run[0], pairs, flops)

    def acts_on(self, index: int, depth: int) -> bool:
        return self.dense_layers <= index < depth - self.dense_layers

    # -- on a live pipeline -----------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            if sites := list(self._sites(expert)):
                shared = self._switch(sites[0])
                switches = [self._switch(site) if self.per_site else shared for site in sites]
                for site, switch in zip(sites, switches, strict=True):
                    target.set_kernel(site, switch)
                target.around_expert(expert, self._handler(target, expert, sites, switches))
                target.report(self.card.name, "sites", len(sites))

    @staticmethod
    def _switch(site: AttentionSite) -> SwitchedAttention:
        return SwitchedAttention(own_backend(site))

    def _handler(
        self,
        target: Target,
        expert: Expert,
        sites: Sequence[AttentionSite],
        switches: Sequence[SwitchedAttention],
    ) -> Callable[..., Any]:
        built: dict[tuple[TokenGrid, Any, str], Sequence[Kernel | None]] = {}

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            evaluation = target.clock.evaluation
            assert evaluation is not None  # around_expert calls handlers inside an evaluation only
            if target.clock.step < self.dense_steps:
                evaluation.variant += (f"{self.card.name}: dense",)
                return run(call)
            kernels = self._kernels(target, expert, sites, call, built)
            for switch, kernel in zip(switches, kernels, strict=True):
                switch.sparse = kernel
            if any(kernel is not None for kernel in kernels):
                evaluation.mark(self.card.name)
                target.report(self.card.name, "sparse_evaluations", 1)
            try:
                return run(call)
            finally:
                for switch in switches:
                    switch.sparse = None

        return handler

    def _kernels(
        self,
        target: Target,
        expert: Expert,
        sites: Sequence[AttentionSite],
        call: RootCall,
        built: dict[tuple[TokenGrid, Any, str], Sequence[Kernel | None]],
    ) -> Sequence[Kernel | None]:
        """The kernels of a call's shape, device and dtype, made at their first use; None where the pattern is dense."""
        assert target.adapter is not None  # without one there are no sites
        # The grid of what reaches the network, which need not be what the pipeline asked for.
        config: Any = expert.module.config
        grid = target.adapter.grid_of_call(config, call.values)
        hidden = call.values["hidden_states"]
        device, dtype = hidden.device, str(hidden.dtype).removeprefix("torch.")
        if (grid, device, dtype) not in built:
            built[grid, device, dtype] = self._build(target, sites, grid, device, dtype)
        return built[grid, device, dtype]

    def _build(
        self, target: Target, sites: Sequence[AttentionSite], grid: TokenGrid, device: Any, dtype: str
    ) -> Sequence[Kernel | None]:
        """One kernel for each site. A subclass with `per_site` overrides this."""
        block_map = self.block_map(grid)
        kernel = None
        if not block_map.keep.all():
            choice = select(OP, self.backend, device=device.type, head_dim=sites[0].head_dim, dtype=dtype)
            target.chosen(choice)
            kernel = choice.run(block_map, device)
        return [kernel] * len(sites)
