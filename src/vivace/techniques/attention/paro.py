"""PAROAttention: each head's tokens stand in the order of axes that suits it, and a static mask of blocks is kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from vivace.calibration.artifact import key_of
from vivace.core.errors import ConfigError
from vivace.core.shapes import TokenGrid
from vivace.kernels.block_sparse_attention.spec import BlockMap
from vivace.models.adapter import AttentionSite, Expert, ModelDescription, RootCall
from vivace.techniques.attention.axis_orders import COMMAND, OrderFile, packed
from vivace.techniques.attention.head_patterns import AXES, in_axis_order, seen_by_text
from vivace.techniques.attention.headwise import HeadwiseSparse
from vivace.techniques.attention.mask_file import unfit
from vivace.techniques.attention.searched import refuse_other_weights, stamp
from vivace.techniques.base import Card, Cite, Need, Paradigm, Problem, Stage, Target, exclusive

if TYPE_CHECKING:
    from vivace.kernels.block_sparse_attention.spec import Kernel


@dataclass(frozen=True, kw_only=True)
class Paro(HeadwiseSparse):
    """A head's own order of (frame, height, width), and a static mask of blocks (PAROAttention, arXiv 2506.16054).

    Some heads look along time, some along rows or columns; in the order that suits a head what it looks at lies
    together, so few blocks hold most of its probability. Orders and masks are measured once, for one shape:

        search_orders(pipeline, prompts, mass=0.9).save("orders.json")        (vivace.plans.mask_searching)

    A clip of another shape runs dense, and the receipt counts it as `dense_evaluations`. Text stays dense both ways.
    """

    abstract: ClassVar[bool] = False
    card: ClassVar[Card] = Card(
        name="paro",
        paradigm=Paradigm.ATTENTION,
        summary="Each head's tokens are re-ordered along its own axes, and a static mask of blocks is kept.",
        objective="attention time per step",
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        calibration="required",
        cite=Cite(
            title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual "
            "Generation Models",
            arxiv="2506.16054",
            code="https://github.com/thu-nics/PAROAttention",
            differs="sparse only: products are not quantised; the order is the one that needs the fewest blocks for "
            "the kept probability, without a term for quantisation; one mask serves all steps; block probabilities "
            "come from sampled queries; tokens are re-ordered next to the kernel, by copies",
        ),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.4,
    )

    file: str = ""
    """A file of axis orders and masks."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        found = example_orders(workdir, pipeline)
        return (cls(file=found), cls(file=found, dense_steps=2))

    def maps(self, grid: TokenGrid) -> tuple[BlockMap, ...]:
        return _maps(*stamp(self.file), grid)

    def assigned(self, expert: str, layer: int, heads: int) -> tuple[int, ...]:
        start = 0
        for name, layers in _loaded(*stamp(self.file)).orders.items():
            for i, each in enumerate(layers):
                if (name, i) == (expert, layer):
                    return tuple(range(start, start + heads))
                start += len(each)
        raise ConfigError(f"{self.file} holds nothing for layer {layer} of {expert}.")

    def check(self, model: ModelDescription) -> list[Problem]:
        if wrong := self._complaint(model):
            return [self.problem("calibration", wrong)]
        found, made_for = super().check(model), _loaded(*stamp(self.file)).grid
        grid = model.grid(model.workload())
        if grid is not None and (grid.frames, grid.height, grid.width) != made_for:
            told = "x".join(map(str, made_for))
            found = [p for p in found if p.kind != "no gain"]
            found.append(
                self.problem(
                    "calibration",
                    f"its file was made for {told} tokens; a {grid} clip runs dense. Make one for it.",
                    severity="warning",
                )
            )
        return found

    def _complaint(self, model: ModelDescription) -> str:
        if not self.file:
            return f"has no file of axis orders; make one with {COMMAND} and give its path as `file`."
        try:
            found = _loaded(*stamp(self.file))
            for expert, layers in found.orders.items():
                for i in range(len(layers)):
                    found.mask(expert, i)
        except ConfigError as error:
            return str(error)
        if found.block != self.block:
            return f"its file holds blocks of {found.block} tokens; set block={found.block} or make another file."
        return unfit(found.key, found.shape(), self.file, model)

    def _kernels(
        self,
        target: Target,
        expert: Expert,
        sites: Sequence[AttentionSite],
        call: RootCall,
        built: dict[tuple[TokenGrid, Any, str], Sequence[Kernel | None]],
    ) -> Sequence[Kernel | None]:
        kernels = super()._kernels(target, expert, sites, call, built)
        if all(kernel is None for kernel in kernels):
            target.report(self.card.name, "dense_evaluations", 1)
        return kernels

    def apply(self, target: Target) -> None:
        refuse_other_weights(self, _loaded(*stamp(self.file)).key.model_hash, target)
        super().apply(target)


def example_orders(folder: Path, pipeline: Any) -> str:
    """A file for nine small frames with made-up orders and masks, other ones for every head: for contract checks."""
    from vivace.models.describe import describe_pipeline

    model = describe_pipeline(pipeline)
    workload = model.workload(frames=9, height=32, width=32)
    grid = model.grid(workload)
    if grid is None:
        raise ConfigError(f"{model.name} has no token grid.")
    n = len(in_axis_order(grid, AXES[0], 128))
    apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    masks = np.stack([apart <= n * (1 + h % 2) // 8 for h in range(max(e.heads for e in model.experts))])
    made = OrderFile(
        key=replace(key_of(model, pipeline, workload), model_hash=""),
        grid=(grid.frames, grid.height, grid.width),
        block=128,
        orders={
            e.name: [[(layer + 2 * h) % len(AXES) for h in range(e.heads)] for layer in range(e.depth)]
            for e in model.experts
        },
        masks={e.name: [packed(masks[: e.heads])] * e.depth for e in model.experts},
        mass=0.0,
        prompts=0,
        prompts_sha256="",
        seed=0,
        vivace="",
    )
    return str(made.save(folder / "orders.json"))


@functools.lru_cache(maxsize=8)
def _loaded(path: str, changed: int, size: int) -> OrderFile:
    return OrderFile.load(path)


@functools.lru_cache(maxsize=4)
def _maps(path: str, changed: int, size: int, grid: TokenGrid) -> tuple[BlockMap, ...]:
    """The map of every head of the file, in its order of experts and layers; none on another grid than the file's."""
    file = _loaded(path, changed, size)
    if (grid.frames, grid.height, grid.width) != file.grid:
        return ()
    slots = [in_axis_order(grid, axes, file.block) for axes in AXES]
    return tuple(
        seen_by_text(grid, slots[order], keep)
        for expert, layers in file.orders.items()
        for i, layer in enumerate(layers)
        for order, keep in zip(layer, file.mask(expert, i), strict=True)
    )
