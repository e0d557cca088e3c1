"""Building the settings changes a flag of the process. Seen in torchao (`set_inductor_config`) and torchtitan
(an inductor flag set in a constructor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_construction_does_nothing"
SAYS = "side effects: the matmul precision"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block, in high precision."""

    card: ClassVar[Card] = card("fault_busy_constructor")

    def __post_init__(self) -> None:
        super().__post_init__()
        torch.set_float32_matmul_precision("high")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * 1.01, text

        target.around_block(target.experts[0].blocks[0], handler)
