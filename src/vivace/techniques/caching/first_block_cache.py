"""First-block cache: skip the rest of the stack when the first block's residual barely moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import Workload
from vivace.models.adapter import BlockCall, Expert, ModelDescription
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Need,
    Paradigm,
    Problem,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    reads,
)

if TYPE_CHECKING:
    import torch

    Streams = tuple[torch.Tensor, torch.Tensor | None]
    Run = Callable[[BlockCall], Streams]

NAME = "first_block_cache"


@dataclass(slots=True, eq=False)
class Row:
    """What one sample of one branch remembers of its last fully computed step.

    `first` (S, C) is what the first block added to the video stream; `rest` (S, C) and `text` (L, C) are what the
    other blocks added to the two streams.
    """

    first: torch.Tensor
    rest: torch.Tensor
    text: torch.Tensor | None
    skips: int = 0


@dataclass(slots=True, eq=False)
class Pass:
    """One evaluation under way: which batch rows run through the whole stack, and where they stood after block 0."""

    who: list[tuple[str, int]]
    run: list[int]
    skip: list[int]
    first: torch.Tensor
    hidden: torch.Tensor
    text: torch.Tensor | None

    @property
    def mixed(self) -> bool:
        return bool(self.run and self.skip)


@dataclass(slots=True, eq=False)
class Memory:
    """State of one expert in one generation: rows by (branch, sample)."""

    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    now: Pass = field(init=False)


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Technique):
    """Run block 0; where its residual is close to the last computed one, add the stored residual of the others.

    With r_t = block_0(h_t) - h_t and R the step last computed in full, a row is skipped when
    mean|r_t - r_R| < threshold * mean|r_R|; its output is then block_0(h_t) + (stack_R - block_0(h_R)).
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.CACHING,
        summary="Skips all blocks but the first on steps where the first block's output change is small.",
        objective="fewer transformer blocks per step",
        stage=Stage.CACHE,
        claims=(exclusive("block.skip"), reads("block.output")),
        needs=(Need.ORDERED_BLOCKS,),
        calibration="optional",
        fidelity=0.25,
        cite=Cite(
            title="First Block Cache (ParaAttention), after TeaCache",
            arxiv="2411.19108",
            code="https://github.com/chengzeyi/ParaAttention",
            differs="decides for every sample and guidance branch, the original once for the whole batch; "
            "state is keyed by the branch that the engine announces; steps at the end can be kept exact, and the "
            "number of skips in a row has a cap",
        ),
    )

    threshold: float = knob(0.08, low=0.0, high=1.0, identity=0.0, monotone="blocks_run")
    """Relative mean absolute change of the first block's residual below which the other blocks are skipped."""
    warmup: int = knob(2, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(1, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(4, low=0, high=50, identity=0)
    """Most skipped steps in a row."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        # With random weights neighbouring steps differ more than a trained model's do.
        return (cls(threshold=1.0, warmup=1), cls())

    def check(self, model: ModelDescription) -> list[Problem]:
        if model.depth < 2:
            return [
                self.problem(
                    "depth", f"needs at least two transformer blocks, and {model.name} has {model.depth}."
                )
            ]
        return []

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            if len(expert.blocks) > 1:
                self._apply(target, expert)

    def _apply(self, target: Target, expert: Expert) -> None:
        def memory() -> Memory:
            return target.store.shared(NAME, "rows", Memory)

        def first(call: BlockCall, run: Run) -> Streams:
            hidden, text = run(call)
            state = memory()
            state.now = self._decide(target, state.rows, hidden - call.hidden, hidden, text)
            return hidden, text

        def middle(call: BlockCall, run: Run) -> Streams:
            return through(memory().now, call, run)

        def last(call: BlockCall, run: Run) -> Streams:
            state = memory()
            out = finish(state.rows, state.now, *through(state.now, call, run))
            del state.now
            return out

        target.around_block(expert.blocks[0], first)
        for block in expert.blocks[1:-1]:
            target.around_block(block, middle)
        target.around_block(expert.blocks[-1], last)

    def _decide(
        self,
        target: Target,
        rows: dict[tuple[str, int], Row],
        first: torch.Tensor,
        hidden: torch.Tensor,
        text: torch.Tensor | None,
    ) -> Pass:
        """Sort the batch rows into those that run and those that reuse. `first` (B, S, C) is block 0's residual."""
        import torch

        clock = target.clock
        who = clock.who(hidden.shape[0])
        skip: list[int] = []
        if self.warmup <= clock.step < clock.num_steps - self.tail:
            free = [
                i for i, name in enumerate(who) if name in rows and rows[name].skips < self.max_consecutive
            ]
            if free:
                changes = torch.stack([relative_change(first[i], rows[who[i]].first) for i in free])
                # The one synchronisation with the device in an evaluation.
                skip = [i for i, c in zip(free, changes.tolist(), strict=True) if c < self.threshold]
        for i in skip:
            rows[who[i]].skips += 1
        if skip and (evaluation := clock.evaluation) is not None:
            target.report(NAME, "hits", evaluation.requested * len(skip) / evaluation.rows)
            evaluation.mark(NAME)
        run = [i for i in range(len(who)) if i not in skip]
        return Pass(who, run, skip, first, hidden, text)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: nothing skipped, or every free step up to the cap of skips in a row."""
        if self.is_identity:
            return base
        head = max(1, self.warmup)
        free = max(0, workload.steps - head - self.tail)
        skipped = (free - free // (self.max_consecutive + 1)) / workload.steps
        share = 1.0 - skipped * (model.depth - 1) / model.depth
        blocks = base.scaled(share, 1.0, fields=("blocks_run", "attention_pairs"))
        # Blocks of two lists cost differently, so of the FLOPs only the computed steps are sure.
        return blocks.scaled(1.0 - skipped, 1.0, fields=("flops",))


def relative_change(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """mean|now - before| / mean|before| as a float32 scalar on the device."""
    import torch

    return (now - before).abs().mean(dtype=torch.float32) / before.abs().mean(dtype=torch.float32)


def through(now: Pass, call: BlockCall, run: Run) -> Streams:
    """A block after the first: rows that run go through it as a smaller batch, the others pass by."""
    import torch

    if not now.run:
        return call.hidden, call.text
    if not now.skip:
        return run(call)
    index = torch.tensor(now.run, device=call.hidden.device)
    hidden, text = run(call.rows(index))
    whole = call.text
    if whole is not None and text is not None:
        whole = whole.index_copy(0, index, text)
    return call.hidden.index_copy(0, index, hidden), whole


def finish(
    rows: dict[tuple[str, int], Row], now: Pass, hidden: torch.Tensor, text: torch.Tensor | None
) -> Streams:
    """After the last block: rows that ran are remembered, rows that passed by get what they remember."""
    import torch

    for i in now.run:
        first, rest = now.first[i], hidden[i] - now.hidden[i]
        # A view would keep the rows of the whole batch in memory beside those remembered from earlier steps.
        first = first.clone() if now.mixed else first
        rows[now.who[i]] = Row(
            first, rest, None if text is None or now.text is None else text[i] - now.text[i]
        )
    if not now.skip:
        return hidden, text
    index = torch.tensor(now.skip, device=hidden.device)
    kept = [rows[now.who[i]] for i in now.skip]
    hidden = hidden.index_add(0, index, torch.stack([k.rest for k in kept]))
    texts = [k.text for k in kept if k.text is not None]
    if text is not None and texts:
        text = text.index_add(0, index, torch.stack(texts))
    return hidden, text
