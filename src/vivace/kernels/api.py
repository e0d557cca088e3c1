"""Choosing a kernel: an explicit, recorded decision. Nothing falls back in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vivace.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen implementation of an operation and the reason."""

    op: str
    name: str
    why: str
    run: Callable[..., Any] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation: whether it can run in a context, and how to get it. Imports happen in `load`."""

    name: str
    refuse: Callable[[Mapping[str, Any]], str | None]
    """The reason why it cannot run in this context, or None."""
    load: Callable[[], Callable[..., Any]]
    avoid: Callable[[Mapping[str, Any]], str | None] = lambda context: None
    """The reason why it can run here but is taken only when asked for by name, or None."""


_OPS: dict[str, list[Candidate]] = {}


def register(op: str, candidate: Candidate) -> None:
    """Add an implementation; earlier ones are preferred when a caller leaves the choice open."""
    _OPS.setdefault(op, []).append(candidate)


def candidates(op: str) -> list[Candidate]:
    """Implementations of an operation in order of preference."""
    import importlib

    importlib.import_module(f"vivace.kernels.{op}.spec")
    return _OPS[op]


def select(op: str, prefer: str = "auto", **context: Any) -> Choice:
    """Choose an implementation.

    Args:
        op: name of the operation's folder under `vivace.kernels`.
        prefer: a candidate's name, or "auto" for the first that can run.
        context: what the choice depends on (device, dtype, block size ...).

    Raises:
        ConfigError: the preferred candidate cannot run here, or none can; the sentence gives the reasons.
    """
    refused = {
        c.name: c.refuse(context) or (None if prefer == c.name else c.avoid(context)) for c in candidates(op)
    }
    for candidate in candidates(op):
        if prefer in ("auto", candidate.name) and refused[candidate.name] is None:
            passed_over = [f"{n}: {r}" for n, r in refused.items() if r and prefer == "auto"]
            why = "asked for by name" if prefer != "auto" else "first that fits here"
            return Choice(op, candidate.name, "; ".join([why, *passed_over]), candidate.load())
    if prefer != "auto" and prefer not in refused:
        raise ConfigError(f"{op} has no kernel called '{prefer}'; it has {', '.join(refused)}.")
    reasons = refused if prefer == "auto" else {prefer: refused[prefer]}
    raise ConfigError(
        f"no kernel for {op} can run here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}."
    )
