"""8-bit linear layers on fused kernels: norm, modulation, GELU, gate and residual in the rounding and the product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.errors import ConfigError, PlanError
from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import AUTO, Choice, candidates
from vivace.kernels.scaled_matmul.spec import OP
from vivace.models.adapter import Expert, LinearSite, ModelDescription, Need
from vivace.techniques.base import (
    ALL_SITES,
    Card,
    Cite,
    Claim,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.compression.fused_choice import Chooser, Size
from vivace.techniques.compression.linears import blocks_between, takes_role

if TYPE_CHECKING:
    from vivace.models.fused_parts import Kernels, Rounding

NAME = "fused_linear"
MODULES = "module.output"
LORA = (
    "a LoRA is loaded beside the layers, and what is fused before a layer would not reach it; merge it "
    "(pipeline.fuse_lora(), or the technique lora), or set fuse: layers."
)


@dataclass(frozen=True, kw_only=True)
class FusedLinear(Technique):
    """Round the weights of the blocks' linears to 8 bits, their inputs as they come, and fuse what stands around them.

    `layers`: every layer is a rounding pass and a product with its bias; q, k and v of one input share its codes.
    `ffn`: GELU runs inside the rounding between the two layers of a feed-forward. `block`: norm and modulation run
    inside the rounding before them, gate and residual inside the product behind them, where the family's adapter says
    how a block is written (Wan); elsewhere it is `ffn`. Attention keeps its processor, whoever set it.
    On a GPU the backend of every size of layer is the one that was fastest when measured there.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Linear layers in int8 or fp8 on fused kernels: norm, modulation, GELU, gate and residual cost no "
        "passes of their own.",
        objective="time per step on Hopper and other GPUs with 8-bit tensor cores; half of the weights' memory",
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"), exclusive(MODULES)),
        cite=Cite(
            title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
            arxiv="2211.10438",
            code="https://github.com/mit-han-lab/smoothquant",
            differs="its per-token, per-channel W8A8 without smoothing; the parts of an adaLN block around the layers "
            "are fused into the rounding pass and into the product's epilogue; fp8 (e4m3) beside int8",
        ),
        needs=(Need.LINEAR_SITES,),
        fidelity=0.1,
    )

    kind: str = knob("int8", choices=("int8", "fp8"))
    """Codes of weights and activations: integers, or e4m3 (compute capability 8.9 and later)."""
    roles: str = knob("all", choices=("all", "ffn", "attention"))
    """Which linears of a block: feed-forward, attention projections (cross-attention and text too), or both."""
    skip_blocks: int = knob(0, low=0, high=4)
    """Blocks left alone, at the front and likewise at the back."""
    fuse: str = knob("block", choices=("layers", "ffn", "block"))
    """What is fused around the layers; each includes the one before."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait for the end of the session: in main memory, or on the device (saves nothing)."""
    backend: str = AUTO
    """Kernel of the product by name (`vivace.kernels.scaled_matmul`), or `auto`: the fastest measured on a GPU."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return cls(), cls(kind="fp8", fuse="ffn", keep="device"), cls(fuse="layers", roles="attention")

    # -- what may be said without weights -----------------------------------------------------------------------

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        blocks = blocks_between(model, self.skip_blocks)
        own = (exclusive("linear.weight", blocks),)
        # Modules of a fused block take and give other tensors than the model's own.
        return (*own, exclusive(MODULES, blocks)) if self._fuses_blocks(model) else own

    def check(self, model: ModelDescription) -> list[Problem]:
        import torch

        found = []
        if self.backend not in (names := [AUTO, *(c.name for c in candidates(OP))]):
            found.append(self.problem("setting", f"backend must be one of {', '.join(names)}."))
        if not any(self._takes_block(i, e.depth) for e in model.experts for i in range(e.depth)):
            message = f"skip_blocks={self.skip_blocks} leaves none of {model.depth} blocks; lower it or leave it out."
            found.append(self.problem("pointless", message))
        if self.fuse == "block" and not self._fuses_blocks(model):
            message = f"no block of {model.family or 'this model'} is known to it; what happens is fuse: ffn."
            found.append(self.problem("setting", message, "warning"))
        if self.kind == "fp8" and not torch.cuda.is_available():
            message = "no GPU is visible, and processors do not multiply fp8: it is emulated and slower than exact; "
            found.append(self.problem("slow", f"{message}leave it out here.", "warning"))
        return found

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        mine = [c for c in self.claims(model) if c.resource == MODULES]
        return [
            self.problem(
                "conflict",
                f"{other.card.name} changes what attention and feed-forward modules take or give, and a fused block "
                "hands them other tensors; set fuse: ffn, or leave one of the two out.",
            )
            for other in others
            if any(_meet(a, b) for a in mine for b in other.claims(model) if b.resource == MODULES)
        ]

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        depths = {expert.name: expert.depth for expert in model.experts}
        for part in base.parts:
            if part.name in depths:
                # A code for each weight, and a float32 scale for each output channel.
                sizes = {
                    x.site: x.inputs * x.outputs + 4 * x.outputs
                    for x in part.linears
                    if self._takes_block(x.block, depths[part.name]) and takes_role(self.roles, x.role)
                }
                base = base.with_part(part.resized(sizes))
        return base

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        chooser = Chooser(self.kind, self.backend, target)
        for expert in target.experts:
            work = self._sized(target, chooser, list(self._sites(expert)))
            if self.fuse != "layers" and any(site.name == "base_layer" for site, _ in work):
                raise PlanError([self.problem("lora", LORA)])
            groups = _roundings(self.kind, [site for site, _ in work])
            for site, kernels in work:
                self._convert(target, site, groups[site.site], kernels)
            if self.fuse != "layers":
                self._fuse_feed_forwards(target, expert)
            if self.fuse == "block":
                self._fuse_blocks(target, expert)
        chooser.tell()

    def _sized(
        self, target: Target, chooser: Chooser, sites: list[LinearSite]
    ) -> list[tuple[LinearSite, Kernels]]:
        """Layers for whose size there is a kernel, with that choice. The others stay as they are, and are counted."""
        found, left = [], {}
        for site in sites:
            linear: Any = site.module
            size = Size(linear.in_features, linear.out_features)
            try:
                found.append((site, chooser.kernels(size, linear.weight.device.type, linear.weight.dtype)))
            except ConfigError as why:
                left[site.site] = why
        if left and not found:
            raise next(iter(left.values()))
        if left:
            target.report(NAME, "linears_left", len(left))
        return found

    def _convert(self, target: Target, site: LinearSite, rounding: Rounding, kernels: Kernels) -> None:
        from vivace.models.fused_parts import FusedLinear as Layer

        linear: Any = site.module
        before, new = linear.weight.nbytes, Layer(linear, rounding, kernels)
        if self.keep == "host":
            target.edit.weight(linear, "weight", linear.weight.new_empty(0), keep="host")
        target.edit.swap(site.parent, site.name, new)
        for effect, amount in (("linears", 1), ("bytes_before", before), ("bytes_after", new.nbytes)):
            target.report(NAME, effect, amount)

    def _fuse_feed_forwards(self, target: Target, expert: Expert) -> None:
        from vivace.models.fused_parts import FusedLinear as Layer
        from vivace.models.fused_parts import gelu_feed_forward

        for site in expert.feed_forwards:
            parts = gelu_feed_forward(site.module)
            if parts is None or not isinstance(parts.down, Layer):
                continue
            parts.down.rounding.gelu = True
            target.edit.wrap(parts.activation, lambda old, p=parts: p.project)
            target.report(NAME, "feed_forwards_fused", 1)

    def _fuse_blocks(self, target: Target, expert: Expert) -> None:
        assert target.adapter is not None  # without one there are no linear sites
        for block in expert.blocks:
            if not self._takes_block(block.index, len(expert.blocks)):
                continue
            forward = target.adapter.fused_block(block)
            if isinstance(forward, str):
                # Whatever hangs on the block must go on working; its layers are fused as far as it lets them.
                target.chosen(Choice("fused_block", "ffn", f"e.g. {block.site}: {forward}", lambda: None))
                target.report(NAME, "blocks_left", 1)
            elif forward is not None:
                target.edit.wrap(block.module, lambda old, f=forward: f)
                target.report(NAME, "blocks_fused", 1)

    def _sites(self, expert: Expert) -> Iterator[LinearSite]:
        for site in expert.linears:
            weight: Any = site.module.weight
            new = not hasattr(site.module, "recipe") and weight.is_floating_point() and weight.itemsize > 1
            if (
                new
                and self._takes_block(site.block, len(expert.blocks))
                and takes_role(self.roles, site.role)
            ):
                yield site

    def _takes_block(self, index: int, depth: int) -> bool:
        return self.skip_blocks <= index < depth - self.skip_blocks

    def _fuses_blocks(self, model: ModelDescription) -> bool:
        return self.fuse == "block" and model.adapter is not None and model.adapter.fuses_blocks


def _roundings(kind: str, sites: list[LinearSite]) -> dict[str, Rounding]:
    """How the input of every layer is rounded: q, k, v of one attention share one, for cross-attention k and v."""
    from vivace.models.fused_parts import Rounding

    groups: list[list[LinearSite]] = []
    open_groups: dict[tuple[int, str], list[LinearSite]] = {}
    for site in sites:
        stream, _, part = site.role.rpartition(".")
        if part not in ("q", "k", "v"):
            groups.append([site])
            continue
        key = site.block, f"{stream} queries" if stream == "cross" and part == "q" else stream
        group = open_groups.get(key)
        # A second k of one block is that of another text, e.g. of a picture's tokens.
        if group is None or any(other.role == site.role for other in group):
            groups.append(group := [])
            open_groups[key] = group
        group.append(site)
    return {s.site: rounding for group in groups for rounding in [Rounding(kind, len(group))] for s in group}


def _meet(a: Claim, b: Claim) -> bool:
    """Whether two claims have a site in common."""
    return a.sites >= ALL_SITES or b.sites >= ALL_SITES or bool(a.sites & b.sites)
