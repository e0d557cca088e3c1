"""Caches inside the blocks: outputs of attention and feed-forward modules, reused or predicted at known steps.

Which steps are computed follows from the clock alone (a mask for each kind of module), so nothing is measured, nothing
waits for the device, and all rows of a batch decide alike. Values are remembered by site and by row (branch, sample).

Around every cached module lies a `Seat`, a plain object that says what to do. It is set outside the block bodies, so a
compiled body reads a flag and a tensor and compiles once for each combination of kinds that are reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vivace.core.context import Clock
from vivace.core.errors import ConfigError
from vivace.core.footprint import STREAM, Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import (
    AttentionSite,
    BlockCall,
    Expert,
    FeedForwardSite,
    ModelDescription,
    RootCall,
)
from vivace.techniques.base import Estimate, Problem, Target, Technique, exclusive, knob, reads, shared
from vivace.techniques.caching.engine import QUANTISED_GAIN
from vivace.techniques.caching.memory import STORAGES, Memory
from vivace.techniques.caching.predictors import Predictor
from vivace.techniques.caching.votes import quantised

if TYPE_CHECKING:
    import torch

    from vivace.techniques.caching.memory import RowName, Value

    Streams = tuple[torch.Tensor, torch.Tensor | None]

SELF, CROSS, FFN = "self", "cross", "ffn"
KINDS = {"self": SELF, "joint": SELF, "cross": CROSS, "ffn": FFN, "text.ffn": FFN}
"""Kind of a site -> kind that a mask is for."""
CLAIMS = (
    exclusive("block.output"),
    shared("module.output"),
    exclusive("block.skip"),
    exclusive("step.skip"),
    reads("attention.kernel"),
    reads("linear.weight"),
)
"""Of a module cache: whoever skips blocks or steps for some samples only would hand the modules other rows."""


class Seat:
    """What a cached module does in the evaluation under way. Free between evaluations: it holds no tensors then."""

    def __init__(self, site: AttentionSite | FeedForwardSite) -> None:
        self.site, self.block, self.kind = site.site, site.index, KINDS[site.kind]
        self.keep = self.reuse = False
        self.given: Any = None
        self.kept: Any = None

    def call(self, old: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward; traced when blocks are compiled, so it branches on flags only."""
        if self.reuse:
            return self.given
        out = old(*args, **kwargs)
        if self.keep:
            self.kept = out
        return out

    def clear(self) -> None:
        """Let go of everything."""
        self.keep = self.reuse = False
        self.given = self.kept = None


