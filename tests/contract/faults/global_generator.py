"""Rows are sampled with the global random generator. Seen in Sparse VideoGen (row sampling for the online
profile).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_global_randomness_is_untouched"
SAYS = "global generator"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Attention with noise."""

    card: ClassVar[Card] = card(
        "fault_global_generator",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        def kernel(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            return v.mean(dim=1, keepdim=True).expand_as(q) * (1 + 0.1 * torch.rand(1))

        for site in target.attentions:
            if site.kind == "self":
                target.set_kernel(site, kernel)
