"""The suite as a public product: on techniques of one's own, with known failures, as a table."""

from __future__ import annotations

import io

import pytest
from samples import HONEST, EveryOther, WindowAttention

from vivace.core.errors import ConfigError, UnknownNameError
from vivace.techniques.base import registry
from vivace.testing import Case, Verdict, check_technique, technique_checks
from vivace.testing.__main__ import main
from vivace.testing.contract import ContractError, run_check, table

SAMPLE = Case(EveryOther)
CHECKS = {check.__name__: check for check in technique_checks()}


@pytest.mark.parametrize("check", technique_checks(), ids=lambda c: c.__name__.removeprefix("check_"))
def test_honest_sample_keeps_the_contract(check):
    result = run_check(check, SAMPLE)
    assert result.verdict in (Verdict.PASSED, Verdict.NOT_APPLICABLE), result.message


def test_samples_need_no_registration():
    assert not any(t.card.name in registry for t in HONEST)


def test_checks_are_free_functions_with_a_sentence():
    assert len(CHECKS) == len(technique_checks()) >= 25
    assert all(name.startswith("check_") and (c.__doc__ or "").strip() for name, c in CHECKS.items())


def test_an_instance_is_its_own_example():
    case = Case(EveryOther(interval=3))
    assert case.main.interval == 3
    assert "interval=4" in case.variants()
    assert "interval=1" not in case.variants(), "identity is not a variant"
    assert list(case.identities()) == ["interval=1"]


def test_report_lists_failures():
    from fidelity_overclaimed import Fault

    checks = [CHECKS["check_card_is_complete"], CHECKS["check_declared_fidelity_holds"]]
    report = check_technique(Fault, checks=checks)
    assert not report.ok
    assert [r.check for r in report.failures] == ["check_declared_fidelity_holds"]
    assert report["check_card_is_complete"].verdict is Verdict.PASSED
    with pytest.raises(ContractError, match="fails 1 checks"):
        report.raise_for_failures()
    with pytest.raises(UnknownNameError, match="check_card_is_complete"):
        report["check_card_is_completed"]


def test_known_failures_are_strict():
    from fidelity_overclaimed import Fault

    checks = [CHECKS["check_card_is_complete"], CHECKS["check_declared_fidelity_holds"]]
    known = {"check_declared_fidelity_holds": "the bound is being measured again"}
    assert check_technique(Fault, checks=checks, known_failures=known).ok
    repaired = {"check_card_is_complete": "no citation yet"}
    report = check_technique(Fault, checks=checks[:1], known_failures=repaired)
    assert "unlist it" in report.failures[0].message
    with pytest.raises(UnknownNameError, match="no check is called"):
        check_technique(Fault, known_failures={"check_nothing": "why not"})


def test_only_techniques_are_checked():
    with pytest.raises(ConfigError, match="is no technique"):
        check_technique(int)


def test_table_has_a_column_for_each_technique():
    from rich.console import Console

    checks = [CHECKS["check_card_is_complete"], CHECKS["check_knobs_are_monotone"]]
    reports = [check_technique(t, checks=checks) for t in (EveryOther, WindowAttention)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(reports))
    text = console.export_text()
    assert "card is complete" in text
    assert "n/a" in text
    assert text.count("pass") == 3


def test_command_refuses_an_unknown_name(capsys):
    assert main(["first_block_cash"]) == 2
    assert "first_block_cache" in capsys.readouterr().err
