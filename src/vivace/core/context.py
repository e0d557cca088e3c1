"""The clock and the state store: what a technique may know about *when* it is called, and what it may remember.

The engine announces generation, step, timestep, sigma, guidance branch and expert. Techniques read the clock;
nobody counts calls. What a technique remembers lives in the store, keyed by (technique, site, branch, expert),
for one generation, and is dropped when the generation ends in whatever way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

COND, UNCOND, FUSED = "cond", "uncond", "fused"
BRANCHES = (COND, UNCOND, FUSED)


@dataclass(slots=True)
class Evaluation:
    """One call of a transformer by the pipeline, as it is being carried out.

    `requested` is the number of guidance branches in the batch (2 when a pair is fused), so that a fused pair and two
    separate calls count the same.
    """

    step: int
    branch: str
    expert: str
    requested: int = 1
    nfe: int = 0
    blocks_run: float = 0.0
    blocks_total: int = 0
    rows: int = 0
    rows_run: int = 0
    """Batch rows that reached the network."""
    key: Hashable = None
    grid: Any = None
    """The `TokenGrid` of this call; None when the model has no adapter."""
    by: list[str] = field(default_factory=list)
    variant: tuple[str, ...] = ()
    """Set by a technique whose blocks cost more in some evaluations than in others of the same shape (dense steps)."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Shortened sequence length -> the whole one, set by a technique that drops tokens: prices the dense equivalent."""

    @property
    def entered(self) -> bool:
        """Whether the network was called at all."""
        return self.nfe > 0

    def enter(self, rows: int) -> None:
        """The network is called with `rows` of the requested batch rows (half of a fused pair counts one)."""
        self.nfe += max(1, round(self.requested * rows / max(self.rows, 1)))
        self.rows_run += rows

    def mark(self, technique: str) -> None:
        """Say that `technique` changed how this evaluation was carried out."""
        if technique not in self.by:
            self.by.append(technique)

    @property
    def action(self) -> str:
        """`computed`, `reused` (some or all blocks answered from a cache) or `skipped` (no network call at all)."""
        if not self.entered:
            return "skipped"
        return "reused" if self.blocks_run < self.blocks_total * self.nfe - 1e-9 else "computed"


@dataclass(slots=True)
class Clock:
    """Where the generation stands. Read by techniques, written by the engine only."""

    generation: int = 0
    running: bool = False
    step: int = 0
    num_steps: int = 0
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    branch: str = COND
    expert: str = "transformer"
    chunk: int = 0
    steps_are_the_users: bool = False
    """The caller gave `num_inference_steps` himself: a technique must not change the number of steps."""
    evaluation: Evaluation | None = None
    samples: tuple[int, ...] | None = None
    """Which samples of the batch the rows of a narrowed call are; None for all of them."""

    @property
    def timestep(self) -> float:
        """Timestep of the current step (0 to 1000 in the usual schedulers)."""
        return self.timesteps[self.step] if self.step < len(self.timesteps) else 0.0

    @property
    def sigma(self) -> float:
        """Noise level of the current step; NaN where the scheduler has none."""
        return self.sigmas[self.step] if self.step < len(self.sigmas) else float("nan")

    @property
    def progress(self) -> float:
        """Share of the steps already done, 0 at the first step."""
        return self.step / max(self.num_steps, 1)

    @property
    def last(self) -> bool:
        """Whether this is the last step."""
        return self.step >= self.num_steps - 1

    def who(self, rows: int) -> list[tuple[str, int]]:
        """(branch, sample) of each of the call's batch rows; a fused pair holds the unconditional half first."""
        if self.branch != FUSED:
            return [(self.branch, i) for i in self.samples or range(rows)]
        return [(branch, i) for branch in (UNCOND, COND) for i in range(rows // 2)]

    @contextmanager
    def narrowed(self, branch: str, samples: Sequence[int] | None = None) -> Iterator[None]:
        """What runs inside sees one branch only, and of its batch only `samples` (all by default)."""
        before = self.branch, self.samples
        self.branch, self.samples = branch, None if samples is None else tuple(samples)
        try:
            yield
        finally:
            self.branch, self.samples = before

    def begin(self, timesteps: tuple[float, ...], sigmas: tuple[float, ...]) -> None:
        """A generation starts."""
        self.generation += 1
        self.running = True
        self.step, self.num_steps = 0, len(timesteps)
        self.timesteps, self.sigmas = timesteps, sigmas
        self.branch, self.evaluation, self.samples = COND, None, None

    def advance(self) -> bool:
        """A step ended. Returns whether it was the last one."""
        self.step += 1
        return self.step >= self.num_steps

    def end(self) -> None:
        """The generation is over, completed or not."""
        self.running = False
        self.evaluation = None


class StateStore:
    """Run-time memory of the techniques for one generation."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.form: Any = None
        """How caches keep tensors, in the place of their own settings; set through the ledger by `cache_format`."""
        self._data: dict[tuple[Hashable, ...], Any] = {}

    def get(self, technique: str, site: Hashable, make: Callable[[], T]) -> T:
        """The state of (technique, site) for the current branch and expert, made on first use."""
        key = (technique, site, self._clock.branch, self._clock.expert)
        if key not in self._data:
            self._data[key] = make()
        return self._data[key]

    def shared(self, technique: str, site: Hashable, make: Callable[[], T]) -> T:
        """As `get`, but one state for all branches of an expert (guidance deltas, votes)."""
        key = (technique, site, "*", self._clock.expert)
        if key not in self._data:
            self._data[key] = make()
        return self._data[key]

    def whole(self, technique: str, site: Hashable, make: Callable[[], T]) -> T:
        """As `get`, but one state for the whole generation, whichever branch and expert runs."""
        key = (technique, site, "*", "*")
        if key not in self._data:
            self._data[key] = make()
        return self._data[key]

    def clear(self) -> None:
        """Forget everything."""
        self._data.clear()

    def __len__(self) -> int:
        return len(self._data)

    def items(self) -> list[tuple[tuple[Hashable, ...], Any]]:
        """Everything that is remembered, by (technique, site, branch, expert)."""
        return list(self._data.items())

    def nbytes(self) -> int:
        """Bytes held by tensors in the store, walked through containers and instance attributes."""
        return self.size(self._data)

    @staticmethod
    def size(whole: Any) -> int:
        """Bytes of the tensors in a value, walked likewise."""
        import torch

        seen: set[int] = set()

        def size(value: Any) -> int:
            if id(value) in seen:
                return 0
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                return value.numel() * value.element_size()
            if isinstance(value, dict):
                return sum(map(size, value.values()))
            if isinstance(value, (list, tuple, set)):
                return sum(map(size, value))
            slots = [getattr(value, s, None) for s in getattr(type(value), "__slots__", ())]
            return sum(map(size, [*getattr(value, "__dict__", {}).values(), *slots]))

        return size(whole)
