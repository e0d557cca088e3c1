"""Public contract checks: run them on a technique, adapter, kernel or metric of your own.

Names load on first use, so that a test that needs only a tiny pipeline does not import the suite.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.testing.adapter_checks import check_adapter
    from vivace.testing.case import Case, ContractViolation, NotApplicable
    from vivace.testing.contract import Report, Verdict, check_technique, technique_checks
    from vivace.testing.kernel_checks import check_kernel
    from vivace.testing.metric_checks import check_metric

_HOMES = {
    "Case": "vivace.testing.case",
    "ContractViolation": "vivace.testing.case",
    "NotApplicable": "vivace.testing.case",
    "Report": "vivace.testing.contract",
    "Verdict": "vivace.testing.contract",
    "check_adapter": "vivace.testing.adapter_checks",
    "check_kernel": "vivace.testing.kernel_checks",
    "check_metric": "vivace.testing.metric_checks",
    "check_technique": "vivace.testing.contract",
    "technique_checks": "vivace.testing.contract",
}

__all__ = [
    "Case",
    "ContractViolation",
    "NotApplicable",
    "Report",
    "Verdict",
    "check_adapter",
    "check_kernel",
    "check_metric",
    "check_technique",
    "technique_checks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vivace.testing' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
