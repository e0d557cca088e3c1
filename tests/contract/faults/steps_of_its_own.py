"""The number of steps the user asks for is overridden. Seen in few-step pipelines that write their schedule over
the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from samples import card

from vivace.techniques.base import Card, Estimate, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_calls_may_change"
SAYS = "number of steps"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Four steps, whoever asks for what."""

    card: ClassVar[Card] = card(
        "fault_steps_of_its_own",
        paradigm=Paradigm.TRAJECTORY,
        stage=Stage.TRAJECTORY,
        claims=(exclusive("sampler.schedule"),),
    )

    def apply(self, target: Target) -> None:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def set_timesteps(num_inference_steps: Any = None, *args: Any, **kwargs: Any) -> Any:
                target.report(self.card.name, "steps_saved", 1)
                return old(4, *args, **kwargs)

            return set_timesteps

        target.edit.wrap(target.scheduler, make, "set_timesteps")

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
