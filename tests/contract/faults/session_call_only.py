"""It is driven by the wrapper around the call, so the pipeline asked directly runs without it. Seen in cache-dit
(the step count comes from a patched pipeline call).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_direct_drive_is_the_same"
SAYS = "driven directly gives other latents"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the first block when the session makes the call."""

    card: ClassVar[Card] = card("fault_session_call_only")

    def apply(self, target: Target) -> None:
        def by_session() -> bool:
            frame: Any = sys._getframe()
            while frame is not None:
                if frame.f_code.co_filename.endswith("session.py"):
                    return True
                frame = frame.f_back
            return False

        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return (hidden * 1.05 if by_session() else hidden), text

        target.around_block(target.experts[0].blocks[0], handler)
