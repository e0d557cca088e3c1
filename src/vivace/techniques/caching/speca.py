"""SpeCa: draft steps by a Taylor forecast, verify each draft on the last block, compute when a draft was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.context import Clock
from vivace.models.adapter import BlockCall
from vivace.techniques.base import Card, Cite, Need, Paradigm, Stage, Target, exclusive, knob, reads
from vivace.techniques.caching.engine import Cache, CacheTechnique
from vivace.techniques.caching.memory import Ballot, History, Memory
from vivace.techniques.caching.policies import Policy
from vivace.techniques.caching.predictors import Taylor
from vivace.techniques.caching.signals import Moment, Signal

if TYPE_CHECKING:
    import torch

    from vivace.techniques.caching.engine import Pass

    Streams = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class SpeCa(CacheTechnique):
    """Forecast the input of the last block, run that block, and go on drafting while its output is as forecast.

    At a drafted step e = ||forecast - output|| / ||output|| compares the last block's output on the drafted input with
    the Taylor forecast of its output. Drafts follow one another while e <= threshold * decay^(share of steps done),
    at most `max_consecutive`; then a step is computed in full. A drafted step costs one block.
    """

    card: ClassVar[Card] = Card(
        name="speca",
        paradigm=Paradigm.CACHING,
        summary="Drafts steps by a Taylor forecast, verifies each on the last block, and computes after a wrong draft.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        fidelity=0.5,
        cite=Cite(
            title="SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching",
            arxiv="2509.11628",
            code="https://github.com/Shenyi-Z/Cache4Diffusion",
            differs="a draft that fails is kept and the next step is computed in full, so that no step ever costs "
            "more than the model's own; the paper rejects the draft. The forecast is of the last block's input and "
            "output only, not of every module; the conditional branch decides for both, each sample by itself; "
            "threshold and decay are ours, the paper tunes them by model",
        ),
    )

    threshold: float = knob(0.1, low=0.0, high=1.0, identity=0.0)
    """Relative L2 error of the last block's forecast up to which drafting goes on."""
    decay: float = knob(0.5, low=0.05, high=1.0)
    """What the threshold has fallen to at the end of the trajectory, as a factor."""
    order: int = knob(1, low=0, high=3)
    """Order of the Taylor series."""
    warmup: int = knob(3, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(0, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(8, low=0, high=50, identity=0)
    """Most drafted steps in a row."""

    feature: ClassVar[str] = "output"

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(threshold=1.0, warmup=2, tail=1), cls())

    @property
    def back(self) -> int:
        return 1

    def predictor(self) -> Taylor:
        return Taylor(self.order)

    def signal(self) -> Verified:
        return Verified()

    def policy(self, target: Target) -> Drafting:
        return Drafting(self.threshold, self.decay)

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            if len(expert.blocks) > 1:
                cache = DraftCache(self, target, expert)
                self._around_stack(target, expert, cache)
                target.around_block(expert.blocks[-1], cache.verify)


@dataclass(frozen=True, slots=True)
class Drafting(Policy):
    """Draft after a computed step, and after a draft whose error is within the bound, which falls along the way."""

    online: ClassVar[bool] = True
    bound: float
    decay: float

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        if self.bound == 0.0:
            return False
        return ballot.skips == 0 or value <= self.bound * self.decay**clock.progress


@dataclass(frozen=True, slots=True)
class Verified(Signal):
    """Error of the last draft of a sample; infinite before there was one."""

    def measure(self, memory: Memory, moment: Moment, row: int) -> torch.Tensor:
        import torch

        error = memory.row(moment.who[row]).marks.get("error")
        return torch.full((), float("inf"), device=moment.hidden.device) if error is None else error

    def after(self, memory: Memory, moment: Moment, row: int, out: Any, computed: bool) -> None:
        """The last block lies behind the span and notes the error itself."""


class DraftCache(Cache):
    """The engine on all blocks but the last, which verifies."""

    def _finish(self, now: Pass, hidden: torch.Tensor, text: torch.Tensor | None) -> Streams:
        out = super()._finish(now, hidden, text)
        self.memory.now = now
        return out

    def verify(self, call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
        """Around the last block: remember its output at computed steps, compare it with its forecast at others."""
        hidden, text = run(call)
        memory, t = self.memory, self.technique
        now: Pass = memory.now
        memory.now = None
        depth = self.predictor.depth
        for i in now.run:
            history: History = memory.row(now.moment.who[i]).marks.setdefault("last", History())
            value = hidden[i].clone() if hidden.shape[0] > 1 else hidden[i]
            history.push(self.at, (value,), depth, t.storage, t.offload, memory.form)
        for i in now.skip:
            marks = memory.row(now.moment.who[i]).marks
            history = marks["last"]
            weights = self.predictor.limited(history.nodes, self.at, self.gain)
            (forecast,) = history.combine(weights)
            assert forecast is not None
            marks["error"] = relative_error(forecast, hidden[i])
        return hidden, text


def relative_error(forecast: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """||forecast - truth|| / ||truth|| as a float32 scalar on the device."""
    return (forecast - truth).float().norm() / truth.float().norm().clamp_min(1e-12)
