"""One technique on trial: its settings, the subjects it runs on, and the isolation around every check."""

from __future__ import annotations

import contextlib
import functools
import gc
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vivace.core.errors import ConfigError, VivaceError
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Technique
from vivace.testing import models
from vivace.testing.fingerprints import World
from vivace.testing.subjects import Run, Subject, plan_of

SHAPES: tuple[dict[str, int], ...] = (
    {"num_frames": 9, "height": 32, "width": 32},
    {"num_frames": 17, "height": 64, "width": 64},
    {"num_frames": 33, "height": 64, "width": 64},
    {"num_frames": 33, "height": 128, "width": 128},
)
"""Clips to try, small first: a technique is checked at the first on which it acts (a mask needs enough tokens)."""
STEPS = 6
"""Solver steps by default: enough for a warm-up, a few reused steps and an exact end."""


class ContractViolation(AssertionError):
    """A technique does not keep the contract; the sentence says what was seen."""


class NotApplicable(Exception):
    """The check says nothing about this technique; the sentence says why."""


def expect(condition: object, sentence: str) -> None:
    """Raise `ContractViolation` with the sentence unless the condition holds."""
    if not condition:
        raise ContractViolation(sentence)


class Case:
    """A technique with everything a check needs.

    Args:
        technique: a class, or an instance that serves as its main example. It need not be registered.
        examples: settings with which it visibly acts; by default what its class's `examples` gives.
        model: the family of the tiny pipeline to run on, a key of `vivace.testing.models.BUILDERS`.
    """

    def __init__(
        self,
        technique: type[Technique] | Technique,
        *,
        examples: Sequence[Technique] | None = None,
        model: str = "wan2.1",
    ) -> None:
        given = () if isinstance(technique, type) else (technique,)
        self.technique = technique if isinstance(technique, type) else type(technique)
        self.family = model
        self.world = World()
        self._given = (*given, *(examples or ()))
        self._alone: dict[Technique, Run] = {}

    @property
    def name(self) -> str:
        """The technique's name, or its class's where the card has none."""
        return getattr(getattr(self.technique, "card", None), "name", "") or self.technique.__name__

    @cached_property
    def workdir(self) -> Path:
        """A folder for files the technique needs; it goes with the case."""
        folder = tempfile.mkdtemp(prefix="vivace-contract-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    @cached_property
    def examples(self) -> tuple[Technique, ...]:
        """Settings with which the technique acts; the first is the main one."""
        return self._given or tuple(self.technique.examples(self.workdir, models.pipeline(self.family)))

    @property
    def main(self) -> Technique:
        """The example that most checks use."""
        return self.examples[0]

    @cached_property
    def call(self) -> dict[str, Any]:
        """Call defaults: the smallest of `SHAPES` on which the main example acts, or the first one."""
        world, calls = World(), [shape | {"num_inference_steps": STEPS} for shape in SHAPES]
        try:
            for call in calls:
                subject = Subject(self.family, call)
                world.watch(subject.pipeline)
                if plan_of(self.main).problems(subject.model):
                    continue
                exact, run = subject.without(self.main), subject.run(self.main)
                if not exact.latents.equal(run.latents) or exact.receipt.counts != run.receipt.counts:
                    return call
        except Exception:
            # A technique that fails on any clip fails on the first one too, in the check that is about it.
            return calls[0]
        finally:
            world.restore()
        return calls[0]

    def subject(self, family: str | None = None, **options: Any) -> Subject:
        """A fresh tiny pipeline; the case's own family by default. Options go to the builder (`layers=2`)."""
        subject = Subject(family or self.family, self.call, **options)
        self.world.watch(subject.pipeline)
        return subject

    def alone(self, technique: Technique) -> Run:
        """What a technique gives in a session of its own on a fresh pipeline; remembered, so compare, do not trust."""
        if technique not in self._alone:
            self._alone[technique] = self.subject().run(technique)
        return self._alone[technique]

    @cached_property
    def model(self) -> ModelDescription:
        """Description of the case's pipeline."""
        return Subject(self.family, self.call).model

    def variants(self, *, inside: int = 0) -> dict[str, Technique]:
        """Settings to sweep: examples, defaults, both ends of every knob, and `inside` points between real ones.

        Left out: settings at identity, combinations the technique itself refuses, and ones the plan refuses.
        """
        found: dict[str, Technique] = {"example": self.main}
        found |= {f"example {i + 2}": t for i, t in enumerate(self.examples[1:])}
        with contextlib.suppress(TypeError):  # a field without a default: only examples can be built
            found["default"] = self.technique()
        for field, knob in self.technique.knobs().items():
            for value in (*knob.ends, *_between(knob.low, knob.high, inside)):
                try:
                    found[f"{field}={value}"] = self.main.replace(**{field: value})
                except ConfigError:
                    continue
        unique: dict[str, Technique] = {}
        for label, technique in found.items():
            if not technique.is_identity and technique not in unique.values() and self.legal(technique):
                unique[label] = technique
        return unique

    def legal(self, *techniques: Technique, model: ModelDescription | None = None) -> bool:
        """Whether a plan of these techniques may run on a model (the case's own by default)."""
        return not any(p.severity == "error" for p in plan_of(*techniques).problems(model or self.model))

    def fitted(self, subject: Subject) -> Technique | None:
        """The main example as it fits another model: one with a file gets a file made for that model, if it can.

        None when the technique is refused there.
        """
        if self.legal(self.main, model=subject.model):
            return self.main
        if self._given:
            return None
        folder = Path(tempfile.mkdtemp(dir=self.workdir))
        try:
            made = self.technique.examples(folder, subject.pipeline)[0]
        except VivaceError:
            return None
        return made if self.legal(made, model=subject.model) else None

    def identities(self) -> dict[str, Technique]:
        """One setting for every knob that has an identity value."""
        knobs = self.technique.knobs().items()
        return {f"{n}={k.identity}": self.main.replace(**{n: k.identity}) for n, k in knobs if k.has_identity}

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Classes, module-level functions and process settings are put back afterwards, whatever the check did."""
        self.call  # noqa: B018  # found in an isolation of its own, before this one begins
        self.world = World()
        try:
            yield
        finally:
            self.world.restore()
            self.world = World()


def _between(low: Any, high: Any, count: int) -> tuple[Any, ...]:
    """Points between two real numbers, denser near the lower one, where thresholds are interesting."""
    if not isinstance(low, float) or not isinstance(high, float):
        return ()
    return tuple(low + (high - low) * 2.0 ** (i - count) for i in range(count))


Check = Callable[[Case], None]
_checks: list[Check] = []


def check(function: Check) -> Check:
    """Register a check: a free function `check_xxx(case)` that raises `ContractViolation` or `NotApplicable`."""

    @functools.wraps(function)
    def isolated(case: Case) -> None:
        with case.isolated():
            function(case)

    _checks.append(isolated)
    return isolated


def registered() -> tuple[Check, ...]:
    """All checks whose modules were imported, in order of definition."""
    return tuple(_checks)


@contextmanager
def counting_tensors() -> Iterator[Callable[[], int]]:
    """Gives a function that tells how many tensors made inside the block are alive."""
    import torch

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    gc.collect()
    gc.freeze()  # what exists already need not be walked again
    try:
        yield alive
    finally:
        gc.unfreeze()


def in_force(technique: Technique) -> Technique:
    """The same settings as a technique that a plan applies even at identity, so that identity itself can be tested."""
    cls = type(technique)
    forced = type(f"{cls.__name__}InForce", (cls,), {"is_identity": False, "__module__": cls.__module__})
    values = {k: v for k, v in technique.to_dict().items() if not k.startswith("_")}
    return forced(**values)
