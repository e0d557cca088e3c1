"""A loss is declared that holds on no model. Seen in method pages that call a cache lossless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_declared_fidelity_holds"
SAYS = "declared at most"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales block outputs by a tenth and calls it near-lossless."""

    card: ClassVar[Card] = card("fault_fidelity_overclaimed", fidelity=1e-4)

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * 0.9, text

        for block in target.experts[0].blocks:
            target.around_block(block, handler)
