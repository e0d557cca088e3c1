"""Token merging (ToMe): similar video tokens go through a block's modules as one, and all get its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import (
    AttentionSite,
    Block,
    BlockCall,
    Expert,
    FeedForwardSite,
    ModelDescription,
    Need,
    RootCall,
)
from vivace.techniques.base import (
    Card,
    Cite,
    Claim,
    Estimate,
    Paradigm,
    Stage,
    Target,
    exclusive,
    knob,
    shared,
)
from vivace.techniques.compression.reduction import (
    KINDS,
    MatchedReduction,
    Recall,
    key_weights,
    known_rows,
    own_backend,
    shortened,
    weighted,
)
from vivace.techniques.compression.token_matching import Match, Windows, match, merged, restored

if TYPE_CHECKING:
    import torch

    Streams = tuple[torch.Tensor, torch.Tensor | None]

NAME = "token_merging"
PARTS = {"attention": ("self",), "attention+ffn": ("self", "ffn"), "all": ("self", "cross", "ffn")}
"""Setting -> kinds of modules that run on fewer tokens."""
_KINDS = {"self": "self", "joint": "self", "cross": "cross", "ffn": "ffn"}


@dataclass(frozen=True, kw_only=True)
class TokenMerging(MatchedReduction):
    """In every block the `ratio` of the video tokens that resemble a destination of their window most merge with it.

    x_d' = (x_d + sum of its sources) / n_d before a module, and a copy of its output for each of the n_d tokens after
    it; residual streams keep all tokens. Merged tokens have the rotary position of their destination. With
    `proportional`, log n_d is added to the attention scores of a key that stands for n_d tokens.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Merges the most similar video tokens before a module and copies its result back after it.",
        objective="fewer tokens in attention, and in feed-forward where wanted",
        stage=Stage.TOKENS,
        claims=(
            exclusive("tokens.set"),
            exclusive("attention.kernel"),
            exclusive("block.skip"),
            shared("module.output"),
        ),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES, Need.TOKEN_GRID),
        fidelity=0.6,
        cite=Cite(
            title="Token Merging for Fast Stable Diffusion; VidToMe: Video Token Merging for Zero-Shot Video Editing",
            arxiv="2303.17604, 2312.10656",
            code="https://github.com/dbolya/tomesd",
            differs="matching stays inside windows of the (frames, height, width) grid, which makes its cost linear; "
            "destinations stand on a regular stride and not at random places; text tokens of joint attention are "
            "never merged; no global tokens are carried from chunk to chunk, as all frames are in one sequence",
        ),
    )

    ratio: float = knob(0.25, low=0.0, high=0.875, identity=0.0, monotone="attention_pairs")
    """Share of the video tokens that are merged into others; sources are all that can be."""
    parts: str = knob("attention", choices=tuple(PARTS))
    """Modules that run on fewer tokens: self-attention, feed-forward too, or cross-attention too."""
    scope: str = knob("block", choices=("block", "step"))
    """Whether every block matches its own input, or the first touched one for all."""
    proportional: bool = False
    """Keys that stand for several tokens get the weight of so many."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        small: dict[str, Any] = {"window_frames": 3, "window_height": 4, "window_width": 4}
        return (
            cls(ratio=0.4, parts="attention+ffn", **small),
            cls(ratio=0.3, parts="all", scope="step", every=2, proportional=True, dense_steps=1, tail=1),
        )

    @property
    def remembers(self) -> bool:
        return self.every > 1 or self.scope == "step"

    @property
    def rates(self) -> dict[str, float]:
        return {"ratio": self.ratio}

    # -- before anything is loaded --------------------------------------------------------------------------------

    def claims(self, model: ModelDescription) -> tuple[Claim, ...]:
        return (*super().claims(model), shared("module.output"))

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact pairs where text is as long on all branches; FLOPs within bounds where feed-forwards are merged."""
        grid, adapter = model.grid(workload), model.adapter
        if grid is None or adapter is None:
            return base
        expert, windows, kinds = model.experts[0], self.windows(grid), list(adapter.attention.values())
        count, share = self.gone(windows, self.ratio), self.layers(expert.depth) / max(expert.depth, 1)
        runs, channels = self.evaluations(workload, base.nfe[0]), expert.heads * expert.head_dim
        sites, tokens = runs * self.layers(expert.depth), grid.video
        whole, joint = base.nfe[0] * workload.batch * expert.depth, sum(k in KINDS for k in kinds)

        def pairs(text: int, kept: int) -> float:
            return float(joint * expert.heads) * (kept + text) ** 2

        part, ends = PARTS[self.parts], []
        acting = runs / max(base.nfe[0] * workload.batch, 1) * share
        for text, end in zip(sorted(self.texts(model, workload), reverse=True), (0, 1), strict=True):
            saved = sites * (pairs(text, tokens) - pairs(text, tokens - count))
            projected = 8.0 * channels**2 * count * joint * sites
            if "cross" in part and "cross" in kinds:
                crossed = base.attention_pairs[end] - whole * pairs(text, tokens)
                saved += crossed * acting * count / tokens
                projected += 4.0 * channels**2 * count * sites
            ends.append((base.attention_pairs[end] - saved, saved, projected))
        one = windows.flops(channels)
        matched = [n * one * (self.layers(expert.depth) if self.scope == "block" else 1)
                   for n in self.matchings(model, workload, base.nfe[0])]  # fmt: skip
        # Every module that takes fewer tokens sums them once; a block need not have one of every kind.
        merges = [runs * self.layers(expert.depth) * one * n for n in (joint, joint + len(part) - 1)]
        flops = []
        for end, (_, saved, projected) in enumerate(ends):
            left = base.flops[end] - 4.0 * expert.head_dim * saved - projected
            if end == 0 and "ffn" in part:
                rest = base.flops[0] - 4.0 * expert.head_dim * base.attention_pairs[0]
                left -= max(0.0, rest - 8.0 * channels**2 * tokens * joint * whole) * acting * count / tokens
            flops.append(left + matched[end] + merges[end])
        return Estimate(base.nfe, base.blocks_run, (ends[0][0], ends[1][0]), (flops[0], flops[1]))

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            Merger(self, target, expert).install()


