"""Text quantization: the text encoders' linear layers with int8 weights, a half or a quarter of their memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vivace.core.footprint import TEXT, Footprint
from vivace.core.shapes import Workload
from vivace.kernels.api import candidates, select
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob

NAME, OP = "text_quantization", "int8_linear"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, kw_only=True)
class TextQuantization(Technique):
    """Weights of the text encoders as int8 codes with a scale for every output channel; activations as they are.

    A text encoder is often larger than the video model and runs once a clip, so what counts is its memory. Embeddings
    and norms stay.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Text encoders with int8 weights: half of the bf16 memory of what is often the largest component.",
        objective="memory of the text encoder",
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight", frozenset(ENCODERS)),),
        fidelity=0.3,
        cite=Cite(
            title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
            arxiv="2208.07339",
            code="https://github.com/bitsandbytes-foundation/bitsandbytes",
            differs="weights only, one scale for each output channel; no outlier columns in 16 bits, because "
            "activations are not rounded",
        ),
    )

    mode: str = knob("weight_only", choices=("weight_only", "dynamic"))
    """Whether activations are rounded too (`dynamic`), which is faster on a CPU and loses more."""
    keep: str = knob("host", choices=("host", "device"))
    """Where the original weights wait for the end of the session: in main memory, or on the device (saves nothing)."""
    backend: str = "auto"
    """Kernel by name (`vivace.kernels.int8_linear`), or `auto`."""

    def missing(self, model: ModelDescription) -> str:
        return (
            ""
            if any(name in model.components for name in ENCODERS)
            else "needs a text encoder, and there is none."
        )

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if self.backend not in (names := ["auto", *(c.name for c in candidates(OP))]):
            found.append(self.problem("setting", f"backend must be one of {', '.join(names)}."))
        if self.backend == "int_mm" and self.mode != "dynamic":
            why = "backend int_mm multiplies integers; set mode: dynamic, or backend: torchao."
            found.append(self.problem("setting", why))
        return found

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        for part in base.parts:
            if part.stage == TEXT:
                sizes = {x.site: x.inputs * x.outputs + 4 * x.outputs for x in part.linears}
                base = base.with_part(part.resized(sizes))
        return base

    def apply(self, target: Target) -> None:
        found = [found for name in ENCODERS for found in _linears(getattr(target.pipeline, name, None))]
        if not found:
            return  # nothing is edited, which the session reports as an error
        sizes = [size for _, _, m in found for size in (m.in_features, m.out_features)]
        device = found[0][2].weight.device.type
        choice = select(OP, self.backend, device=device, mode=self.mode, features=math.gcd(*sizes))
        target.chosen(choice)
        before = after = 0
        for parent, name, linear in found:
            new = choice.run(linear, self.mode)
            before += linear.weight.nbytes
            after += _nbytes(new.weight) + sum(_nbytes(b) for b in new.buffers())
            if self.keep == "host":
                target.edit.weight(linear, "weight", linear.weight.new_empty(0), keep="host")
            target.edit.swap(parent, name, new)
        for effect, amount in (("linears", len(found)), ("bytes_before", before), ("bytes_after", after)):
            target.report(NAME, effect, amount)


def _linears(encoder: Any) -> Iterator[tuple[Any, str, Any]]:
    """(parent, name, linear) of a text encoder's plain linear layers, each once, and none that is shared or tied."""
    from torch import nn

    if encoder is None:
        return
    embeddings = {id(m.weight) for m in encoder.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    for parent in list(encoder.modules()):
        for name, module in list(parent._modules.items()):
            plain = type(module) is nn.Linear and module.weight.is_floating_point()
            if plain and id(module) not in seen and id(module.weight) not in embeddings:
                seen.add(id(module))
                yield parent, name, module


def _nbytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the tensors a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_nbytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
