"""What one generation remembers is still there in the next. Seen in diffusers 0.42, where caches are reset at
the end of a successful call only, and in MagCache, whose counters are class attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_generations_are_independent"
SAYS = "another prompt before it"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Computes early steps once and for all."""

    card: ClassVar[Card] = card("fault_no_reset")

    def apply(self, target: Target) -> None:
        memory: dict[Any, dict[str, Any]] = {}
        clock = target.clock
        reuse_stack(
            target,
            self.card.name,
            lambda state: "added" not in state or clock.step >= 6,
            lambda site: memory.setdefault((clock.branch, site), {}),
        )

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
