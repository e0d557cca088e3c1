"""Turning the knob up saves less again: intervals that do not divide the steps recompute at the wrong ones. Seen
in reuse intervals combined with warm-up by modulo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique, knob

CAUGHT_BY = "check_knobs_are_monotone"
SAYS = "grows from"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Reuses on steps that `interval` divides."""

    card: ClassVar[Card] = card("fault_knob_turns_back")

    interval: int = knob(2, low=1, high=6, monotone="blocks_run")

    def apply(self, target: Target) -> None:
        name, clock = self.card.name, target.clock
        reuse_stack(
            target,
            name,
            lambda state: "added" not in state or clock.step % self.interval != 0,
            lambda site: target.state(name, site, dict),
        )

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
