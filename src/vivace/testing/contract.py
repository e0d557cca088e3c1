"""The public contract suite: put a technique through every check, get a report.

    report = check_technique(MyTechnique)
    report.raise_for_failures()

or, with pytest, one test for each check:

    case = Case(MyTechnique)

    @pytest.mark.parametrize("check", technique_checks(), ids=lambda c: c.__name__)
    def test_contract(check):
        check(case)

A known failure is a check's name with the reason. It is strict: a known failure that passes is a failure, so that a
repaired one cannot go unnoticed.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from vivace.core.errors import ConfigError, UnknownNameError, VivaceError
from vivace.techniques.base import Technique
from vivace.testing.case import Case, Check, NotApplicable, registered

_ORDER = (
    "declaration",
    "undo",
    "isolation",
    "effect",
    "repetition",
    "batch",
    "accounting",
    "models",
    "process",
)


class Verdict(StrEnum):
    """How a check ended."""

    PASSED = "pass"
    FAILED = "FAIL"
    NOT_APPLICABLE = "n/a"
    KNOWN = "known"


class ContractError(VivaceError, AssertionError):
    """A technique fails checks; the message lists them all."""


@dataclass(frozen=True, slots=True)
class Result:
    """One check on one technique. `message` says what was seen, or why the check does not apply."""

    check: str
    verdict: Verdict
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All checks on one technique."""

    technique: str
    results: tuple[Result, ...] = field(default_factory=tuple)

    @property
    def failures(self) -> tuple[Result, ...]:
        """Results that speak against the technique."""
        return tuple(r for r in self.results if r.verdict is Verdict.FAILED)

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the technique."""
        return not self.failures

    def __getitem__(self, check: str) -> Result:
        for result in self.results:
            if result.check == check:
                return result
        raise UnknownNameError("check", check, [r.check for r in self.results])

    def raise_for_failures(self) -> None:
        """Raises:
        ContractError: at least one check failed.
        """
        if self.failures:
            lines = [f"{r.check}: {r.message}" for r in self.failures]
            raise ContractError(f"{self.technique} fails {len(lines)} checks:\n  " + "\n  ".join(lines))

    def __str__(self) -> str:
        lines = [
            f"{self.technique}: {len(self.results) - len(self.failures)} of {len(self.results)} checks hold"
        ]
        lines += [f"  {r.verdict.value:<5} {r.check} {r.message}".rstrip() for r in self.results]
        return "\n".join(lines)


def technique_checks() -> tuple[Check, ...]:
    """All checks, as free functions `check_xxx(case)`; cheap ones about declarations come first."""
    package = importlib.import_module("vivace.testing.checks")
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(info.name)
    rank = {f"vivace.testing.checks.{name}": i for i, name in enumerate(_ORDER)}
    return tuple(sorted(registered(), key=lambda c: rank.get(c.__module__, len(rank))))


def run_check(check: Check, case: Case, known: str | None = None) -> Result:
    """One check; `known` is the reason of a known failure. Never raises but for an interrupt."""
    start = time.perf_counter()
    verdict, message = Verdict.PASSED, ""
    try:
        check(case)
    except NotApplicable as why:
        verdict, message = Verdict.NOT_APPLICABLE, str(why)
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        verdict, message = Verdict.FAILED, kind + str(error)
    if known is not None:
        if verdict is Verdict.FAILED:
            verdict, message = Verdict.KNOWN, f"{known} ({message})"
        else:
            verdict, message = (
                Verdict.FAILED,
                f"listed as a known failure ({known}) and does not fail: unlist it",
            )
    return Result(check.__name__, verdict, message, time.perf_counter() - start)


def check_technique(
    technique: type[Technique] | Technique,
    *,
    examples: Sequence[Technique] | None = None,
    known_failures: Mapping[str, str] | None = None,
    checks: Iterable[Check] | None = None,
    model: str = "wan2.1",
) -> Report:
    """Put a technique through the contract.

    Args:
        technique: a class or an instance; it need not be registered.
        examples: settings with which it visibly acts; by default what its class's `examples` gives.
        known_failures: check name -> reason; strict.
        checks: a choice of `technique_checks()`; all by default.
        model: family of the tiny pipeline it runs on.

    Raises:
        ConfigError: no technique, or a known failure names no check.
    """
    cls = technique if isinstance(technique, type) else type(technique)
    if not issubclass(cls, Technique):
        raise ConfigError(f"{cls.__name__} is no technique: derive it from vivace.Technique.")
    chosen = tuple(checks) if checks is not None else technique_checks()
    known = dict(known_failures or {})
    names = [c.__name__ for c in technique_checks()]
    if unknown := sorted(set(known) - set(names)):
        raise UnknownNameError("check", unknown[0], names)
    case = Case(technique, examples=examples, model=model)
    return Report(case.name, tuple(run_check(c, case, known.get(c.__name__)) for c in chosen))


def table(reports: Sequence[Report]) -> Any:
    """Techniques x checks as a rich table; the reasons are not in it, see `Report`."""
    from rich.table import Table

    marks = {
        Verdict.PASSED: "[green]pass[/]",
        Verdict.FAILED: "[bold red]FAIL[/]",
        Verdict.NOT_APPLICABLE: "[dim]n/a[/]",
        Verdict.KNOWN: "[yellow]known[/]",
    }
    out = Table(title="The contract: techniques x checks", title_justify="left")
    out.add_column("check", no_wrap=True)
    for report in reports:
        out.add_column(report.technique.replace("_", " "), justify="center")
    checks = dict.fromkeys(r.check for report in reports for r in report.results)
    for name in checks:
        row = [next((marks[r.verdict] for r in report.results if r.check == name), "") for report in reports]
        out.add_row(name.removeprefix("check_").replace("_", " "), *row)
    out.add_section()
    out.add_row("seconds", *(f"{sum(r.seconds for r in report.results):.1f}" for report in reports))
    return out