@dataclass(slots=True, eq=False)
class Turn:
    """One evaluation: its rows, and the kinds that are reused in it."""

    who: list[RowName]
    reused: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class ModuleCache(Technique):
    """Base of the caches inside blocks. A subclass says which kinds are cached and which steps compute them."""

    abstract: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (SELF, CROSS, FFN)
    """Kinds of modules that are cached."""
    surely: ClassVar[bool] = True
    """Whether `mask` without timesteps is what happens."""

    warmup: int = knob(2, low=0, high=50)
    """Steps at the start that are computed in full."""
    tail: int = knob(1, low=0, high=50)
    """Steps at the end that are computed in full."""
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

    def mask(self, kind: str, steps: int, timesteps: tuple[float, ...] = ()) -> tuple[bool, ...]:
        """True where modules of a kind are computed; without timesteps the most that could be reused."""
        return (True,) * steps

    def predictor(self, clock: Clock) -> Predictor:
        """How reused values are made."""
        return Predictor()

    def seat(self, site: AttentionSite | FeedForwardSite) -> Seat:
        """The seat of a site."""
        return Seat(site)

    def prepare(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        """More to set before a module of a reused kind is called."""

    def after(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        """More to remember after a module of a reused kind was called."""

    def computed(self, target: Target, seat: Seat, turn: Turn, memory: Memory) -> None:
        """A module was computed; `seat.kept` is its output, and the memory still holds the ones before."""

    def shade(self, clock: Clock) -> tuple[str, ...]:
        """What else the cost of a reusing evaluation depends on."""
        return ()

    # -- before anything is loaded --------------------------------------------------------------------------------

    def check_beside(self, model: ModelDescription, others: tuple[Technique, ...]) -> list[Problem]:
        steps = next((s for o in others if isinstance(s := getattr(o, "steps", None), int)), None)
        steps = steps or model.workload().steps
        if self.is_identity or not all(all(self.mask(k, steps)) for k in self.kinds):
            return []
        message = (
            f"with {steps} steps, {self.warmup} at the start and {self.tail} at the end always computed, no module is "
            "ever reused; use more steps, a smaller warmup or tail, or leave it out."
        )
        return [self.problem("pointless", message, "warning")]

    def reused_share(self, kind: str, steps: int) -> float:
        """Largest share of a kind's work that is left out."""
        return sum(not computed for computed in self.mask(kind, steps)) / max(steps, 1)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Bounds: of what the modules cost nothing is known here, except that attention pairs are all of attention."""
        if self.is_identity or model.adapter is None:
            return base
        present = {KINDS[k] for k in model.adapter.attention.values()}
        shares = {k: self.reused_share(k, workload.steps) if k in self.kinds else 0.0 for k in present}
        least = min(shares.values()) if self.surely and len(model.experts) == 1 else 0.0
        out = base.scaled(1.0 - max(shares.values()), 1.0 - least, fields=("attention_pairs",))
        most = max(self.reused_share(k, workload.steps) for k in self.kinds)
        return out.scaled(1.0 - most, 1.0, fields=("flops",))

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        """The predictor's history of every cached module, which gives something of the size of its block's streams."""
        if self.is_identity or self.offload or model.adapter is None:
            return base
        found = [*model.adapter.attention.values(), *model.adapter.feed_forward.values()]
        modules = sum(KINDS[kind] in self.kinds for kind in found)
        depth = self.predictor(Clock()).depth
        blocks = sum(e.depth for e in model.experts)
        return base.remembering(base.rows * modules * blocks, depth, STREAM, self.storage)

    # -- on a live pipeline ---------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        for expert in target.experts:
            ModuleEngine(self, target, expert).install()


class ModuleEngine:
    """A module cache at work on one expert."""

    def __init__(self, technique: ModuleCache, target: Target, expert: Expert) -> None:
        self.technique, self.target, self.expert, self.clock = technique, target, expert, target.clock
        self.name = technique.card.name
        self.seats: dict[int, list[Seat]] = {}
        self.gain = QUANTISED_GAIN if quantised(expert) else float("inf")
        self.turn: Turn | None = None

    def install(self) -> None:
        """Lay the handlers around the expert, its blocks, and the modules of the cached kinds."""
        target, sites = self.target, [*self.expert.attentions, *self.expert.feed_forwards]
        for site in sites:
            if KINDS[site.kind] in self.technique.kinds:
                seat = self.technique.seat(site)
                self.seats.setdefault(site.index, []).append(seat)
                target.edit.wrap(site.module, lambda old, s=seat: _seated(old, s))
        if self.seats:
            target.around_expert(self.expert, self.around_expert)
        for block in self.expert.blocks:
            if seats := self.seats.get(block.index):
                target.around_block(block, self._around_block(seats))

    def memory(self, seat: Seat) -> Memory:
        """What is remembered of a site in this generation."""
        return Memory.of(self.target.store, self.name, (seat.site, self.clock.chunk))

    def around_expert(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Decide what is reused in this evaluation."""
        evaluation, clock = self.clock.evaluation, self.clock
        assert evaluation is not None  # handlers are called inside an evaluation only
        asked = evaluation.rows if clock.branch == evaluation.branch else evaluation.rows // 2
        if call.rows != asked:
            # Only some of the samples: the clock cannot name them, so nothing is touched.
            return run(call)
        who = clock.who(call.rows)
        reused = frozenset(k for k in self.technique.kinds if self._reuses(k, who))
        if reused:
            evaluation.variant += (f"{self.name}: {', '.join(sorted(reused))}", *self.technique.shade(clock))
            evaluation.mark(self.name)
            # Half of a fused pair is one evaluation.
            requested = evaluation.requested * len(who) / max(evaluation.rows, 1)
            self.target.report(self.name, "hits", requested)
        self.turn = Turn(who, reused)
        try:
            return run(call)
        finally:
            self.turn = None

    def _reuses(self, kind: str, who: list[RowName]) -> bool:
        """Whether this step reuses, and there is something to reuse for every row."""
        clock = self.clock
        if self.technique.mask(kind, clock.num_steps, clock.timesteps)[clock.step]:
            return False
        seats = [s for group in self.seats.values() for s in group if s.kind == kind]
        return bool(seats) and all(len(self.memory(s).row(name).history) > 0 for s in seats for name in who)

    def _around_block(self, seats: list[Seat]) -> Callable[..., Streams]:
        def handler(call: BlockCall, run: Callable[[BlockCall], Streams]) -> Streams:
            turn = self.turn
            if turn is None or call.hidden.shape[0] != len(turn.who):
                return run(call)
            try:
                for seat in seats:
                    self._set(seat, turn)
                out = run(call)
                for seat in seats:
                    self._collect(seat, turn)
            finally:
                for seat in seats:
                    seat.clear()
            return out

        return handler

    def _set(self, seat: Seat, turn: Turn) -> None:
        if seat.kind not in turn.reused:
            seat.keep = True
            return
        memory, predictor = self.memory(seat), self.technique.predictor(self.clock)
        values: list[Value] = []
        for name in turn.who:
            history = memory.row(name).history
            weights = predictor.limited(history.nodes, float(self.clock.step), self.gain)
            values.append(history.combine(weights))
        seat.reuse, seat.given = True, joined(values)
        self.technique.prepare(self.target, seat, turn, memory)
        self.target.report(self.name, "modules_reused", 1)

    def _collect(self, seat: Seat, turn: Turn) -> None:
        memory = self.memory(seat)
        if seat.reuse:
            self.technique.after(self.target, seat, turn, memory)
        elif seat.kept is not None:
            self.technique.computed(self.target, seat, turn, memory)
            remember(self.technique, memory, self.clock, turn.who, seat.kept)


def _seated(old: Callable[..., Any], seat: Seat) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return seat.call(old, args, kwargs)

    return forward


def remember(technique: ModuleCache, memory: Memory, clock: Clock, who: list[RowName], out: Any) -> None:
    """Put a module's output, a tensor (B, S, C) or a tuple of such, into the rows' histories."""
    streams = out if isinstance(out, tuple) else (out,)
    depth = technique.predictor(clock).depth
    for i, name in enumerate(who):
        value = tuple(s[i] for s in streams)
        history = memory.row(name).history
        history.push(float(clock.step), value, depth, technique.storage, technique.offload, memory.form)


def joined(values: list[Value]) -> Any:
    """Rows' values as a module's output: a tensor, or a tuple where the module gives two streams."""
    import torch

    streams: list[Any] = []
    for parts in zip(*values, strict=True):
        tensors: list[Any] = list(parts)
        streams.append(tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors))
    return streams[0] if len(streams) == 1 else tuple(streams)
