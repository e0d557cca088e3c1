"""Vivace: play any video diffusion model faster, and know what it cost.

Public names load on first use, so that `import vivace` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vivace.core.errors import VivaceError
    from vivace.core.receipt import Receipt
    from vivace.core.shapes import Workload
    from vivace.models.loading import load
    from vivace.plans.plan import Plan
    from vivace.plans.session import Output, Session, accelerate
    from vivace.techniques.base import Technique

_HOMES = {
    "Output": "vivace.plans.session",
    "Plan": "vivace.plans.plan",
    "Receipt": "vivace.core.receipt",
    "Session": "vivace.plans.session",
    "Technique": "vivace.techniques.base",
    "VivaceError": "vivace.core.errors",
    "Workload": "vivace.core.shapes",
    "accelerate": "vivace.plans.session",
    "load": "vivace.models.loading",
}

__all__ = [
    "Output",
    "Plan",
    "Receipt",
    "Session",
    "Technique",
    "VivaceError",
    "Workload",
    "accelerate",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vivace' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
