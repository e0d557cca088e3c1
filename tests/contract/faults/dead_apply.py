"""`__call__` is set on an instance, where Python never looks it up: applied, and nothing happens. Seen in the
FORA of Pruna, and in TaylorSeer of diffusers, whose patterns match nothing on Wan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_it_acts"
SAYS = "neither output nor counts"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Would scale the output."""

    card: ClassVar[Card] = card("fault_dead_apply")

    def apply(self, target: Target) -> None:
        module = target.experts[0].module
        target.edit.set(module, "__call__", lambda *args, **kwargs: module.forward(*args, **kwargs) * 0.5)
