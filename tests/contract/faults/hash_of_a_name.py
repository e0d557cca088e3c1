"""A choice depends on the hash of a string, which differs from process to process. Seen in seeds derived from
module names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_saved_plan_in_a_fresh_process"
SAYS = "another process gives other latents"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales blocks by gains drawn from their names."""

    card: ClassVar[Card] = card("fault_hash_of_a_name")

    def apply(self, target: Target) -> None:
        for block in target.experts[0].blocks:
            gain = 1.0 + 1e-3 * (hash(block.site) % 997)

            def handler(call: Any, run: Any, gain: float = gain) -> Any:
                hidden, text = run(call)
                return hidden * gain, text

            target.around_block(block, handler)
