"""The memory of one generation as plain numbers: weights by component, activations by stage, and where weights wait.

Pure arithmetic on what `vivace.plans.memory` found out; techniques change a copy of it (`Technique.memory`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

TEXT, DENOISE, DECODE = "text", "denoise", "decode"
STAGES = (TEXT, DENOISE, DECODE)
Placement = Literal["device", "model_offload", "group_offload"]
STREAM, OUTPUT = "stream", "output"
_WIDTHS = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class LinearSize:
    """A linear layer: where it is, and the bytes of its weight."""

    site: str
    block: int
    role: str
    inputs: int
    outputs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a pipeline. All sizes are bytes.

    `blocks` are the weights of its blocks in running order, `rest` what lies outside of them; `working` is the peak of
    the tensors that one call makes, `linears` are the layers that quantisation may change.
    """

    name: str
    stage: str
    rest: int
    blocks: tuple[int, ...] = ()
    working: int = 0
    linears: tuple[LinearSize, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all weights and buffers."""
        return self.rest + sum(self.blocks)

    def resized(self, bytes_of: Mapping[str, int]) -> Part:
        """With other sizes of some linears' weights, by site."""
        blocks, rest = list(self.blocks), self.rest
        linears = []
        for linear in self.linears:
            new = bytes_of.get(linear.site, linear.bytes)
            change = new - linear.bytes
            if 0 <= linear.block < len(blocks):
                blocks[linear.block] += change
            else:
                rest += change
            linears.append(replace(linear, bytes=new))
        return replace(self, rest=rest, blocks=tuple(blocks), linears=tuple(linears))

    def scaled(self, factor: float) -> Part:
        """With all weights this much larger or smaller."""
        blocks = tuple(math.ceil(b * factor) for b in self.blocks)
        linears = tuple(replace(x, bytes=math.ceil(x.bytes * factor)) for x in self.linears)
        return replace(self, rest=math.ceil(self.rest * factor), blocks=blocks, linears=linears)


@dataclass(frozen=True, slots=True)
class Remembered:
    """Histories of a cache: how many, how long, what they hold, and how it is stored.

    `what` is `stream` (what lies between two blocks, or a module's output of its size) or `output` (of the network).
    """

    histories: int
    depth: int
    what: str
    storage: str


@dataclass(frozen=True, slots=True)
class Packing:
    """How remembered tensors are packed: `bytes_of(what)` of one, but for the `residual` newest of every history."""

    bytes_of: Callable[[str], int]
    residual: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a generation needs on the device that computes, in bytes, and how it comes about."""

    parts: tuple[Part, ...]
    held: Mapping[str, int] = field(default_factory=dict)
    """By stage, tensors of the pipeline that live beside the call under way: latents, embeddings, the solver's past."""
    kept: int = 0
    """What techniques remember from step to step; of caches, as they store it."""
    remembered: tuple[Remembered, ...] = ()
    """What of it lies in histories of caches, which another format may hold for."""
    packing: Packing | None = None
    stream: int = 0
    """One guidance branch of one sample between two blocks: the video stream, and the text stream if there is one."""
    output: int = 0
    """What the transformer gives for one guidance branch of one sample."""
    channels: int = 0
    """Of the stream: what one token has."""
    positions: int = 0
    """Of the output: what one channel has."""
    size: int = 2
    """Bytes of one element of the streams."""
    rows: int = 1
    """Guidance branches times samples: what a cache remembers apart."""
    decodes: Mapping[str, int] = field(default_factory=dict)
    """By way of decoding (`chunked`, `whole`), the peak of the tensors it makes."""
    decode: str = "chunked"
    placement: Placement = "device"
    window: int = 0
    """Blocks on the device at a time under `group_offload`; 0 for single layers."""

    def part(self, name: str) -> Part:
        """The component of that name; raises `KeyError` where there is none."""
        try:
            return next(p for p in self.parts if p.name == name)
        except StopIteration:
            raise KeyError(name) from None

    def remembering(self, histories: int, depth: int, what: str = STREAM, storage: str = "same") -> Footprint:
        """With so many more histories of `depth` values each kept from step to step, for all rows together."""
        new = Remembered(histories, depth, what, storage)
        more = self._bytes_of(new, self.packing)
        return replace(self, kept=self.kept + more, remembered=(*self.remembered, new))

    def packed(self, packing: Packing) -> Footprint:
        """With another format for everything that caches remember, told before or after."""
        change = sum(self._bytes_of(r, packing) - self._bytes_of(r, self.packing) for r in self.remembered)
        return replace(self, kept=self.kept + change, packing=packing)

    def _bytes_of(self, histories: Remembered, packing: Packing | None) -> int:
        each = self.stream if histories.what == STREAM else self.output
        if packing is None:
            width = _WIDTHS.get(histories.storage, self.size)
            return histories.histories * histories.depth * each * width // self.size
        full = min(packing.residual, histories.depth)
        small = histories.depth - full
        return histories.histories * (full * each + small * packing.bytes_of(histories.what))

    def with_part(self, part: Part) -> Footprint:
        """With another component in the place of the one of its name."""
        return replace(self, parts=tuple(part if p.name == part.name else p for p in self.parts))

    def resident(self, stage: str) -> int:
        """Bytes of weights on the device in a stage."""
        mine = [p for p in self.parts if p.stage == stage]
        if self.placement == "device":
            return sum(p.weights for p in self.parts)
        if self.placement == "model_offload":
            # One component at a time: of two experts, the larger one.
            return max((p.weights for p in mine), default=0)
        return max((self._grouped(p) for p in mine), default=0)

    def _grouped(self, part: Part) -> int:
        if not part.blocks:
            # A component without a list of blocks is one group.
            return part.weights
        if self.window:
            most = max(sum(part.blocks[i : i + self.window]) for i in range(len(part.blocks)))
            return part.rest + most
        return max(part.rest, *(x.bytes for x in part.linears), 0)

    def working(self, stage: str) -> int:
        """Bytes of the tensors that the stage's calls make at most."""
        if stage == DECODE and self.decodes:
            return self.decodes.get(self.decode, max(self.decodes.values()))
        return max((p.working for p in self.parts if p.stage == stage), default=0)

    def peak(self, stage: str) -> int:
        """Bytes on the device at the worst moment of a stage."""
        beside = self.held.get(stage, 0) + (self.kept if stage == DENOISE else 0)
        return self.resident(stage) + self.working(stage) + beside

    @property
    def peaks(self) -> dict[str, int]:
        """`peak` of every stage."""
        return {stage: self.peak(stage) for stage in STAGES}

    @property
    def weights(self) -> int:
        """Bytes of all weights, wherever they wait."""
        return sum(p.weights for p in self.parts)

    @property
    def total(self) -> int:
        """The worst moment of the whole run."""
        return max(self.peaks.values())
