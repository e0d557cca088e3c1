"""Layerwise casting: the blocks' linears are stored in 8-bit floats and cast up when they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import Expert, LinearSite, ModelDescription, Need
from vivace.techniques.base import Card, Cite, Paradigm, Stage, Target, Technique, exclusive, knob

NAME = "layerwise_casting"
FORMATS = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class LayerwiseCasting(Technique):
    """Weights lie in memory as fp8 without a scale; a layer casts its own to the type of its input, and drops the copy.

    The rounding is that of diffusers' `enable_layerwise_casting`: the value nearest in fp8. Norms, embeddings and the
    layers of the modulation keep their type, as they do there. A copy of one layer's weight in the full type lives for
    the length of one product.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Stores the blocks' linear weights as fp8 and computes in the model's own type: half of bf16's memory.",
        objective="memory of the device",
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"),),
        needs=(Need.LINEAR_SITES,),
        fidelity=0.3,
        cite=Cite(
            title="Layerwise casting (diffusers' enable_layerwise_casting)",
            code="https://github.com/huggingface/diffusers",
            differs="a layer casts a copy where diffusers casts the parameter up and down, so that blocks compile and "
            "the original weights come back bit for bit; layers outside the blocks stay as they are",
        ),
    )

    format: str = knob("fp8_e4m3", choices=tuple(FORMATS))
    """How weights are stored: e4m3 has the finer steps, e5m2 the wider range."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait for the end of the session: in main memory, or on the device (saves nothing)."""

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        for part in base.parts:
            if part.name in {e.name for e in model.experts}:
                taken = [x for x in part.linears if _takes(x.role, x.site)]
                base = base.with_part(part.resized({x.site: x.inputs * x.outputs for x in taken}))
        return base

    def apply(self, target: Target) -> None:
        before = after = count = 0
        for site in (s for e in target.experts for s in self._sites(e)):
            linear: Any = site.module
            new = cast_linear(linear, FORMATS[self.format])
            before, after, count = before + linear.weight.nbytes, after + new.weight.nbytes, count + 1
            if self.keep == "host":
                target.edit.weight(linear, "weight", linear.weight.new_empty(0), keep="host")
            target.edit.swap(site.parent, site.name, new)
        if count:
            for effect, amount in (("linears", count), ("bytes_before", before), ("bytes_after", after)):
                target.report(NAME, effect, amount)

    @staticmethod
    def _sites(expert: Expert) -> Iterator[LinearSite]:
        import torch

        for site in expert.linears:
            module: Any = site.module
            if _takes(site.role, site.site) and module.weight.dtype in (
                torch.float32,
                torch.bfloat16,
                torch.float16,
            ):
                yield site


def _takes(role: str, site: str) -> bool:
    return role != "other" or not any("norm" in part for part in site.split("."))


def cast_linear(linear: Any, stored: str) -> Any:
    """A linear layer with the same sizes and the same bias object, whose weight is stored as torch's type `stored`."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class CastLinear(nn.Linear):
        """Stores less than it computes with."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input, self.weight.to(input.dtype), self.bias)

    new = CastLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    kind = getattr(torch, stored)
    largest = torch.finfo(kind).max
    # Beyond the largest value, e4m3 knows only NaN.
    new.weight = nn.Parameter(linear.weight.detach().clamp(-largest, largest).to(kind), requires_grad=False)
    new.bias = linear.bias
    return new.train(linear.training)