class MergedModules:
    """What the modules of one block do in the evaluation under way; free of tensors between evaluations."""

    def __init__(self) -> None:
        self.windows: Windows | None = None
        self.found: Match | None = None
        self.rotary: Any = None
        self.bias: torch.Tensor | None = None
        self.text_first = False

    def clear(self) -> None:
        """All tokens again, and nothing is held."""
        self.windows = self.found = self.rotary = self.bias = None

    def shorten(self, x: torch.Tensor) -> torch.Tensor:
        """Merge the video tokens of (B, S [+ L], C); text beside them stays."""
        import torch

        assert self.found is not None
        assert self.windows is not None
        tokens = self.windows.tokens
        if x.shape[1] == tokens:
            return merged(x, self.found, self.windows)
        text = x.shape[1] - tokens
        if self.text_first:
            return torch.cat([x[:, :text], merged(x[:, text:], self.found, self.windows)], dim=1)
        return torch.cat([merged(x[:, :tokens], self.found, self.windows), x[:, tokens:]], dim=1)

    def restore(self, x: torch.Tensor, text: int) -> torch.Tensor:
        """Inverse shape of `shorten`; `text` tokens stand beside the video's."""
        import torch

        assert self.found is not None
        if not text:
            return restored(x, self.found)
        if self.text_first:
            return torch.cat([x[:, :text], restored(x[:, text:], self.found)], dim=1)
        return torch.cat([restored(x[:, :-text], self.found), x[:, -text:]], dim=1)


class MergedAttention:
    """The model's own attention, with the weight of merged keys where wanted."""

    def __init__(self, seat: MergedModules, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._seat, self._dispatch, self._backend = seat, dispatch_attention_fn, backend

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        seat = self._seat
        if seat.found is not None and seat.windows is not None:
            if mask is not None:
                mask = shortened(mask, seat.found.keep, seat.windows.tokens, seat.text_first)
            if seat.bias is not None:
                mask = weighted(mask, seat.bias, q.dtype)
        return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)


