"""A method with no source, no purpose and no summary. Seen in every collection of methods that has grown for a
year.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Cite, Target, Technique

CAUGHT_BY = "check_card_is_complete"
SAYS = "objective is empty"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block."""

    card: ClassVar[Card] = card("fault_incomplete_card", cite=Cite(""), objective="")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * 1.01, text

        target.around_block(target.experts[0].blocks[0], handler)
