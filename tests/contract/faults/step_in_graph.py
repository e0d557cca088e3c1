"""The step number is read inside compiled code and becomes a guard: one compilation for each step. Seen wherever
compile is laid around caching hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_blocks_compile_once"
SAYS = "RecompileLimit"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Damps attention more from step to step."""

    card: ClassVar[Card] = card(
        "fault_step_in_graph",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        def kernel(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return out * (1 - 0.01 * target.clock.step)

        for site in target.attentions:
            if site.kind == "self":
                target.set_kernel(site, kernel)
