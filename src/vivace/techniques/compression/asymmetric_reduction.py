"""Asymmetric reduction (AsymRnR): inside attention, fewer queries and fewer keys, each at a rate of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import AttentionSite, Expert, ModelDescription, Need, RootCall
from vivace.techniques.base import Card, Cite, Estimate, Paradigm, Stage, Target, exclusive, knob
from vivace.techniques.compression.reduction import (
    KINDS,
    MatchedReduction,
    key_weights,
    known_rows,
    own_backend,
    shortened,
    weighted,
)
from vivace.techniques.compression.token_matching import Match, Windows, kept_tokens, match, restored

if TYPE_CHECKING:
    import torch

NAME = "asymmetric_reduction"


@dataclass(frozen=True, kw_only=True)
class AsymmetricReduction(MatchedReduction):
    """Queries and keys are matched apart, after norms and rotation; those that go are left out, not averaged.

    A query that goes gets a copy of the output of the one that stands for it. A key goes together with its value. All
    heads of a layer share a matching, and text of joint attention stays whole on both sides.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Leaves out similar queries, and similar keys with their values, inside attention.",
        objective="fewer query-key pairs",
        stage=Stage.TOKENS,
        claims=(exclusive("tokens.set"), exclusive("attention.kernel"), exclusive("block.skip")),
        needs=(Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
        cite=Cite(
            title="AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration",
            arxiv="2412.11706",
            code="https://github.com/wenhao728/AsymRnR",
            differs="one rate for all layers and steps but the first and last ones, where the paper has a schedule "
            "from measured similarity; destinations stand on a regular stride inside windows of the grid",
        ),
    )

    query_ratio: float = knob(0.25, low=0.0, high=0.875)
    """Share of the video's queries that go."""
    key_ratio: float = knob(0.5, low=0.0, high=0.875)
    """Share of the video's keys and values that go."""
    proportional: bool = False
    """Add log n to the scores of a key that stands for n: the mass of those that went is kept."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        small: dict[str, Any] = {"window_frames": 3, "window_height": 4, "window_width": 4}
        return (
            cls(every=2, **small),
            cls(query_ratio=0.0, proportional=True, dense_steps=1, tail=1, dense_layers=1),
        )

    @property
    def is_identity(self) -> bool:
        return self.query_ratio == 0.0 and self.key_ratio == 0.0

    @property
    def rates(self) -> dict[str, float]:
        return {"query_ratio": self.query_ratio, "key_ratio": self.key_ratio}

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact, but for text of another length on the other branch, and for a second expert's first step."""
        grid, adapter = model.grid(workload), model.adapter
        if grid is None or adapter is None or self.is_identity:
            return base
        expert, windows = model.experts[0], self.windows(grid)
        queries, keys = (grid.video - self.gone(windows, rate) for rate in self.rates.values())
        each = self.layers(expert.depth) * expert.heads * sum(k in KINDS for k in adapter.attention.values())
        sites = each * self.evaluations(workload, base.nfe[0])
        asked = sum(n < grid.video for n in (queries, keys))
        sums = [n * each * asked * beside(windows, expert.heads, expert.head_dim)
                for n in self.matchings(model, workload, base.nfe[0])]  # fmt: skip
        ends = []
        for text, end in zip(sorted(self.texts(model, workload), reverse=True), (0, 1), strict=True):
            ends.append(sites * ((grid.video + text) ** 2 - (queries + text) * (keys + text)) - sums[end])
        cost = 4.0 * expert.head_dim
        pairs = (base.attention_pairs[0] - ends[0], base.attention_pairs[1] - ends[1])
        return Estimate(
            base.nfe, base.blocks_run, pairs, (base.flops[0] - cost * ends[0], base.flops[1] - cost * ends[1])
        )

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            placed = [(site, ReducedAttention(own_backend(site), self)) for site in self.sites(expert)]
            for site, kernel in placed:
                target.set_kernel(site, kernel)
            if placed:
                target.around_expert(expert, Reducer(self, target, expert, placed).around_expert)


def beside(windows: Windows, heads: int, head_dim: int) -> float:
    """Query-key pairs of one head that a matching is worth, for one row."""
    return windows.flops(heads * head_dim) / (4.0 * head_dim * heads)


Pair = tuple[Match | None, Match | None]
"""Matchings of queries and of keys; None for a side that stays whole."""


