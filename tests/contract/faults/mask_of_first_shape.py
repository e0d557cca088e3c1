"""A mask is built for the first shape and kept. Seen in Sparse VideoGen (`attention_masks` as class attributes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_calls_may_change"
SAYS = "must match the size"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Local attention by a mask."""

    card: ClassVar[Card] = card(
        "fault_mask_of_first_shape",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
    )

    def apply(self, target: Target) -> None:
        masks: list[torch.Tensor] = []

        def kernel(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
            if not masks:
                place = torch.arange(q.shape[1])
                masks.append((place[:, None] - place[None]).abs() < 4)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masks[0])
            return out.transpose(1, 2)

        for site in target.attentions:
            if site.kind == "self":
                target.set_kernel(site, kernel)
