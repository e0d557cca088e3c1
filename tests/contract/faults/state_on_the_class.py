"""Run-time memory sits in a dictionary on the class, shared by everybody. Seen in Sparse VideoGen (masks as
class attributes) and MagCache (counters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_technique_stays_as_it_is"
SAYS = "attributes of the technique's class"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Averages the first block with its last output."""

    card: ClassVar[Card] = card("fault_state_on_the_class")

    memory: ClassVar[dict[str, float]] = {}

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            self.memory[target.clock.branch] = float(hidden.mean())
            target.report(self.card.name, "calls", 1)
            return hidden + 0.01 * self.memory["cond"], text

        target.around_block(target.experts[0].blocks[0], handler)
