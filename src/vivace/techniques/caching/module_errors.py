"""Measures how fast the outputs of modules grow old: the error curves that SmoothCache needs.

with vivace.accelerate(pipeline, Plan([ModuleErrors()])) as session:
    settings = SmoothCache(alpha=0.1, **curves(session(prompt).receipt))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import Clock
from vivace.models.adapter import RootCall
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, knob, reads
from vivace.techniques.caching.memory import Memory
from vivace.techniques.caching.modules import ModuleCache, Seat, Turn
from vivace.techniques.caching.predictors import Predictor
from vivace.techniques.caching.signals import relative_change

if TYPE_CHECKING:
    import torch

    from vivace.core.receipt import Receipt

NAME = "module_errors"


@dataclass(frozen=True, slots=True)
class Last(Predictor):
    """Remembers the last `count` values; never predicts more than reuse."""

    count: int = 1

    @property
    def depth(self) -> int:
        return self.count


@dataclass(frozen=True, kw_only=True)
class ModuleErrors(ModuleCache):
    """Computes everything and notes mean|old - new| / mean|old| of outputs that are 1, 2, ... `oldest` steps apart.

    It needs memory for `oldest` outputs of every module.
    """

    abstract: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Measures the error of reusing module outputs; changes nothing.",
        objective="calibration",
        stage=Stage.CACHE,
        claims=(reads("block.output"), reads("module.output")),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES),
        cite=Cite(title="SmoothCache", arxiv="2411.10510"),
    )

    oldest: int = knob(5, low=1, high=16)
    """Largest age in steps."""

    def predictor(self, clock: Clock) -> Predictor:
        return Last(count=self.oldest)

    def apply(self, target: Target) -> None:
        super().apply(target)
        for expert in target.experts:
            target.around_expert(expert, self._around(target))

    def computed(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        streams = seat.kept if isinstance(seat.kept, tuple) else (seat.kept,)
        sums = target.store.shared(NAME, "sums", dict)
        for i, name in enumerate(turn.who):
            for entry in memory.row(name).history.entries:
                age = target.clock.step - round(entry.at)
                old = entry.values[0]
                if old is not None and 1 <= age <= self.oldest:
                    sums.setdefault((seat.kind, age), []).append(relative_change(streams[0][i], old.get()))

    def _around(self, target: Target) -> Callable[..., torch.Tensor]:
        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            sample = run(call)
            sums: dict[Any, Any] = target.store.shared(NAME, "sums", dict)
            for (kind, age), errors in sums.items():
                # Once for every evaluation, so that the list stays short.
                target.report(NAME, f"{kind}.{age}.sum", float(sum(errors)))
                target.report(NAME, f"{kind}.{age}.count", len(errors))
            sums.clear()
            return sample

        return handler


def curves(receipt: Receipt) -> dict[str, tuple[float, ...]]:
    """What was measured, as settings of SmoothCache; empty when nothing was."""
    effects = next((t.effects for t in receipt.techniques if t.name == NAME), {})
    out: dict[str, list[float]] = {}
    for name in sorted(
        effects, key=lambda n: (n.split(".")[0], int(n.split(".")[1])) if "." in n else ("", 0)
    ):
        if name.endswith(".sum"):
            kind = name.split(".")[0]
            error = effects[name] / effects[name.removesuffix("sum") + "count"]
            out.setdefault(f"{kind}_errors", []).append(error)
    return {name: tuple(values) for name, values in out.items()}
