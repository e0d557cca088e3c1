"""What all techniques at attention sites have in common: which sites are theirs, and what speaks against a setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vivace.kernels.api import candidates
from vivace.models.adapter import AttentionSite, Expert, ExpertDescription, ModelDescription
from vivace.techniques.base import Claim, Problem, Technique, exclusive

KINDS = ("self", "joint")
"""Kinds of attention in which video tokens see each other."""


def own_backend(site: AttentionSite) -> Any:
    """The attention backend that the model's own processor has, for calls that stay with the model."""
    return getattr(site.module.processor, "_attention_backend", None)


@dataclass(frozen=True, kw_only=True)
class PlacedAttention(Technique):
    """Base of techniques that put a kernel in the place of attention sites. A subclass may narrow `acts_on`."""

    abstract: ClassVar[bool] = True
    dry: ClassVar[bool] = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the sites that are served."""
        return KINDS

    def acts_on(self, index: int, depth: int) -> bool:
        """Whether the sites of a layer are served; layers at the front may stay as they are (`dense_layers`)."""
        return index >= getattr(self, "dense_layers", 0)

    @property
    def warmup(self) -> int:
        """The plan compares it with the number of steps."""
        return getattr(self, "dense_steps", 0)

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        sites = frozenset(site for expert in model.experts for site in self._described(model, expert))
        return (exclusive("attention.kernel", sites),)

    def misplaced(self, model: ModelDescription, operation: str, backend: str) -> list[Problem]:
        """Problems of a kernel's name that the operation does not have, and of settings that leave no site."""
        found = []
        if backend not in (names := ["auto", *(c.name for c in candidates(operation))]):
            found.append(self.problem("setting", f"backend must be one of {', '.join(names)}."))
        if not any(self._described(model, expert) for expert in model.experts):
            dense = getattr(self, "dense_layers", 0)
            found.append(
                self.problem(
                    "pointless",
                    f"dense_layers={dense} keeps all {model.depth} layers dense; lower it or leave it out.",
                )
            )
        return found

    def _described(self, model: ModelDescription, expert: ExpertDescription) -> list[str]:
        """Addresses of the served sites of an expert."""
        kinds = model.adapter.attention if model.adapter is not None else {}
        paths = [path for path, kind in kinds.items() if kind in self.kinds]
        sites = {f"{block}.{path}": i for i, block in enumerate(expert.block_sites) for path in paths}
        return [s for s in expert.attention_sites if s in sites and self.acts_on(sites[s], expert.depth)]

    def _sites(self, expert: Expert) -> Iterator[AttentionSite]:
        """The served sites of a live expert."""
        for site in expert.attentions:
            if site.kind in self.kinds and self.acts_on(site.index, len(expert.blocks)):
                yield site
