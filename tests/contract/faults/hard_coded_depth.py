"""The number of blocks of one checkpoint is written into the method. Seen in Self-Forcing
(`num_transformer_blocks = 30`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_any_depth"
SAYS = "out of range"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Skips the third block on odd steps."""

    card: ClassVar[Card] = card("fault_hard_coded_depth")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            if target.clock.step % 2 == 0:
                return run(call)
            target.report(self.card.name, "hits", 1)
            target.clock.evaluation.mark(self.card.name)
            return call.hidden, call.text

        target.around_block(target.experts[0].blocks[2], handler)

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(7 / 8, fields=("blocks_run",)).scaled(
            0.0, 1.0, fields=("attention_pairs", "flops")
        )
