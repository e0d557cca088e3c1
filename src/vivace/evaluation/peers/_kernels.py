"""Putting a peer's attention kernel into the self-attention of the blocks, around the model's own projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vivace.core.errors import NoEffectError
from vivace.core.receipt import Receipt
from vivace.core.shapes import TokenGrid
from vivace.core.surgery import Surgery
from vivace.evaluation.peers.base import Installed, Peer, experts
from vivace.models.adapter import EXPERTS, Adapter, ModelDescription, Need, RootCall
from vivace.models.families import for_module


class AttentionPeer(Peer):
    """A peer that is an attention kernel. A subclass makes it."""

    abstract = True

    def refuse(self, model: ModelDescription) -> str:
        if Need.ATTENTION_SITES not in model.offers or model.family != "wan":
            return f"{self.name} is put into Wan's self-attention only, not {model.family or model.pipeline_class}."
        return ""

    def kernel(self, grid: Callable[[], TokenGrid], called: Callable[[], None], **settings: Any) -> Any:
        """A callable `kernel(q, k, v, mask)`, all (B, S, H, D); `grid()` tells the token grid of the running call.

        With a method `pairs(batch, heads, queries, keys)` it reports how many query-key pairs it visits.
        """
        raise TypeError(f"{type(self).__name__} makes no kernel")

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        edit, counts = Surgery(), {"calls": 0.0}
        now: dict[str, TokenGrid] = {}

        def called() -> None:
            counts["calls"] += 1

        kernel = self.kernel(lambda: now["grid"], called, **settings)
        sites = 0
        with edit.by(self.name):
            for name in EXPERTS:
                transformer = getattr(pipeline, name, None)
                if transformer is None or (adapter := for_module(transformer)) is None:
                    continue
                for site in adapter.expert(name, transformer).attentions:
                    if site.kind == "self":
                        edit.set(site.module, "processor", adapter.processor(site, kernel))
                        sites += 1
                edit.wrap(transformer, _noting(now, transformer, adapter))
        if not sites:
            edit.close()
            raise NoEffectError(f"{self.name} found no self-attention in {type(pipeline).__name__}.")
        return Installed(edit.close, effects={"sites": float(sites)}, counts=counts)

    def acted(self, receipt: Receipt) -> bool:
        return any(t.name == self.name and t.effects.get("calls", 0) > 0 for t in receipt.techniques)


def _noting(
    now: dict[str, TokenGrid], transformer: Any, adapter: Adapter
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = RootCall.bind(transformer, args, kwargs)
            now["grid"] = adapter.grid_of_call(transformer.config, call.values)
            return old(*args, **kwargs)

        return forward

    return make


def low_precision(pipeline: Any) -> bool:
    """Whether the transformers run in a 16-bit type."""
    import torch

    kinds = {next(t.parameters()).dtype for t in experts(pipeline)}
    return kinds <= {torch.bfloat16, torch.float16}
