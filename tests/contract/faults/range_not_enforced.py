"""A value out of range is accepted, and means something else. Seen in configurations that validate nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique, knob

CAUGHT_BY = "check_knobs_have_ranges"
SAYS = "out of range and accepted"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block."""

    card: ClassVar[Card] = card("fault_range_not_enforced")

    gain: float = knob(1.01, low=0.5, high=2.0)

    def __post_init__(self) -> None:
        """Replaces the validation of the base instead of adding to it."""

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * self.gain, text

        target.around_block(target.experts[0].blocks[0], handler)
