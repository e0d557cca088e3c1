"""Honest little techniques, one for each kind of edit. None is registered: a third party's need not be either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Need,
    Paradigm,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    reads,
)


def card(name: str, **changes: Any) -> Card:
    """A complete card of a block cache, with some facts changed."""
    facts: dict[str, Any] = {
        "name": name,
        "paradigm": Paradigm.CACHING,
        "summary": "A technique made for the contract's own tests.",
        "objective": "latency",
        "stage": Stage.CACHE,
        "claims": (exclusive("block.skip"), reads("block.output")),
        "cite": Cite("made for the contract's own tests"),
        "needs": (Need.ORDERED_BLOCKS,),
    }
    return Card(**(facts | changes))


def reuse_stack(
    target: Target,
    name: str,
    fresh: Callable[[dict[str, Any]], bool],
    memory: Callable[[Any], dict[str, Any]],
) -> None:
    """Run all blocks of an evaluation when `fresh(memory)` says so, else add what they added last time."""
    for expert in target.experts:
        first, last = expert.blocks[0], expert.blocks[-1]

        def handler(call: Any, run: Any, *, first: Any = first, last: Any = last, block: Any = None) -> Any:
            state = memory(first.site)
            if block is first:
                state["fresh"] = fresh(state)
                state["given"] = (call.hidden, call.text)
            if state["fresh"]:
                out = run(call)
                if block is last:
                    state["added"] = tuple(
                        None if after is None else after - before
                        for after, before in zip(out, state["given"], strict=True)
                    )
                return out
            if block is not last:
                return call.hidden, call.text
            target.report(name, "hits", 1)
            if target.clock.evaluation is not None:
                target.clock.evaluation.mark(name)
            hidden, text = state["added"]
            return call.hidden + hidden, None if call.text is None else call.text + text

        for block in expert.blocks:
            target.around_block(block, lambda call, run, b=block, h=handler: h(call, run, block=b))


@dataclass(frozen=True, kw_only=True)
class EveryOther(Technique):
    """Computes the block stack every `interval` steps and reuses what it added in between."""

    card: ClassVar[Card] = card("sample_every_other")

    interval: int = knob(2, low=1, high=4, identity=1, monotone="blocks_run")

    def _fresh(self, target: Target) -> Callable[[dict[str, Any]], bool]:
        return lambda state: "added" not in state or target.clock.step % self.interval == 0

    def apply(self, target: Target) -> None:
        name = self.card.name
        reuse_stack(target, name, self._fresh(target), lambda site: target.state(name, site, dict))

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        computed = len(range(0, workload.steps, self.interval)) / workload.steps
        # Two experts of one pipeline each start with a computed step.
        most = min(1.0, computed + (len(model.experts) - 1) / workload.steps)
        bounded = base.scaled(computed, most, fields=("blocks_run",))
        return bounded.scaled(0.0, 1.0, fields=("attention_pairs", "flops"))


class Window:
    """Softmax attention over the nearest `width` keys, block by block: keys out of reach are never touched."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        pieces = []
        for start, stop in self._spans(q.shape[1]):
            low, high = max(0, start - self.width), min(k.shape[1], stop + self.width)
            queries, keys, values = (
                x[:, :, a:b]
                for x, (a, b) in zip(heads_first, [(start, stop), (low, high), (low, high)], strict=True)
            )
            pieces.append(torch.nn.functional.scaled_dot_product_attention(queries, keys, values))
        return torch.cat(pieces, dim=2).transpose(1, 2)

    def _spans(self, length: int) -> list[tuple[int, int]]:
        return [(i, min(i + self.width, length)) for i in range(0, length, self.width)]

    def pairs(self, rows: int, heads: int, queries: int, keys: int) -> float:
        """Query-key pairs visited."""
        spans = self._spans(queries)
        return float(
            rows
            * heads
            * sum((b - a) * (min(keys, b + self.width) - max(0, a - self.width)) for a, b in spans)
        )


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Technique):
    """Video tokens attend to their neighbours in the sequence only."""

    card: ClassVar[Card] = card(
        "sample_window_attention",
        paradigm=Paradigm.ATTENTION,
        stage=Stage.KERNELS,
        claims=(exclusive("attention.kernel"),),
        needs=(Need.ATTENTION_SITES,),
    )

    width: int = knob(4, low=1, high=64)

    def check(self, model: Any) -> list[Any]:
        if model.family not in ("wan", "wan-fused"):
            return [self.problem("need", "is written for Wan only; leave it out.")]
        return []

    def apply(self, target: Target) -> None:
        for site in target.attentions:
            if site.kind == "self":
                target.set_kernel(site, Window(self.width))

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(0.0, 1.0, fields=("attention_pairs", "flops"))


@dataclass(frozen=True, kw_only=True)
class RoundedWeights(Technique):
    """Rounds the feed-forward weights to a few levels."""

    card: ClassVar[Card] = card(
        "sample_rounded_weights",
        paradigm=Paradigm.COMPRESSION,
        stage=Stage.WEIGHTS,
        claims=(exclusive("linear.weight"),),
        needs=(Need.LINEAR_SITES,),
        fidelity=0.2,
    )

    levels: int = knob(64, low=2, high=1024)
    keep: str = knob("host", choices=("device", "host"))

    def apply(self, target: Target) -> None:
        for site in (s for e in target.experts for s in e.linears if s.role.startswith("ffn")):
            weight = site.module.weight
            scale = weight.detach().abs().amax() / self.levels
            target.edit.weight(
                site.module, "weight", (weight.detach() / scale).round() * scale, keep=self.keep
            )


@dataclass(frozen=True, kw_only=True)
class FirstStepsOnly(Technique):
    """Asks the scheduler for fewer steps than the model's default."""

    card: ClassVar[Card] = card(
        "sample_first_steps_only",
        paradigm=Paradigm.TRAJECTORY,
        stage=Stage.TRAJECTORY,
        claims=(exclusive("sampler.schedule"),),
        needs=(),
    )

    steps: int = knob(4, low=2, high=6)

    def apply(self, target: Target) -> None:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def set_timesteps(num_inference_steps: Any = None, *args: Any, **kwargs: Any) -> Any:
                mine = num_inference_steps
                if not target.clock.steps_are_the_users:
                    mine = self.steps
                    target.report(self.card.name, "steps_saved", num_inference_steps - mine)
                return old(mine, *args, **kwargs)

            return set_timesteps

        target.edit.wrap(target.scheduler, make, "set_timesteps")

    def check(self, model: Any) -> list[Any]:
        if "FlowMatch" in model.scheduler_class or model.family == "cogvideox":
            return [self.problem("need", "is written for UniPC only; leave it out.")]
        return []

    def estimate(self, model: Any, workload: Any, base: Estimate) -> Estimate:
        return base.scaled(self.steps / workload.steps)


HONEST: tuple[type[Technique], ...] = (EveryOther, WindowAttention, RoundedWeights, FirstStepsOnly)
