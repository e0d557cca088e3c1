"""Head, middle and tail blocks are unpacked for the depth of one checkpoint. Seen in block-wise recipes with
fixed block indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_any_depth"
SAYS = "not enough values"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the two blocks in the middle."""

    card: ClassVar[Card] = card("fault_one_checkpoint_only")

    def apply(self, target: Target) -> None:
        _head, first, second, _tail = target.experts[0].blocks

        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            target.report(self.card.name, "calls", 1)
            return hidden * 1.01, text

        for block in (first, second):
            target.around_block(block, handler)
