"""One decision for the whole batch from a mean over all of it. Seen in TeaCache, First-Block-Cache, EasyCache
and cache-dit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Estimate, Target, Technique, knob

CAUGHT_BY = "check_batch_mates_do_not_matter"
SAYS = "its batch mate changes"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Reuses while the first input has moved less than a threshold."""

    card: ClassVar[Card] = card("fault_batch_mean")

    threshold: float = knob(0.4, low=0.05, high=2.0)

    def apply(self, target: Target) -> None:
        name, blocks = self.card.name, target.experts[0].blocks

        def first(call: Any, run: Any) -> Any:
            state = target.state(name, "stack", dict)
            now = call.hidden
            if "seen" in state:
                moved = (now - state["seen"]).abs().mean() / state["seen"].abs().mean()
                state["fresh"] = bool(moved >= self.threshold)
            else:
                state["fresh"] = True
            if state["fresh"]:
                state["seen"] = now
                return run(call)
            target.report(name, "hits", 1)
            target.clock.evaluation.mark(name)
            return call.hidden, call.text

        def rest(call: Any, run: Any) -> Any:
            fresh = target.state(name, "stack", dict)["fresh"]
            return run(call) if fresh else (call.hidden, call.text)

        target.around_block(blocks[0], first)
        for block in blocks[1:]:
            target.around_block(block, rest)

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
