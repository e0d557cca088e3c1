"""Token skipping (Astraea): often only some tokens go through the blocks; the others repeat their last change."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import Block, BlockCall, Expert, ModelDescription, Need, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
)
from vivace.techniques.compression.reduction import KINDS, known_rows, own_backend, shortened

if TYPE_CHECKING:
    import torch

    Streams = tuple[torch.Tensor, torch.Tensor | None]

NAME = "token_skip"


@dataclass(slots=True, eq=False)
class Row:
    """Memory of one (branch, sample): of every token its input and its change at the last time it was computed.

    Attributes:
        given, change: (S, C). age: float32 (S,), steps since then.
    """

    given: torch.Tensor
    change: torch.Tensor
    age: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TokenSkip(Technique):
    """On a skipping step the `budget` of the video tokens with the highest scores goes through all blocks.

    The score of a token is ||x - x'|| / mean ||x - x'|| + `ageing` a, with x its input to the first block, x' that of
    the last time it was computed, and a the steps since. Tokens that are left out are seen by nobody in attention, and
    their output is their input plus what the block stack added to them the last time. Text is always computed.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Runs the blocks on the tokens that changed most; the others repeat what the blocks last added.",
        objective="fewer tokens through the blocks on most steps",
        stage=Stage.TOKENS,
        claims=(
            exclusive("tokens.set"),
            exclusive("attention.kernel"),
            exclusive("block.skip"),
            exclusive("block.output"),
            exclusive("step.skip"),
        ),
        needs=(Need.ORDERED_BLOCKS, Need.ATTENTION_SITES, Need.TOKEN_GRID),
        cite=Cite(
            title="Astraea: A Token-wise Acceleration Framework for Video Diffusion Transformers",
            arxiv="2506.05096",
            differs="the budget is the same for all skipping steps, where the paper searches one for each; tokens are "
            "scored by the change of their input and not by attention; every few steps all tokens are computed",
        ),
    )

    dry: ClassVar[bool] = True

    budget: float = knob(0.5, low=0.05, high=1.0, identity=1.0)
    """Share of the video tokens that is computed on a skipping step."""
    interval: int = knob(3, low=2, high=16)
    """Every so-manieth step computes all tokens."""
    ageing: float = knob(0.25, low=0.0, high=4.0)
    """Weight of a token's age in steps beside a mean change of one."""
    warmup: int = knob(2, low=1, high=50)
    """First steps with all tokens."""
    tail: int = knob(1, low=0, high=50)
    """Last steps with all tokens."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(warmup=1), cls(budget=0.3, interval=4, warmup=1, tail=0, ageing=1.0))

    def skips(self, step: int, steps: int) -> bool:
        """Whether a step computes some tokens only."""
        inside = self.warmup <= step < steps - self.tail
        return inside and (step - self.warmup + 1) % self.interval != 0

    def computed(self, tokens: int) -> int:
        """How many of so many tokens are computed."""
        return min(tokens, max(1, int(self.budget * tokens + 0.5)))

    # -- before anything is loaded --------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        if "ImageToVideo" not in model.pipeline_class:
            return []
        message = (
            "tokens of the given picture have a place of their own in its sequence; use it for text-to-video."
        )
        return [self.problem("condition", f"{model.name} cannot leave out tokens: {message}")]

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        if self.is_identity or self.warmup >= steps or any(self.skips(i, steps) for i in range(steps)):
            return []
        message = (
            f"with {steps} steps, {self.warmup} at the start and {self.tail} at the end with all tokens, no token is "
            "ever left out; use more steps, a smaller warmup or tail, or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: text that is attended to with the video costs the same, and its share is not known here."""
        grid = model.grid(workload)
        if grid is None or self.is_identity or not workload.steps:
            return base
        skipping = sum(self.skips(i, workload.steps) for i in range(workload.steps)) / workload.steps
        # The first step of a second expert has nothing to repeat.
        least = max(0.0, skipping - (len(model.experts) - 1) / workload.steps)
        share = self.computed(grid.video) / grid.video
        out = base.scaled(1 - skipping * (1 - share**2), 1 - least * (1 - share), fields=("attention_pairs",))
        if model.adapter is not None and model.adapter.joint_text:
            # Text among itself stays whole.
            whole = (self.computed(grid.video) + workload.text) / (grid.video + workload.text)
            out = base.scaled(
                1 - skipping * (1 - share**2), 1 - least * (1 - whole**2), fields=("attention_pairs",)
            )
        return out.scaled(1 - skipping * (1 - share**2), 1.0, fields=("flops",))

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            Skipper(self, target, expert).install()


class Shortened:
    """What attention must know of the tokens that are there; `keep` (B, k) is None where all are."""

    def __init__(self) -> None:
        self.keep: torch.Tensor | None = None
        self.tokens = 0
        self.text_first = False


class ShortenedAttention:
    """The model's own attention; its mask follows the tokens that are there."""

    def __init__(self, seat: Shortened, backend: Any) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._seat, self._dispatch, self._backend = seat, dispatch_attention_fn, backend

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        seat = self._seat
        if seat.keep is not None and mask is not None:
            mask = shortened(mask, seat.keep, seat.tokens, seat.text_first)
        return self._dispatch(q, k, v, attn_mask=mask, backend=self._backend)


