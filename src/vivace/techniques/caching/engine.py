"""One cache engine: signal -> predictor -> policy -> guard, at the level of the block stack or of the whole network.

A published method is a thin `CacheTechnique` that names its parts. The engine decides for every sample by itself; one
vote (the conditional branch's) holds for all guidance branches of a sample, while what is remembered is kept apart by
branch, expert and chunk. A mask known beforehand costs no synchronisation with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import COND
from vivace.core.errors import ConfigError
from vivace.core.footprint import OUTPUT, STREAM, Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import BlockCall, Expert, ModelDescription, Need, RootCall
from vivace.techniques.base import Estimate, Problem, Target, Technique, knob
from vivace.techniques.caching.memory import STORAGES, Memory
from vivace.techniques.caching.policies import Policy
from vivace.techniques.caching.predictors import Predictor
from vivace.techniques.caching.signals import Moment, Signal, relative_change
from vivace.techniques.caching.votes import Council, quantised

if TYPE_CHECKING:
    import torch

    from vivace.techniques.caching.memory import Value

    Streams = tuple[torch.Tensor, torch.Tensor | None]

STACK, NETWORK = "stack", "network"
QUANTISED_GAIN = 4.0
"""Largest sum of absolute weights of a predictor over values of a quantised network (docs/LOG.md, noise floor)."""


@dataclass(slots=True, eq=False)
class Pass:
    """One evaluation under way: which batch rows run, which reuse, and the streams at the start of the span."""

    moment: Moment
    run: list[int]
    skip: list[int]


@dataclass(frozen=True, kw_only=True)
class CacheTechnique(Technique):
    """Base of the caches. Subclasses say what is skipped and give the parts; see the module."""

    abstract: ClassVar[bool] = True
    span: ClassVar[str] = STACK
    """`stack`: the blocks from `front` up to the last `back`. `network`: the whole transformer call."""
    feature: ClassVar[str] = "residual"
    """What is predicted: `residual` (output minus input of the span) or `output`."""
    coordinate: ClassVar[str] = "step"
    """Where values stand on the trajectory: `step` index or `sigma`."""
    vote: ClassVar[str] = "sample"
    """`sample`: all guidance branches follow the conditional one. `branch`: each decides for itself."""
    watches_drift: ClassVar[bool] = False
    """Compare predictions with what is computed, at computed steps, and report it at the end."""

    warmup: int = knob(2, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(1, low=0, high=50)
    """Steps at the end that are computed in full."""
    max_consecutive: int = knob(4, low=0, high=50, identity=0)
    """Most skipped steps in a row."""
    storage: str = "same"
    """How remembered tensors lie in memory: `same`, `bf16` or `fp8` (e4m3 with one scale for each tensor)."""
    offload: bool = False
    """Keep remembered tensors in the host's memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage not in STORAGES:
            raise ConfigError(
                f"{self.card.name}: storage must be one of {', '.join(STORAGES)}, not {self.storage!r}."
            )

    # -- parts, given by the methods ------------------------------------------------------------------------------

    @property
    def front(self) -> int:
        """Blocks before the span that always run."""
        return 0

    @property
    def back(self) -> int:
        """Blocks after the span that always run."""
        return 0

    def signal(self) -> Signal:
        """What is measured."""
        return Signal()

    def predictor(self) -> Predictor:
        """How skipped values are made."""
        return Predictor()

    def policy(self, target: Target) -> Policy:
        """When to skip."""
        return Policy()

    def head_steps(self, steps: int) -> int:
        """Steps computed at the start."""
        return self.warmup

    def tail_steps(self, steps: int) -> int:
        """Steps computed at the end."""
        return self.tail

    def mask(self, model: ModelDescription, steps: int) -> tuple[bool, ...] | None:
        """True where a step is computed, for methods whose steps are known beforehand; None for the others."""
        return None

    def cache(self, target: Target, expert: Expert) -> Cache:
        """The engine for one expert; methods that look at more than the signal give their own."""
        return Cache(self, target, expert)

    def work_share(self, model: ModelDescription) -> float:
        """Share of the blocks that a skipped step saves."""
        return (model.depth - self.front - self.back) / model.depth

    def weights(self, row: Any, moment: Moment, index: int, at: float, gain: float) -> Iterable[Any]:
        """Weights of a row's remembered values at coordinate `at`; methods that measure them override this."""
        return self.predictor().limited(row.history.nodes, at, gain)

    # -- checks and estimates -------------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        found = []
        if self.span == STACK and Need.ORDERED_BLOCKS in model.offers:
            least = self.front + self.back + 1
            if model.depth < least:
                found.append(
                    self.problem(
                        "depth",
                        f"needs at least {least} transformer blocks, and {model.name} has {model.depth}.",
                    )
                )
        return found

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        if self.is_identity:
            return []
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        free = steps - max(1, self.head_steps(steps)) - self.tail_steps(steps)
        if free > 0:
            return []
        message = (
            f"{self.head_steps(steps)} steps at the start and {self.tail_steps(steps)} at the end are always "
            f"computed, so with {steps} steps nothing can be gained; use more steps, a smaller warmup, or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact for masks known beforehand, else bounds: nothing skipped, or every free step up to the cap."""
        if self.is_identity or not model.experts:
            return base
        steps = workload.steps
        mask = self.mask(model, steps)
        if mask is not None:
            most = sum(not m for m in mask) / steps
            # The first step of a second expert has nothing to reuse.
            least = most if len(model.experts) == 1 else max(0.0, most - len(model.experts) / steps)
        else:
            head, tail = max(1, self.head_steps(steps)), self.tail_steps(steps)
            free = max(0, steps - head - tail)
            most, least = (free - free // (self.max_consecutive + 1)) / steps, 0.0
        if self.span == NETWORK:
            return base.scaled(1.0 - most, 1.0 - least)
        share = self.work_share(model)
        out = base.scaled(1.0 - most * share, 1.0 - least * share, fields=("blocks_run", "attention_pairs"))
        # Blocks of two lists cost differently, so of the FLOPs only the computed steps are sure.
        return out.scaled(1.0 - most, 1.0, fields=("flops",))

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """The predictor's history for every row and expert. What a signal compares with comes on top, uncounted."""
        if self.is_identity or self.offload:
            return base
        what = OUTPUT if self.span == NETWORK else STREAM
        return base.remembering(base.rows * len(model.experts), self.predictor().depth, what, self.storage)

    # -- application ----------------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            cache = self.cache(target, expert)
            if self.span == NETWORK:
                target.around_expert(expert, cache.around_network)
            elif len(expert.blocks) > self.front + self.back:
                self._around_stack(target, expert, cache)

    def _around_stack(self, target: Target, expert: Expert, cache: Cache) -> None:
        last = len(expert.blocks) - self.back - 1
        for block in expert.blocks[: last + 1]:
            if block.index == 0 and self.front:
                target.around_block(block, cache.note_entry)
            elif block.index >= self.front:
                target.around_block(
                    block, cache.span_block(first=block.index == self.front, last=block.index == last)
                )


class Cache:
    """The engine at work on one expert (and, for caches inside blocks, one site)."""

    def __init__(
        self, technique: CacheTechnique, target: Target, expert: Expert, site: Hashable = "span"
    ) -> None:
        self.technique, self.target, self.clock, self.site = technique, target, target.clock, site
        self.name = technique.card.name
        self.policy, self.signal = technique.policy(target), technique.signal()
        self.predictor = technique.predictor()
        self.gain = QUANTISED_GAIN if quantised(expert) else math.inf
        self.council = Council(expert)

    @property
    def memory(self) -> Memory:
        """State of this generation, expert and chunk."""
        return Memory.of(self.target.store, self.name, (self.site, self.clock.chunk))

    @property
    def at(self) -> float:
        """Coordinate of the current step."""
        sigma = self.clock.sigma
        return sigma if self.technique.coordinate == "sigma" and sigma == sigma else float(self.clock.step)

    # -- deciding -------------------------------------------------------------------------------------------------

    def decide(self, moment: Moment) -> Pass:
        """Sort the batch rows into those that run and those that reuse, and note it in the receipt."""
        memory, clock, who = self.memory, self.clock, moment.who
        by_sample = self.technique.vote == "sample"
        keys: list[Hashable] = [name[1] if by_sample else name for name in who]
        voters: dict[Hashable, int] = {}
        for row, (key, name) in enumerate(zip(keys, who, strict=True)):
            if memory.ballot(key).step != clock.step and (key not in voters or name[0] == COND):
                voters[key] = row
        values = self._measure(memory, moment, list(voters.values()))
        for (key, row), value in zip(voters.items(), values, strict=True):
            ballot = memory.ballot(key)
            free = self._free(ballot.skips) and len(memory.row(who[row]).history) > 0
            ballot.reuse = free and self.policy.reuse(ballot, value, clock)
            ballot.step, ballot.value = clock.step, value
            if ballot.reuse:
                ballot.skips += 1
            else:
                ballot.skips = 0
                self.policy.computed(ballot, value, clock)
        skip = [
            row
            for row, (key, name) in enumerate(zip(keys, who, strict=True))
            if memory.ballot(key).reuse and len(memory.row(name).history) > 0
        ]
        run = [row for row in range(len(who)) if row not in skip]
        return Pass(moment, run, skip)

    def _free(self, skips: int) -> bool:
        """The guard: neither warm-up nor tail, and not too many skips in a row."""
        t, clock = self.technique, self.clock
        inside = t.head_steps(clock.num_steps) <= clock.step < clock.num_steps - t.tail_steps(clock.num_steps)
        return inside and skips < t.max_consecutive

    def _measure(self, memory: Memory, moment: Moment, rows: list[int]) -> list[float]:
        if not self.policy.online or not rows:
            return [0.0] * len(rows)
        import torch

        found = torch.stack([self.signal.measure(memory, moment, row).float() for row in rows])
        # The one synchronisation with the device in an evaluation, and none where every row must run anyway.
        if not self._free(0):
            return [math.inf] * len(rows)
        return self.council.agree(found).tolist()

    def mark(self, now: Pass) -> None:
        """Note the skipped rows in the receipt."""
        if now.skip and (evaluation := self.clock.evaluation) is not None:
            self.target.report(
                self.name, "hits", evaluation.requested * len(now.skip) / max(evaluation.rows, 1)
            )
            evaluation.mark(self.name)

    # -- values ---------------------------------------------------------------------------------------------------

    def predict(self, now: Pass, row: int) -> Value:
        """The predicted value of a row."""
        memory = self.memory.row(now.moment.who[row])
        weights = self.technique.weights(memory, now.moment, row, self.at, self.gain)
        return memory.history.combine(list(weights))

    def remember(self, now: Pass, row: int, value: Value, whole: Any) -> None:
        """A row was computed: `value` is what it gave, without a batch axis; `whole` its output of the span."""
        t, memory = self.technique, self.memory
        if len(now.moment.who) > 1 and t.feature == "output":
            # A view would keep the rows of the whole batch in memory.
            value = tuple(None if v is None else v.clone() for v in value)
        row_memory = memory.row(now.moment.who[row])
        if t.watches_drift and len(row_memory.history):
            guess = self.predict(now, row)[0]
            if guess is not None and value[0] is not None:
                memory.drift.append(relative_change(guess, value[0]))
        row_memory.history.push(self.at, value, self.predictor.depth, t.storage, t.offload, memory.form)
        self._after(now, row, whole, computed=True)

    def _after(self, now: Pass, row: int, whole: Any, computed: bool) -> None:
        if self.policy.online:
            self.signal.after(self.memory, now.moment, row, whole, computed)

    def close_step(self) -> None:
        """At the end of the last evaluation: read what was noted on the device."""
        memory = self.memory
        if self.clock.last and memory.drift:
            import torch

            self.target.report(self.name, "drift_sum", float(torch.stack(memory.drift).sum()))
            self.target.report(self.name, "drift_count", len(memory.drift))
            memory.drift.clear()

    # -- the block stack ------------------------------------------------------------------------------------------

    def note_entry(self, call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
        """Around block 0, when front blocks lie before the span."""
        self.memory.now = (call.hidden, call.text)
        return run(call)

    def span_block(self, *, first: bool, last: bool) -> Callable[..., Streams]:
        """Handler of a block of the span."""

        def handler(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            memory = self.memory
            if first:
                entry, text_entry = memory.now if self.technique.front else (call.hidden, call.text)
                memory.now = self.decide(
                    Moment(
                        self.clock.who(call.hidden.shape[0]),
                        call.hidden,
                        entry,
                        call.time,
                        call.text,
                        text_entry,
                        self.clock,
                    )
                )
                self.mark(memory.now)
            now: Pass = memory.now
            hidden, text = through(now, call, run)
            if last:
                memory.now = None
                hidden, text = self._finish(now, hidden, text)
                self.close_step()
            return hidden, text

        return handler

    def _finish(self, now: Pass, hidden: torch.Tensor, text: torch.Tensor | None) -> Streams:
        """After the span: rows that ran are remembered, the others get what is predicted."""
        import torch

        residual = self.technique.feature == "residual"
        start, start_text = now.moment.hidden, now.moment.text
        for i in now.run:
            new_text = None if text is None else text[i]
            value: Value = (hidden[i], new_text)
            if residual:
                change = (
                    None
                    if new_text is None or start_text is None or text is None
                    else text[i] - start_text[i]
                )
                value = (hidden[i] - start[i], change)
            self.remember(now, i, value, hidden[i])
        if not now.skip:
            return hidden, text
        made = [self.predict(now, i) for i in now.skip]
        index = torch.tensor(now.skip, device=hidden.device)

        def put(stream: torch.Tensor, values: list[Any]) -> torch.Tensor:
            whole = values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
            whole = whole.to(stream.dtype)
            if len(now.skip) == stream.shape[0]:
                return stream + whole if residual else whole
            return (stream.index_add if residual else stream.index_copy)(0, index, whole)

        hidden = put(hidden, [m[0] for m in made])
        if text is not None and all(m[1] is not None for m in made):
            text = put(text, [m[1] for m in made])
        for i in now.skip:
            self._after(now, i, hidden[i], computed=False)
        return hidden, text

    # -- the whole network ----------------------------------------------------------------------------------------

    def around_network(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Handler of a transformer call."""
        import torch

        latents = call.values["hidden_states"]
        time = call.values.get("timestep")
        moment = Moment(self.clock.who(call.rows), latents, latents, time, clock=self.clock)
        now = self.decide(moment)
        self.mark(now)
        residual = self.technique.feature == "residual"
        parts: dict[int, torch.Tensor] = {}
        if now.run:
            whole = not now.skip
            branches = {moment.who[i][0] for i in now.run}
            if not whole and len(branches) == 1:
                samples = [moment.who[i][1] for i in now.run]
                with self.clock.narrowed(branches.pop(), samples):
                    sample = run(call.rows_at(now.run))
            else:
                sample = run(call if whole else call.rows_at(now.run))
            for j, i in enumerate(now.run):
                self.remember(
                    now,
                    i,
                    (sample[j] - beginning(latents[i], sample[j]) if residual else sample[j],),
                    sample[j],
                )
                parts[i] = sample[j]
            if whole:
                self.close_step()
                return sample
        for i in now.skip:
            (value,) = self.predict(now, i)
            assert value is not None
            parts[i] = beginning(latents[i], value) + value if residual else value
            self._after(now, i, parts[i], computed=False)
        self.close_step()
        return torch.stack([parts[i] for i in range(call.rows)])


def beginning(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The part of a transformer's input that its output has the shape of: conditioning channels come last."""
    if latents.shape == output.shape:
        return latents
    return latents[tuple(slice(n) for n in output.shape)]


def through(now: Pass, call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
    """A block of the span: rows that run go through it as a smaller batch, the others pass by."""
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


def even_mask(steps: int, every: int, head: int, tail: int) -> tuple[bool, ...]:
    """True at the computed steps of an interval policy: `head` and `tail` in full, between them every `every`-th."""
    mask, since = [], 0
    for step in range(steps):
        computed = step < max(1, head) or step >= steps - tail or since + 1 >= every
        mask.append(computed)
        since = 0 if computed else since + 1
    return tuple(mask)
