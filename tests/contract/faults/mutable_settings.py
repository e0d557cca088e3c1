"""Applying changes the settings object. Seen in cache-dit (`BasicCacheConfig.update` and `.empty` work in
place).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique, knob

CAUGHT_BY = "check_technique_stays_as_it_is"
SAYS = "changes the technique object"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Doubles its own gain each time."""

    card: ClassVar[Card] = card("fault_mutable_settings")

    gain: float = knob(1.01, low=1.0, high=2.0)

    def apply(self, target: Target) -> None:
        object.__setattr__(self, "gain", min(2.0, self.gain * 1.01))

        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            target.report(self.card.name, "calls", 1)
            return hidden * self.gain, text

        target.around_block(target.experts[0].blocks[0], handler)
