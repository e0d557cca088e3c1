"""Undo assigns the old bound method to the instance, so an attribute stays that was not there. Seen in diffusers
`HookRegistry.remove_hook`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_undo_is_exact"
SAYS = "forward is new"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales block outputs; its undo is hand-written."""

    card: ClassVar[Card] = card("fault_forward_left_behind")

    def apply(self, target: Target) -> None:
        for block in target.experts[0].blocks:
            module, old = block.module, block.module.forward

            def forward(*args: Any, old: Any = old, **kwargs: Any) -> Any:
                return old(*args, **kwargs) * 1.01

            target.edit.set(module, "done", True, on_undo=lambda m=module, o=old: vars(m).update(forward=o))
            vars(module)["forward"] = forward