class ReducedAttention:
    """The kernel of one attention site. `windows` None means all tokens; `kept` is a matching of an earlier step."""

    def __init__(self, backend: Any, technique: AsymmetricReduction) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch, self._backend, self._proportional = (
            dispatch_attention_fn,
            backend,
            technique.proportional,
        )
        self.windows: Windows | None = None
        self.counts: tuple[int, int] = (0, 0)
        self.text_first = False
        self.kept: Pair | None = None
        self.last: Pair | None = None

    def _all(self, queries: int, keys: int) -> bool:
        """Whether a call stays as it is: another technique may hand over other tokens."""
        return self.windows is None or queries != keys or queries < self.windows.tokens

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        if self._all(q.shape[1], k.shape[1]) or (mask is not None and mask.shape[-2] != 1):
            return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)
        windows = self.windows
        assert windows is not None
        text = q.shape[1] - windows.tokens
        found = self.kept
        if found is None:
            found = (
                self._match(q, windows, self.counts[0], text),
                self._match(k, windows, self.counts[1], text),
            )
            self.last = found
        asked, known = found
        if known is not None:
            k, v = (self._short(x, known, text) for x in (k, v))
            if mask is not None:
                mask = shortened(mask, known.keep, windows.tokens, self.text_first)
            if self._proportional:
                mask = weighted(mask, key_weights(known, text, self.text_first), q.dtype)
        short = q if asked is None else self._short(q, asked, text)
        out = self._dispatch(short, k, v, attn_mask=mask, backend=self._backend)
        if asked is None:
            return out
        heads = out.shape[2:]
        return self._on_video(out.flatten(2), text, lambda x: restored(x, asked)).unflatten(2, heads)

    def _match(self, x: torch.Tensor, windows: Windows, count: int, text: int) -> Match | None:
        if not count:
            return None
        video = x[:, text:] if self.text_first else x[:, : windows.tokens]
        return match(video.flatten(2), windows, count)

    def _short(self, x: torch.Tensor, found: Match, text: int) -> torch.Tensor:
        flat = self._on_video(x.flatten(2), text, lambda y: kept_tokens(y, found))
        return flat.unflatten(2, x.shape[2:])

    def _on_video(self, x: torch.Tensor, text: int, change: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        import torch

        if not text:
            return change(x)
        if self.text_first:
            return torch.cat([x[:, :text], change(x[:, text:])], dim=1)
        return torch.cat([change(x[:, :-text]), x[:, -text:]], dim=1)

    def pairs(self, batch: int, heads: int, queries: int, keys: int) -> float:
        """Query-key pairs visited as things stand, and what the matching is worth in such pairs."""
        if self._all(queries, keys):
            return float(batch) * heads * queries * keys
        windows = self.windows
        assert windows is not None
        left = float(queries - self.counts[0]) * (keys - self.counts[1])
        made = sum(c > 0 for c in self.counts) if self.kept is None else 0
        return batch * heads * (left + made * self.worth)

    worth = 0.0
    """Of one matching, in pairs of one head."""


class Reducer:
    """Asymmetric reduction at work on one expert."""

    def __init__(
        self,
        technique: AsymmetricReduction,
        target: Target,
        expert: Expert,
        placed: list[tuple[AttentionSite, ReducedAttention]],
    ) -> None:
        self.technique, self.target, self.expert, self.placed = technique, target, expert, placed
        self.built: dict[tuple[TokenGrid, Any], Windows] = {}

    def around_expert(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Say to every site of this evaluation what to do, and keep what it found."""
        clock, t, adapter = self.target.clock, self.technique, self.target.adapter
        evaluation = clock.evaluation
        assert evaluation is not None  # handlers are called inside an evaluation only
        assert adapter is not None
        if not t.acts(clock.step, clock.num_steps):
            evaluation.variant += (f"{NAME}: all tokens",)
            return run(call)
        # The grid of what reaches the network, which need not be what the pipeline asked for.
        grid, device = (
            adapter.grid_of_call(self.expert.config, call.values),
            call.values["hidden_states"].device,
        )
        if (grid, device) not in self.built:
            self.built[grid, device] = t.windows(grid, device)
        windows = self.built[grid, device]
        counts = (t.gone(windows, t.query_ratio), t.gone(windows, t.key_ratio))
        if not any(counts):
            return run(call)
        evaluation.mark(NAME)
        self.target.report(NAME, "queries_left_out", counts[0] * call.rows)
        self.target.report(NAME, "keys_left_out", counts[1] * call.rows)
        who = known_rows(self.target, call.rows) if t.remembers else None
        due = (clock.step - t.dense_steps) % t.every == 0
        kept = None if who is None or due else self._remembered(who)
        if kept is not None:
            evaluation.variant += (f"{NAME}: kept",)
        for number, (site, kernel) in enumerate(self.placed):
            kernel.windows, kernel.counts, kernel.text_first = windows, counts, grid.text_first
            kernel.worth = beside(windows, site.heads, site.head_dim)
            kernel.kept = None if kept is None else kept[number]
        try:
            return run(call)
        finally:
            for site, kernel in self.placed:
                if who is not None and kernel.last is not None:
                    memory = self._memory(site)
                    for row, name in enumerate(who):
                        memory[name] = _row(kernel.last, row)
                kernel.windows = kernel.kept = kernel.last = None

    def _memory(self, site: AttentionSite) -> dict[Hashable, Pair]:
        return self.target.store.shared(NAME, (site.site, self.target.clock.chunk), dict[Hashable, Pair])

    def _remembered(self, who: list[tuple[str, int]]) -> list[Pair] | None:
        """What every site keeps for these rows; None where a row has nothing."""
        memories = [self._memory(site) for site, _ in self.placed]
        if any(name not in memory for memory in memories for name in who):
            return None
        return [_stacked([memory[name] for name in who]) for memory in memories]


def _row(pair: Pair, index: int) -> Pair:
    queries, keys = (None if m is None else m.row(index) for m in pair)
    return queries, keys


def _stacked(pairs: list[Pair]) -> Pair:
    queries, keys = ([m for m in side if m is not None] for side in zip(*pairs, strict=True))
    return Match.stacked(queries) if queries else None, Match.stacked(keys) if keys else None