class Skipper:
    """Token skipping at work on one expert."""

    def __init__(self, technique: TokenSkip, target: Target, expert: Expert) -> None:
        self.technique, self.target, self.expert, self.clock = technique, target, expert, target.clock
        self.seat = Shortened()
        self.grid: TokenGrid | None = None
        self.who: list[tuple[str, int]] = []
        self.skipping = False
        self.entry: torch.Tensor | None = None
        self.rotary: Any = None

    @property
    def memory(self) -> dict[Hashable, Row]:
        """Of this expert's rows in this generation."""
        return self.target.store.shared(NAME, ("stack", self.clock.chunk), dict[Hashable, Row])

    def install(self) -> None:
        """Lay the handlers around the expert and its blocks."""
        target = self.target
        for site in self.expert.attentions:
            if site.kind in KINDS:
                target.set_kernel(site, ShortenedAttention(self.seat, own_backend(site)))
        target.around_expert(self.expert, self.around_expert)
        for block in self.expert.blocks:
            target.around_block(block, self._around_block(block))

    def around_expert(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Decide whether this evaluation leaves tokens out."""
        clock, adapter = self.clock, self.target.adapter
        evaluation, who = clock.evaluation, known_rows(self.target, call.rows)
        assert evaluation is not None  # handlers are called inside an evaluation only
        assert adapter is not None
        if who is None:
            return run(call)
        # The grid of what reaches the network, which need not be what the pipeline asked for.
        self.grid, self.who = adapter.grid_of_call(self.expert.config, call.values), who
        tokens, memory = self.grid.video, self.memory
        kept = self.technique.computed(tokens)
        self.skipping = (
            kept < tokens
            and self.technique.skips(clock.step, clock.num_steps)
            and all(name in memory and memory[name].age.shape[0] == tokens for name in who)
        )
        if self.skipping:
            evaluation.variant += (NAME,)
            evaluation.lengths = {kept: tokens, kept + self.grid.text: tokens + self.grid.text}
            evaluation.mark(NAME)
            self.target.report(NAME, "tokens_left_out", (tokens - kept) * call.rows)
        try:
            return run(call)
        finally:
            evaluation.lengths = {}
            self.grid = self.entry = self.rotary = self.seat.keep = None
            self.skipping = False

    def _around_block(self, block: Block) -> Callable[..., Streams]:
        first, last = block.index == 0, block.index == len(self.expert.blocks) - 1

        def handler(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            if self.grid is None:
                return run(call)
            if first:
                if call.hidden.shape[:2] != (len(self.who), self.grid.video):
                    self.grid = None
                    return run(call)
                self.entry = call.hidden
                if self.skipping:
                    self._choose(call)
            hidden, text = run(self._short(call, first) if self.skipping else call)
            if last:
                hidden = self._finish(hidden)
            return hidden, text

        return handler

    def _choose(self, call: BlockCall) -> None:
        """The tokens with the highest scores, in their order."""
        import torch

        from vivace.models.attention_parts import rotary_at

        assert self.grid is not None
        rows = [self.memory[name] for name in self.who]
        change = (call.hidden - torch.stack([row.given for row in rows])).float().norm(dim=2)
        scores = change / change.mean(dim=1, keepdim=True).clamp_min(1e-12)
        scores = scores + self.technique.ageing * (torch.stack([row.age for row in rows]) + 1.0)
        count = self.technique.computed(self.grid.video)
        keep = scores.topk(count, dim=1).indices.sort(dim=1).values
        self.seat.keep, self.seat.tokens, self.seat.text_first = keep, self.grid.video, self.grid.text_first
        factors = call.values.get(call.layout.rotary)
        self.rotary = None if factors is None else tuple(rotary_at(f, keep) for f in factors)

    def _short(self, call: BlockCall, first: bool) -> BlockCall:
        """The call for the chosen tokens; from the second block on the video stream is short already."""
        assert self.seat.keep is not None
        values, layout, keep = dict(call.values), call.layout, self.seat.keep
        if first:
            values[layout.hidden] = _chosen(call.hidden, keep)
        # Blocks of two lists may name the factors differently, and have no more of one kind than of the other.
        if self.rotary is not None and layout.rotary in values:
            values[layout.rotary] = self.rotary
        if (time := call.time) is not None and time.ndim > 2 and time.shape[1] == self.seat.tokens:
            values[layout.time] = _chosen(time, keep)
        return BlockCall(layout, values, call.signature)

    def _finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """After the last block: remember what was computed, and give the others their last change."""
        import torch

        entry, memory, keep = self.entry, self.memory, self.seat.keep
        assert entry is not None
        if keep is None:
            for i, name in enumerate(self.who):
                age = torch.zeros(entry.shape[1], device=entry.device)
                memory[name] = Row(entry[i].clone(), hidden[i] - entry[i], age)
            return hidden
        out = []
        for i, name in enumerate(self.who):
            row, index = memory[name], keep[i]
            given = entry[i].index_select(0, index)
            change = row.change.index_copy(0, index, hidden[i] - given)
            age = (row.age + 1.0).index_fill(0, index, 0.0)
            memory[name] = Row(row.given.index_copy(0, index, given), change, age)
            # What was computed is passed on as it is, not as input and change, which rounds.
            out.append((entry[i] + change).index_copy(0, index, hidden[i]))
        return torch.stack(out)


def _chosen(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Tokens of (B, S, ...), chosen for every row by (B, k)."""
    index = keep.view(*keep.shape, *([1] * (x.ndim - 2))).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
