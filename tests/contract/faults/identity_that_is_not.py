"""Off by one: at the setting that switches it off, it still reuses. Seen in retention ratios that are rounded
down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique, knob

CAUGHT_BY = "check_identity_is_the_exact_run"
SAYS = "declared the identity and changes"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Reuses `skips` steps after each computed one."""

    card: ClassVar[Card] = card("fault_identity_that_is_not")

    skips: int = knob(2, low=0, high=4, identity=0)

    def apply(self, target: Target) -> None:
        name, clock = self.card.name, target.clock
        reuse_stack(
            target,
            name,
            lambda state: "added" not in state or clock.step % (self.skips + 2) == 0,
            lambda site: target.state(name, site, dict),
        )

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
