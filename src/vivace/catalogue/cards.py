"""Our techniques as plain data, for tables and pages: what Vivace implements, read from the cards.

Every row says which paradigm a method belongs to, what it saves, what it owns while it runs, and what our version does
differently from its source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vivace.core.errors import UnknownNameError

if TYPE_CHECKING:
    from vivace.techniques.base import Technique

__all__ = ["Entry", "Setting", "entries", "entry"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a method: its default, its range, and the value that switches the method off (`off`)."""

    name: str
    default: Any
    low: Any = None
    high: Any = None
    choices: tuple[Any, ...] = ()
    off: Any = None
    doc: str = ""

    @property
    def span(self) -> str:
        """The range in words; empty when every value is allowed."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        ends = (self.low is not None, self.high is not None)
        return {
            (True, True): f"{self.low} to {self.high}",
            (True, False): f"{self.low} or more",
            (False, True): f"{self.high} or less",
        }.get(ends, "")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method. `claims` and `needs` are sentences; `unsound_with` gives a reason for each name."""

    name: str
    paradigm: str
    summary: str
    objective: str
    idea: str
    claims: tuple[str, ...]
    needs: tuple[str, ...]
    packages: tuple[str, ...]
    training: str
    calibration: str
    lossless: bool
    batch_coupled: bool
    fidelity: float | None
    source: str
    arxiv: str
    code: str
    differs: str
    settings: tuple[Setting, ...]
    unsound_with: tuple[tuple[str, str], ...]


def entries() -> tuple[Entry, ...]:
    """All methods that this installation can run, by paradigm in the survey's order and then by name."""
    from vivace.techniques.base import Paradigm, registry

    order = [p.value for p in Paradigm]
    found = (_entry(registry[name]) for name in registry)
    return tuple(sorted(found, key=lambda e: (order.index(e.paradigm), e.name)))


def entry(name: str) -> Entry:
    """One method by name.

    Raises:
        UnknownNameError: no method is called so; the sentence offers the nearest.
    """
    from vivace.techniques.base import registry

    if name not in registry:
        raise UnknownNameError("method", name, registry)
    return _entry(registry[name])


def _entry(technique: type[Technique]) -> Entry:
    card, cite = technique.card, technique.card.cite
    return Entry(
        name=card.name,
        paradigm=card.paradigm.value,
        summary=card.summary,
        objective=card.objective,
        idea=_first_paragraphs(technique.__doc__ or ""),
        claims=tuple(f"{c.mode.value} {c.resource}" for c in card.claims),
        needs=tuple(n.value for n in card.needs),
        packages=card.packages,
        training=card.training,
        calibration=card.calibration,
        lossless=card.lossless,
        batch_coupled=card.batch_coupled,
        fidelity=card.fidelity,
        source=cite.title,
        arxiv=cite.arxiv,
        code=cite.code,
        differs=cite.differs,
        settings=_settings(technique),
        unsound_with=tuple(sorted(card.unsound_with.items())),
    )


def _settings(technique: type[Technique]) -> tuple[Setting, ...]:
    knobs, docs, out = technique.knobs(), _field_docs(technique), []
    for field in fields(technique):
        knob = knobs.get(field.name)
        if knob is None:
            out.append(Setting(name=field.name, default=field.default, doc=docs.get(field.name, "")))
            continue
        out.append(
            Setting(
                name=field.name,
                default=field.default,
                low=knob.low,
                high=knob.high,
                choices=knob.choices,
                off=knob.identity if knob.has_identity else None,
                doc=knob.doc or docs.get(field.name, ""),
            )
        )
    return tuple(out)


def _field_docs(technique: type) -> dict[str, str]:
    """The strings under the fields of a class and its bases."""
    found: dict[str, str] = {}
    for cls in reversed(technique.__mro__):
        found |= _own_docs(cls)
    return found


@functools.cache
def _own_docs(cls: type) -> dict[str, str]:
    """Those of one class, which Python does not keep: read from the source, which takes time for the large bases."""
    found: dict[str, str] = {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return found
    for field, text in pairwise(getattr(tree.body[0], "body", [])):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                found[name] = " ".join(doc.split())
    return found


def _first_paragraphs(doc: str) -> str:
    """A docstring up to its sections (`Args:` and the like), one line per paragraph."""
    paragraphs = [" ".join(p.split()) for p in doc.strip().split("\n\n")]
    words = ("Args:", "Raises:", "Attributes:", "Returns:")
    stop = next((i for i, p in enumerate(paragraphs) if p.startswith(words)), len(paragraphs))
    return "\n\n".join(paragraphs[:stop])
