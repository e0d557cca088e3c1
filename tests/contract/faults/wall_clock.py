"""A decision depends on the time of day: no two runs are alike. Seen in latency-driven controllers without a
virtual clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_deterministic"
SAYS = "differ"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block by the time."""

    card: ClassVar[Card] = card("fault_wall_clock")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * (1.0 + 1e-3 * (time.perf_counter_ns() % 1009)), text

        target.around_block(target.experts[0].blocks[0], handler)
