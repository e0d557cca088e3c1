"""Weights are changed in place, behind the ledger. Seen in LoRA fusing and in-place quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from samples import card

from vivace.techniques.base import Card, Paradigm, Stage, Target, Technique, exclusive

CAUGHT_BY = "check_undo_is_exact"
SAYS = "bytes of"


@dataclass(frozen=True, kw_only=True)
class Fault(Technique):
    """Scales the feed-forward weights."""

    card: ClassVar[Card] = card(
        "fault_direct_weight_edit",
        paradigm=Paradigm.COMPRESSION,
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"),),
    )

    def apply(self, target: Target) -> None:
        target.edit.set(target.experts[0].module, "fused", True)
        with torch.no_grad():
            for site in target.experts[0].linears:
                site.module.weight.mul_(1.02)