class Merger:
    """Token merging at work on one expert."""

    def __init__(self, technique: TokenMerging, target: Target, expert: Expert) -> None:
        self.technique, self.target, self.expert = technique, target, expert
        self.recall = Recall(technique, target)
        self.built: dict[tuple[TokenGrid, Any], Windows] = {}
        self.now: tuple[TokenGrid, Windows, list[tuple[str, int]] | None] | None = None
        self.seats = {b.index: MergedModules() for b in expert.blocks if b.index >= technique.dense_layers}
        self.modules: dict[int, int] = dict.fromkeys(self.seats, 0)

    def install(self) -> None:
        """Lay the handlers around the expert, its blocks, and the modules that take fewer tokens."""
        target, kinds = self.target, PARTS[self.technique.parts]
        assert target.adapter is not None  # without one there are no sites
        sites: list[AttentionSite | FeedForwardSite] = [*self.expert.attentions, *self.expert.feed_forwards]
        for site in sites:
            if site.index not in self.seats or _KINDS.get(site.kind) not in kinds:
                continue
            seat, self.modules[site.index] = self.seats[site.index], self.modules[site.index] + 1
            if isinstance(site, AttentionSite) and site.kind in KINDS:
                kernel = MergedAttention(seat, own_backend(site))
                target.set_kernel(site, kernel)
                place = _place(site.module, target.adapter.rotary)
                target.edit.wrap(site.module, lambda old, s=seat, p=place: _attention(old, s, *p))
            else:
                target.edit.wrap(site.module, lambda old, s=seat: _tokenwise(old, s))
        if self.seats:
            target.around_expert(self.expert, self.around_expert)
        for block in self.expert.blocks:
            if block.index in self.seats:
                target.around_block(block, self._around_block(block, self.seats[block.index]))

    def around_expert(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Decide whether this evaluation merges, and on which grid."""
        clock, t = self.target.clock, self.technique
        evaluation, adapter = clock.evaluation, self.target.adapter
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
        if not t.gone(windows, t.ratio):
            return run(call)
        evaluation.mark(NAME)
        self.now = (grid, windows, known_rows(self.target, call.rows))
        try:
            return run(call)
        finally:
            self.now = None

    def _around_block(self, block: Block, seat: MergedModules) -> Callable[..., Streams]:
        t, target = self.technique, self.target

        def handler(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            if self.now is None or call.hidden.shape[1] != self.now[1].tokens:
                return run(call)
            (grid, windows, who), hidden = self.now, call.hidden
            count, rows = t.gone(windows, t.ratio), hidden.shape[0]
            who = who if who is not None and len(who) == rows else None
            found, fresh = self.recall.find(
                block.site if t.scope == "block" else "step", who, hidden, lambda x: match(x, windows, count)
            )
            target.spent(windows.flops(hidden.shape[2]) * (fresh + rows * self.modules[block.index]))
            target.report(NAME, "tokens_merged", count * rows)
            evaluation = target.clock.evaluation
            assert evaluation is not None
            text = grid.text
            short = windows.tokens - count
            try:
                seat.windows, seat.found, seat.text_first = windows, found, grid.text_first
                seat.rotary = _rotary(call.values.get(call.layout.rotary), found.keep)
                seat.bias = key_weights(found, text, grid.text_first) if t.proportional else None
                evaluation.lengths = {short: windows.tokens, short + text: windows.tokens + text}
                return run(call)
            finally:
                seat.clear()
                evaluation.lengths = {}

        return handler


def _rotary(factors: Any, keep: torch.Tensor) -> Any:
    from vivace.models.attention_parts import rotary_at

    return None if factors is None else tuple(rotary_at(f, keep) for f in factors)


def _place(module: Any, name: str) -> tuple[str, int]:
    """Name of the rotary argument of a module's forward, and its place; a place past all where it goes by name only."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return name, parameters.index(name) if name in parameters else len(parameters)


def _attention(old: Callable[..., Any], seat: MergedModules, name: str, place: int) -> Callable[..., Any]:
    """Attention on merged tokens; the first argument and the first result are the video's."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if seat.found is None:
            return old(*args, **kwargs)
        args, kwargs = _shorter(seat, args, kwargs)
        if seat.rotary is not None:
            if name in kwargs:
                kwargs[name] = seat.rotary
            elif len(args) > place:
                args = (*args[:place], seat.rotary, *args[place + 1 :])
        out = old(*args, **kwargs)
        return (seat.restore(out[0], 0), *out[1:]) if isinstance(out, tuple) else seat.restore(out, 0)

    return forward


def _tokenwise(old: Callable[..., Any], seat: MergedModules) -> Callable[..., Any]:
    """A module that takes every token by itself (feed-forward, cross-attention)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if seat.found is None or seat.windows is None or given < seat.windows.tokens:
            return old(*args, **kwargs)
        args, kwargs = _shorter(seat, args, kwargs)
        return seat.restore(old(*args, **kwargs), given - seat.windows.tokens)

    return forward


def _shorter(
    seat: MergedModules, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (seat.shorten(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": seat.shorten(kwargs["hidden_states"])}
