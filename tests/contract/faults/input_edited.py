"""The stored residual is added in place to the tensor that the caller still holds. Seen in TeaCache and MagCache
(`x += previous_residual`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_inputs_are_not_edited"
SAYS = "edited in place"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Adds a little to what every block is given."""

    card: ClassVar[Card] = card("fault_input_edited")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            call.hidden.mul_(1.01)
            return run(call)

        for block in target.experts[0].blocks:
            target.around_block(block, handler)
