"""The suite's own test: techniques with a defect seen in the field, each caught by the check that is meant for it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from vivace.testing import Case, technique_checks
from vivace.testing.contract import Verdict, run_check

FOLDER = Path(__file__).parent / "faults"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py"))
CHECKS = {check.__name__: check for check in technique_checks()}


def test_there_are_enough_faults():
    assert len(NAMES) >= 22


@pytest.mark.parametrize("name", NAMES)
def test_fault_is_caught_by_its_check(name: str):
    module = importlib.import_module(name)
    result = run_check(CHECKS[module.CAUGHT_BY], Case(module.Fault))
    assert result.verdict is Verdict.FAILED, f"{name} passes {module.CAUGHT_BY}"
    assert module.SAYS in result.message, f"{name} is caught for another reason: {result.message}"


@pytest.mark.parametrize("name", NAMES)
def test_fault_says_where_it_was_seen(name: str):
    module = importlib.import_module(name)
    words = " ".join(module.__doc__.split())
    assert any(f"Seen {word}" in words for word in ("in", "where"))
    assert module.Fault.card.name == f"fault_{name}"
