"""Blocks are skipped and the receipt is not told by whom. Seen in stacks of two caches, where only the outer one
reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_receipt_adds_up"
SAYS = "by nobody"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Skips the last block on odd steps."""

    card: ClassVar[Card] = card("fault_saving_by_nobody")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            return run(call) if target.clock.step % 2 == 0 else (call.hidden, call.text)

        target.around_block(target.experts[0].blocks[-1], handler)

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
