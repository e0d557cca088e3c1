"""Undo writes back the method it once found, and so throws out a wrapper that somebody laid over it since. Seen
in diffusers `hooks.py`, where a hook taken out of the middle silences its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_foreign_hooks_survive"
SAYS = "is lost at"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the output of the first block."""

    card: ClassVar[Card] = card("fault_neighbour_overwritten")

    def apply(self, target: Target) -> None:
        module = target.experts[0].blocks[0].module
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return old(*args, **kwargs) * 1.05

        target.edit.set(
            target.experts[0].module, "done", True, on_undo=lambda: vars(module).pop("forward", None)
        )
        vars(module)["forward"] = forward
