"""Attention is computed in full, and a sparse count is reported. Seen where a mask is laid over dense attention
and the density of the mask is sold as the saving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Estimate, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_savings_are_real"
SAYS = "are executed"


class Kernel:
    """Dense attention that says it visited a quarter of the pairs."""

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(1, 2)

    def pairs(self, rows: int, heads: int, queries: int, keys: int) -> float:
        return rows * heads * queries * keys / 4


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Masked dense attention."""

    card: ClassVar[Card] = card(
        "fault_fake_sparsity",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        for site in target.attentions:
            if site.kind == "self":
                target.set_kernel(site, Kernel())

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0)
