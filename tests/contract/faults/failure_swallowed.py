"""An edit that fails is skipped in silence, and the model runs half converted. Seen in loaders that warn and
carry on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Target, Technique

CAUGHT_BY = "check_failed_apply_leaves_nothing"
SAYS = "is swallowed"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales every block that can be wrapped."""

    card: ClassVar[Card] = card("fault_failure_swallowed")

    def apply(self, target: Target) -> None:
        def handler(call: Any, run: Any) -> Any:
            hidden, text = run(call)
            return hidden * 1.01, text

        for block in target.experts[0].blocks:
            with contextlib.suppress(RuntimeError):
                target.around_block(block, handler)
