"""Every registered technique keeps the contract.

`make contract` (VIVACE_CONTRACT=full) puts every technique through every check. Without it the techniques of `WHOLE`
get every check, those of `ENGINES`, one for each engine that several share, get `ESSENTIAL` and `DEEP`, and the others
`ESSENTIAL`: the whole suite on all techniques takes longer than a change may wait for.
"""

from __future__ import annotations

import pytest
from cases import WHOLE, case_of, full

from vivace.techniques.base import registry
from vivace.testing import technique_checks
from vivace.testing.contract import Verdict, run_check

KNOWN: dict[tuple[str, str], str] = {}
"""(technique, check) -> reason of a known failure. Strict: one that passes is a failure."""


ESSENTIAL = (
    "check_card_is_complete",
    "check_knobs_have_ranges",
    "check_questions_are_pure",
    "check_undo_is_exact",
    "check_identity_is_the_exact_run",
    "check_it_acts",
    "check_counts_are_as_estimated",
    "check_receipt_adds_up",
)
DEEP = (
    "check_aborted_generation_leaves_nothing",
    "check_batch_mates_do_not_matter",
    "check_fused_guidance_is_separate_guidance",
)
ENGINES = (
    "adaptive_guidance",
    "asymmetric_reduction",
    "cache_format",
    "few_steps",
    "fused_linear",
    "latent_frame_rate",
    "optimal_schedule",
    "paro",
    "progressive_resolution",
    "pruned_model",
    "quantized_linear",
    "sparge_attention",
    "student_checkpoint",
    "taylorseer_modules",
    "teacache",
    "token_skip",
)
"""One technique for each engine; where several share one, it is the engine that these checks are about."""


LONG = {
    ("quantized_linear", "check_batch_mates_do_not_matter"),
    ("quantized_linear", "check_fused_guidance_is_separate_guidance"),
    ("asymmetric_reduction", "check_batch_mates_do_not_matter"),
    ("fused_linear", "check_batch_mates_do_not_matter"),
    ("fused_linear", "check_fused_guidance_is_separate_guidance"),
    ("sparge_attention", "check_batch_mates_do_not_matter"),
}
"""Left to the whole contract for their time. Formats round rows one by one, and a test of their own says so
(tests/kernels/test_quant_linear_kernels.py); asymmetric_reduction shares its matching with token_merging, and the other
dynamic attentions choose blocks for every clip alone as sparge_attention does."""


def chosen() -> list[tuple[str, object]]:
    """(technique, check) of this run."""
    return [
        (name, check)
        for name in registry
        for check in technique_checks()
        if full()
        or name in WHOLE
        or (
            (check.__name__ in ESSENTIAL or (check.__name__ in DEEP and name in ENGINES))
            and (name, check.__name__) not in LONG
        )
    ]


@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(n, c, id=f"{n}-{c.__name__.removeprefix('check_')}") for n, c in chosen()],
)
def test_technique_keeps_the_contract(name: str, check):
    result = run_check(check, case_of(name), KNOWN.get((name, check.__name__)))
    if result.verdict is Verdict.NOT_APPLICABLE:
        pytest.skip(result.message)
    assert result.verdict is not Verdict.FAILED, result.message


def test_essential_checks_exist():
    assert {*ESSENTIAL, *DEEP} <= {check.__name__ for check in technique_checks()}
    assert set(WHOLE) | set(ENGINES) | {name for name, _ in LONG} <= set(registry)


def test_known_failures_exist():
    checks = {check.__name__ for check in technique_checks()}
    assert all(name in registry and check in checks for name, check in KNOWN)
