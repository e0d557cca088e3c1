"""Every residual stays alive in a list nobody empties. Seen in calibration runs of caches, and in forward hooks
that outlive their handle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_memory_is_released"
SAYS = "stay alive"


_kept: list[torch.Tensor] = []


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block and remembers what it saw."""

    card: ClassVar[Card] = card("fault_tensors_kept")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            _kept.append(hidden)
            return hidden * 1.01, text

        target.around_block(target.experts[0].blocks[0], handler)
