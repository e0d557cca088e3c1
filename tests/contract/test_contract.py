"""Every registered technique keeps the whole contract."""

from __future__ import annotations

import pytest
from cases import case_of

from vivace.techniques.base import registry
from vivace.testing import technique_checks
from vivace.testing.contract import Verdict, run_check

KNOWN: dict[tuple[str, str], str] = {}
"""(technique, check) -> reason of a known failure. Strict: one that passes is a failure."""


@pytest.mark.parametrize("check", technique_checks(), ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", registry)
def test_technique_keeps_the_contract(name: str, check):
    result = run_check(check, case_of(name), KNOWN.get((name, check.__name__)))
    if result.verdict is Verdict.NOT_APPLICABLE:
        pytest.skip(result.message)
    assert result.verdict is not Verdict.FAILED, result.message


def test_known_failures_exist():
    checks = {check.__name__ for check in technique_checks()}
    assert all(name in registry and check in checks for name, check in KNOWN)
