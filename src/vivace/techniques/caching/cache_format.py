"""One storage format for whatever the caches of a plan remember: 8, 4 or 2 bits with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.context import Clock
from vivace.core.footprint import STREAM, Footprint, Packing
from vivace.core.shapes import Workload
from vivace.kernels.api import select
from vivace.kernels.cache_codec.spec import FORMS, OP, bytes_of
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import (
    Card,
    Cite,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    registry,
)
from vivace.techniques.caching.memory import AXES, Form

NAME = "cache_format"
GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class CacheFormat(Technique):
    """Tensors that caches keep from step to step lie in memory as codes, and are read back when they are used.

    int8 and fp8 (e4m3) have a scale for each group, int4 and int2 a scale and a minimum (`vivace.kernels.cache_codec`
    has the numerics and the bounds). Groups lie along the channels of a token or along the tokens of a channel, which
    is what KIVI does with values and with keys; positions of a network's output share scales either way. It holds for
    histories of the block stack, of modules (attention outputs, feed-forwards) and of whole outputs. What a signal only
    compares with stays as it is. The receipt says what is held at the end and what it would be in full.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Keeps what caches remember in 8, 4 or 2 bits with a scale for each group of 32 to 128.",
        objective="memory of caches",
        stage=Stage.CACHE,
        claims=(exclusive("kv.memory"),),
        fidelity=0.1,
        cite=Cite(
            title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache; Quant VideoGen",
            arxiv="2402.02750, 2602.02958",
            code="https://github.com/jy-yuan/KIVI",
            differs="remembered features of diffusion steps instead of keys and values of earlier tokens; the newest "
            "steps stay in full, not the newest tokens; no clusters of tokens are subtracted first",
        ),
    )

    format: str = knob("int8", choices=FORMS)
    """Numbers of a remembered tensor."""
    group: int = knob(64, choices=GROUPS)
    """Numbers that share a scale; 0 for all of a token (or of a channel)."""
    axis: str = knob("token", choices=AXES)
    """Whether channels of a token share scales, or tokens of a channel."""
    residual: int = knob(0, low=0, high=3)
    """Newest values of every history that stay as they are: of a forecast, those that weigh most."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(), cls(format="int4", group=32, axis="channel", residual=1))

    @classmethod
    def companions(cls, others: tuple[Technique, ...] = ()) -> tuple[Technique, ...]:
        cache: Any = registry["taylorseer"]
        return () if any(map(keeps, others)) else (cache(interval=2, warmup=2),)

    # -- before anything is loaded --------------------------------------------------------------------------------

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        caches = {o.card.name: o for o in others if keeps(o)}
        if not caches:
            message = (
                "no technique of the plan keeps tensors from step to step, so there is nothing to store; add a cache, "
                "such as taylorseer or pyramid_attention_broadcast, or leave cache_format out."
            )
            return [self.problem("pointless", message)]
        found = [
            self.problem(
                "setting",
                f"{name} has a storage of its own, {getattr(cache, 'storage', '')}; set its storage: same, or leave "
                "cache_format out.",
            )
            for name, cache in caches.items()
            if getattr(cache, "storage", "same") != "same"
        ]
        depth = max(map(depth_of, caches.values()))
        if self.residual >= depth:
            message = (
                f"residual={self.residual} leaves all of the {depth} values that are remembered as they are; "
                "lower it, or leave cache_format out."
            )
            found.append(self.problem("pointless", message, "warning"))
        return found

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """What the plan's caches keep, whenever they tell it, is counted in this format."""
        size = base.size
        scale = 4 if size == 4 else 2

        def packed(what: str) -> int:
            """Tokens by channels of a stream; channels by positions of an output."""
            if what == STREAM:
                shape = (base.stream // size // base.channels, base.channels)
            else:
                shape = (base.output // size // base.positions, base.positions)
            along = -2 if what == STREAM and self.axis == "channel" else -1
            return bytes_of(shape, self.format, self.group, along, scale)

        return base.packed(Packing(packed, self.residual))

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        device = target.experts[0].module.device.type if target.experts else "cpu"
        target.chosen(select(OP, device=device, form=self.format))

        def report(effect: str, amount: float) -> None:
            target.report(NAME, effect, amount)

        form = Form(self.format, self.group, self.axis, self.residual, report)
        target.edit.set(target.store, "form", form)


def keeps(technique: Technique) -> bool:
    """Whether a technique is a cache that remembers tensors: all of these have the setting `storage`."""
    return hasattr(technique, "storage")


def depth_of(cache: Any) -> int:
    """Most values that a history of a cache holds."""
    if hasattr(cache, "delta_order"):
        return max(cache.order, cache.delta_order) + 1
    try:
        return cache.predictor().depth
    except TypeError:
        return cache.predictor(Clock()).depth
