"""A call counter decides the branch and the step, and is reset only after the last call. Seen in TeaCache4Wan2.1
(`self.cnt % 2`) and cache-dit (call parity).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card, reuse_stack

from vivace.techniques.base import Card, Estimate, Target, Technique

CAUGHT_BY = "check_aborted_generation_leaves_nothing"
SAYS = "stopped at step"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Every second step reuses; what step it is, is counted."""

    card: ClassVar[Card] = card("fault_parity_counter")

    def apply(self, target: Target) -> None:
        calls, memory = 0, ({}, {})

        def state(site: str) -> dict[str, Any]:
            return memory[calls % 2]

        def fresh(state: dict[str, Any]) -> bool:
            step = calls // 2
            return step < 2 or step % 2 == 0

        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                out = old(*args, **kwargs)
                calls = (calls + 1) % 16
                return out

            return forward

        reuse_stack(target, self.card.name, fresh, state)
        target.edit.wrap(target.experts[0].module, make)

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
