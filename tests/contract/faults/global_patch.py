"""A function of torch is replaced for the whole process. Seen in EDM2 (`count_flops` patches
`torch.nn.functional`, without a `finally`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_process_is_untouched"
SAYS = "scaled_dot_product_attention changed"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Damps attention everywhere."""

    card: ClassVar[Card] = card(
        "fault_global_patch",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        functional = torch.nn.functional
        old = functional.scaled_dot_product_attention

        def damped(*args: Any, **kwargs: Any) -> Any:
            return old(*args, **kwargs) * 0.9

        target.edit.set(functional, "scaled_dot_product_attention", damped)
