"""One memory for both guidance branches: the unconditional branch gets what the conditional one left. Seen in
Pyramid Attention Broadcast of diffusers 0.42 on Wan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_fused_guidance_is_separate_guidance"
SAYS = "fused guidance changes"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Computes every second call and reuses it in the next."""

    card: ClassVar[Card] = card("fault_branches_mixed")

    def apply(self, target: Target) -> None:
        name = self.card.name

        def fresh(state: dict[str, Any]) -> bool:
            state["calls"] = state.get("calls", 0) + 1
            return state["calls"] % 2 == 1

        reuse_stack(target, name, fresh, lambda site: target.store.shared(name, site, dict))

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
