"""Int8 linear layers: 8-bit weights, and 8-bit activations with a scale per token."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import Choice, candidates, device_name, select, timed
from vivace.models.adapter import Expert, LinearSite, ModelDescription, Need
from vivace.techniques.base import (
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
from vivace.techniques.compression.linears import blocks_between, takes_role

NAME = OP = "int8_linear"
TOKENS, REPEATS = 512, 5
GAIN = 1.05
"""Times as fast as before that a layer must be to be worth its rounding, under `when: faster`."""
_gains: dict[tuple[Any, ...], float] = {}


@dataclass(frozen=True, kw_only=True)
class Int8Linear(Technique):
    """Replace the weights of the blocks' linears by int8 codes with a scale per output channel.

    `dynamic` also rounds the activations, each token with its own scale (W8A8 as in LLM.int8(), arXiv 2208.07339,
    and ZeroQuant, arXiv 2206.01861). Layers of the modulation and the time embedding stay as they are: they see one
    vector per step.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Linear layers with int8 weights: a quarter of the fp32 memory. Through torchao it saves time only "
        "when compiled; the integer product on a CPU saves time at once.",
        objective="memory; time per step on the integer product or when compiled",
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"),),
        cite=Cite(
            title="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
            arxiv="2206.01861",
            code="https://github.com/pytorch/ao",
            differs="weights have one scale per output channel instead of one per group; no distillation of the layers",
        ),
        needs=(Need.LINEAR_SITES,),
        fidelity=0.1,
    )

    mode: str = knob("dynamic", choices=("dynamic", "weight_only"))
    """Whether activations are rounded too. `weight_only` saves memory, hardly ever time."""
    roles: str = knob("all", choices=("all", "ffn", "attention"))
    """Which linears of a block: feed-forward, attention projections (cross-attention and text too), or both."""
    when: str = knob("always", choices=("always", "faster"))
    """`faster`: only layers whose product of integers is faster than the one it replaces, timed as the plan is applied.
    Processors without 8-bit dot products keep their layers, so that a plan is never slower for it."""
    skip_blocks: int = knob(0, low=0, high=4)
    """Blocks left alone, at the front and likewise at the back: they are the most sensitive."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait for the end of the session: in main memory, or on the device (saves nothing)."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.int8_linear`), or `auto`."""

    @property
    def may_decline(self) -> bool:
        return self.when == "faster"

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        return (exclusive("linear.weight", blocks_between(model, self.skip_blocks)),)

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if self.backend not in (names := ["auto", *(c.name for c in candidates(OP))]):
            found.append(self.problem("setting", f"backend must be one of {', '.join(names)}."))
        if self.backend == "int_mm" and self.mode != "dynamic":
            found.append(
                self.problem(
                    "setting", "backend int_mm multiplies integers; set mode: dynamic, or backend: torchao."
                )
            )
        if not any(self._takes_block(i, e.depth) for e in model.experts for i in range(e.depth)):
            found.append(
                self.problem(
                    "pointless",
                    f"skip_blocks={self.skip_blocks} leaves none of {model.depth} blocks; lower it or leave it out.",
                )
            )
        return found

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        if self.when == "faster":
            return base  # that it saves anything is not known before
        depths = {expert.name: expert.depth for expert in model.experts}
        for part in base.parts:
            if part.name in depths:
                # A code for each weight, and a float32 scale for each output channel.
                sizes = {
                    x.site: x.inputs * x.outputs + 4 * x.outputs
                    for x in part.linears
                    if self._takes_block(x.block, depths[part.name]) and self._takes_role(x.role)
                }
                base = base.with_part(part.resized(sizes))
        return base

    def apply(self, target: Target) -> None:
        sites = [site for expert in target.experts for site in self._sites(expert)]
        if not sites:
            return
        linears: list[Any] = [site.module for site in sites]
        sizes = [size for linear in linears for size in (linear.in_features, linear.out_features)]
        device = linears[0].weight.device.type
        choice = select(OP, self.backend, device=device, mode=self.mode, features=math.gcd(*sizes))
        if self.when == "faster":
            slow = self._slower(linears, choice)
            target.report(NAME, "linears_left_exact", sum(_size(linear) in slow for linear in linears))
            pairs = [(s, x) for s, x in zip(sites, linears, strict=True) if _size(x) not in slow]
            if not pairs:
                return
            sites, linears = [s for s, _ in pairs], [x for _, x in pairs]
        target.chosen(choice)
        before = after = 0
        for site, linear in zip(sites, linears, strict=True):
            before += linear.weight.nbytes
            after += self._convert(target, site, choice.run(linear, self.mode))
        for effect, amount in (("linears", len(sites)), ("bytes_before", before), ("bytes_after", after)):
            target.report(NAME, effect, amount)

    def _slower(self, linears: list[Any], choice: Choice) -> set[tuple[int, int]]:
        """Sizes of layers that 8 bits make no faster on their device; found out once for each."""
        import torch

        slow = set()
        for size, linear in {_size(x): x for x in linears}.items():
            weight = linear.weight
            key = (device_name({"device": weight.device}), weight.dtype, size, self.mode, choice.name)
            if key not in _gains:
                new = choice.run(linear, self.mode)
                x = torch.randn(TOKENS, linear.in_features, device=weight.device, dtype=weight.dtype)
                with torch.no_grad():
                    runs = {"exact": lambda x=x, f=linear: f(x), "int8": lambda x=x, f=new: f(x)}
                    for run in runs.values():
                        run()
                    times = timed(runs, str(weight.device), REPEATS)
                _gains[key] = statistics.median(times["exact"]) / statistics.median(times["int8"])
            if _gains[key] < GAIN:
                slow.add(size)
        return slow

    def _convert(self, target: Target, site: LinearSite, new: Any) -> int:
        """Put the quantised layer in force; returns the bytes of its weight and scales."""
        import torch

        linear: Any = site.module
        if type(new) is torch.nn.Linear:
            # The tensor itself knows how to multiply: the layer, and what others hung on it, can stay.
            target.edit.weight(linear, "weight", new.weight, keep=self.keep)
        else:
            if self.keep == "host":
                target.edit.weight(linear, "weight", linear.weight.new_empty(0), keep="host")
            target.edit.swap(site.parent, site.name, new)
        return _nbytes(new.weight) + sum(_nbytes(b) for b in new.buffers())

    def _sites(self, expert: Expert) -> Iterator[LinearSite]:
        for site in expert.linears:
            if self._takes_block(site.block, len(expert.blocks)) and self._takes_role(site.role):
                yield site

    def _takes_block(self, index: int, depth: int) -> bool:
        return self.skip_blocks <= index < depth - self.skip_blocks

    def _takes_role(self, role: str) -> bool:
        return takes_role(self.roles, role)


def _size(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features


def _nbytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
