"""The default attention backend of the process is set on the way. Seen in diffusers (`set_attention_backend`
also sets the global default, and the reset forgets it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_process_is_untouched"
SAYS = "attention backend"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Chooses an attention backend."""

    card: ClassVar[Card] = card(
        "fault_backend_for_everybody",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        target.experts[0].module.set_attention_backend("_native_math")
        target.edit.set(target.experts[0].module, "backend", "math")
