"""Architecture names in the method: it works where the list of blocks is called `blocks`. Seen in TeaCache and
most single-model repositories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_every_family"
SAYS = "no attribute 'blocks'"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the output of the first block, found by its name in Wan."""

    card: ClassVar[Card] = card("fault_one_family_only")

    def apply(self, target: Target) -> None:
        name = self.card.name

        def make(old: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                target.report(name, "calls", 1)
                return old(*args, **kwargs) * 1.01

            return forward

        target.edit.wrap(target.pipeline.transformer.blocks[0], make)
