"""What it takes of a model is not what its card says, so a list of methods by their cards is wrong. Seen in
pairwise compatibility lists that lag behind the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Claim, Target, Technique, exclusive

CAUGHT_BY = "check_questions_are_pure"
SAYS = "which the card does not"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block, and owns the solver too."""

    card: ClassVar[Card] = card("fault_claims_more_than_declared")

    def claims(self, model: Any) -> tuple[Claim, ...]:
        return (*self.card.claims, exclusive("sampler.solver"))

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * 1.01, text

        target.around_block(target.experts[0].blocks[0], handler)
