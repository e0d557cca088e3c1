"""At one end of a knob a scale becomes zero and the latents are not numbers. Seen in quantisers that divide by
an unclamped maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique, knob

CAUGHT_BY = "check_outputs_are_finite"
SAYS = "not finite"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Rounds the first block to a number of levels."""

    card: ClassVar[Card] = card("fault_division_by_zero")

    levels: int = knob(64, low=0, high=256)

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            step = hidden.abs().amax() * self.levels / 256**2
            return (hidden / step).round() * step, text

        target.around_block(target.experts[0].blocks[0], handler)
