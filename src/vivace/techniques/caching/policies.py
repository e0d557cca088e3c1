"""Policies: whether a step may reuse, from one number per sample (the signal) or from the clock alone.

A policy is asked only where the guard allows reuse. `computed` is called for every step that is computed, for whatever
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vivace.core.context import Clock
from vivace.techniques.caching.memory import Ballot


@dataclass(frozen=True, slots=True)
class Policy:
    """Base: never reuses."""

    online: ClassVar[bool] = False
    """Needs the signal, and with it one synchronisation with the device per decision."""

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        """Whether this step reuses. `value` is the signal (0.0 for a policy that needs none)."""
        return False

    def computed(self, ballot: Ballot, value: float, clock: Clock) -> None:
        """The step is computed."""


@dataclass(frozen=True, slots=True)
class Threshold(Policy):
    """Reuse while the change since the last computed step is below `bound`."""

    online: ClassVar[bool] = True
    bound: float

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        return value < self.bound


@dataclass(frozen=True, slots=True)
class Budget(Policy):
    """Reuse while the changes from step to step, rescaled, add up to less than `bound` since the last computed step."""

    online: ClassVar[bool] = True
    bound: float
    rescale: Callable[[float], float] = abs

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        total = ballot.total + self.rescale(value)
        if total < self.bound:
            ballot.total = total
            return True
        return False

    def computed(self, ballot: Ballot, value: float, clock: Clock) -> None:
        ballot.total = 0.0


@dataclass(frozen=True, slots=True)
class Interval(Policy):
    """Compute every `every`-th step, counted from the last computed one."""

    every: int

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        return ballot.skips + 1 < self.every


@dataclass(frozen=True, slots=True)
class Mask(Policy):
    """A fixed set of computed steps, given for every number of steps by `computed_steps(num_steps)`."""

    steps: Callable[[int], Sequence[bool]]
    """num_steps -> True where the step is computed."""

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        return not self.steps(clock.num_steps)[clock.step]


@dataclass(frozen=True, slots=True)
class Codebook(Policy):
    """AdaCache: the change between the last two computed steps chooses the distance to the next computed one.

    `book` holds (bound, gap) in ascending order of bound: the gap of the first bound above the change, 1 beyond.
    """

    online: ClassVar[bool] = True
    book: tuple[tuple[float, int], ...]

    def reuse(self, ballot: Ballot, value: float, clock: Clock) -> bool:
        return ballot.skips + 1 < next((gap for bound, gap in self.book if value < bound), 1)
