"""All methods of the field as one self-contained HTML page: the tree, search, filters, links between methods.

Style and script are inline and a content security policy in the page forbids every request. Equal data give equal text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vivace.catalogue.cards import Entry, entries
from vivace.catalogue.field import branch, families, methods, related
from vivace.catalogue.measured import measurements
from vivace.catalogue.schema import EVIDENCE, OBJECTIVE, STATUS, TRAINING, Method

BASES = (
    "Wan",
    "HunyuanVideo",
    "CogVideoX",
    "OpenSora",
    "Open-Sora-Plan",
    "Latte",
    "LTX",
    "FLUX",
    "AnimateDiff",
    "SVD",
    "SD",
    "any",
)
"""Base models to offer as a filter: those that several methods name."""


def build(records: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML text.

    Args:
        records: what `read_records` gave; our measurements stand beside the claims.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vivace.catalogue", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found, ours = methods(), {e.name: e for e in entries()}
    text = environment.get_template("methods.html.j2").render(
        families=[
            {
                "family": f,
                "anchor": f"family-{f.letter}",
                "count": sum(m.letter == f.letter for m in found),
                "subs": [
                    {"sub": s, "methods": [_view(m, ours, records) for m in found if m.sub[0] == s.id]}
                    for s in f.subs
                ],
            }
            for f in families()
        ],
        total=len(found),
        claims=sum(len(m.claims) for m in found),
        statuses=[(s, STATUS[s], Counter(m.status for m in found)[s]) for s in STATUS],
        trainings=list(TRAINING.items()),
        evidence=list(EVIDENCE.items()),
        bases=[b for b in BASES if any(_on(b, m) for m in found)],
    )
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def _view(method: Method, ours: Mapping[str, Entry], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    head = method.headline
    return {
        "method": method,
        "branches": [(s, branch(s)) for s in method.sub],
        "objective": OBJECTIVE[method.objective],
        "training": TRAINING[method.training],
        "evidence": EVIDENCE[method.evidence],
        "status": method.status.replace(" ", "-"),
        "bases": "|".join(b for b in BASES if _on(b, method)),
        "ours": ours.get(method.technique),
        "related": related(method),
        "measured": measurements(method, records),
        "doubt": head is not None and head.evidence in ("recall", "inference"),
    }


def _on(base: str, method: Method) -> bool:
    if base == "SD":
        return any(b in ("SD", "SDXL", "SD3", "SD-turbo") or b.startswith("SD1") for b in method.bases)
    if base == "any":
        return any(b.split()[0] == "any" for b in method.bases)
    return any(base.lower() in b.lower() for b in method.bases)
