"""A saving is predicted that is not made: every second step is announced as skipped, and the first two never
are. Seen in tables that give the nominal interval as the speed-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_counts_are_as_estimated"
SAYS = "blocks_run counted"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Reuses every second step after two computed ones."""

    card: ClassVar[Card] = card("fault_wrong_estimate")

    def apply(self, target: Target) -> None:
        name, clock = self.card.name, target.clock
        reuse_stack(
            target,
            name,
            lambda state: clock.step < 3 or clock.step % 2 == 0,
            lambda site: target.state(name, site, dict),
        )

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.5, fields=("blocks_run",)).scaled(0.0, 1.0, fields=("attention_pairs", "flops"))
