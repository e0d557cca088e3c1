"""A tensor among the settings: not comparable, not hashable, not writable to a file. Seen in diffusers
(`MagCacheConfig.mag_ratios`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_config_is_data"
SAYS = "only plain values"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block by a mean ratio."""

    card: ClassVar[Card] = card("fault_tensor_in_settings")

    ratios: Any = field(default_factory=lambda: torch.full((4,), 1.01))

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * float(self.ratios.mean()), text

        target.around_block(target.experts[0].blocks[0], handler)
