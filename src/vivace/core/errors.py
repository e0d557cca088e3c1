"""The error tree: every error a user can cause carries one sentence that says what to do.

The command line prints `str(error)` and exits with `exit_code`; a traceback is only for our own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VivaceError(Exception):
    """Base of everything Vivace raises on purpose."""

    exit_code = 2


class ConfigError(VivaceError, ValueError):
    """A knob, a preset or a file holds a value that cannot be used."""


class UnknownNameError(VivaceError, LookupError):
    """A name that no registry knows; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        offer = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(self.known) or 'none'}."
        super().__init__(f"no {kind} is called '{name}'; {offer}{' ' + hint if hint else ''}")


class PlanError(VivaceError, ValueError):
    """A plan cannot run on a model. `problems` holds all of them, not the first."""

    def __init__(self, problems: Iterable[object]) -> None:
        self.problems = tuple(problems)
        lines = [str(p) for p in self.problems]
        head = "the plan cannot run: " if len(lines) == 1 else f"the plan has {len(lines)} problems: "
        super().__init__(head + "; ".join(lines))


class ModelError(VivaceError, ValueError):
    """A model cannot be found, read or driven."""


class OfflineError(ModelError):
    """A hub id was asked for and the hub cannot be reached."""


class WeightsError(ModelError):
    """A weight file is missing or damaged; the message names the file."""


class ShapeError(VivaceError, ValueError):
    """Frames, height or width the model cannot make; the message gives the nearest valid value."""


class OutputError(VivaceError, OSError):
    """A result cannot be written."""


class UnavailableError(VivaceError, ImportError):
    """An optional package is needed; the message gives the install line."""


class SessionError(VivaceError, RuntimeError):
    """A session is used in a way it does not allow (two at once on one pipeline, use after close)."""


class NoEffectError(VivaceError, RuntimeError):
    """A technique was asked for and did nothing."""


class Interrupted(VivaceError):
    """Somebody stopped a run that can be taken up again; the message says how."""

    exit_code = 130
