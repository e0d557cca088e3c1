"""The method of the class is replaced, so every pipeline in the process changes. Seen in TeaCache, MagCache,
Sparse VideoGen (model class) and cache-dit (pipeline class).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_siblings_are_untouched"
SAYS = "second pipeline"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Damps attention by patching its class."""

    card: ClassVar[Card] = card(
        "fault_class_patch",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        owner = type(target.attentions[0].module)
        old = owner.forward

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            return old(module, *args, **kwargs) * 0.9

        # The undo is right; the reach is not.
        target.edit.set(
            target.experts[0].module, "patched", True, on_undo=lambda: setattr(owner, "forward", old)
        )
        owner.forward = forward
