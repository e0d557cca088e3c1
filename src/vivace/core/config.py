"""Configuration as data: frozen keyword-only dataclasses whose fields know their range.

A *knob* is a field with a range and an identity value (the value at which the technique changes nothing).
Knobs are what a tuner searches and what the contract suite sweeps, so they are declared once, here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from vivace.core.errors import ConfigError

_KNOB = "vivace.knob"


class _Unset:
    def __repr__(self) -> str:
        return "unset"


UNSET: Any = _Unset()


@dataclass(frozen=True, slots=True)
class Knob:
    """Range of one field. `identity` is UNSET when no value of this field alone switches the method off."""

    low: Any = None
    high: Any = None
    choices: tuple[Any, ...] = ()
    identity: Any = UNSET
    doc: str = ""
    monotone: str = ""
    """Name of the receipt count that must not grow when the value grows, e.g. `blocks_run`."""

    def complaint(self, value: Any) -> str | None:
        """The sentence that says why `value` is out of range, or None."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(map(repr, self.choices))}, not {value!r}"
        if self.low is None and self.high is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            return f"must be a number from {self.low} to {self.high}, not {value!r}"
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            return f"must be from {self.low} to {self.high}, not {value!r}"
        return None

    @property
    def has_identity(self) -> bool:
        """Whether one value of this field alone switches the method off."""
        return self.identity is not UNSET

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values a sweep must visit: both ends, or every choice."""
        return self.choices or tuple(v for v in (self.low, self.high) if v is not None)


def knob(
    default: Any,
    *,
    low: Any = None,
    high: Any = None,
    choices: tuple[Any, ...] = (),
    identity: Any = UNSET,
    monotone: str = "",
    doc: str = "",
) -> Any:
    """A dataclass field with a range. See `Knob`."""
    meta = {_KNOB: Knob(low, high, tuple(choices), identity, doc, monotone)}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration object: frozen, JSON both ways, validated when built.

    Raises:
        ConfigError: a value is outside its knob's range; the sentence names the field.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.version = cls.__dict__.get("version", 1)

    version = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                # JSON and YAML have no tuples; a frozen config must stay hashable.
                object.__setattr__(self, field.name, value := tuple(value))
            complaint = self.knobs()[field.name].complaint(value) if field.name in self.knobs() else None
            if complaint:
                raise ConfigError(f"{self.type_name()}: {field.name} {complaint}.")

    @classmethod
    def type_name(cls) -> str:
        """The name this type has in a file."""
        return cls.__name__

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """Fields that have a range, by name."""
        return {f.name: f.metadata[_KNOB] for f in dataclasses.fields(cls) if _KNOB in f.metadata}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with `_type` and `_version`."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"_type": self.type_name(), "_version": self.version, **values}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field, or a file written by a newer version.
        """
        if (written := data.get("_version", cls.version)) > cls.version:
            raise ConfigError(
                f"{cls.type_name()}: the file has version {written} and this Vivace reads up to {cls.version}; "
                "update Vivace."
            )
        values = {k: v for k, v in data.items() if not k.startswith("_")}
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ConfigError(
                f"{cls.type_name()} has no setting called {', '.join(unknown)}; it has {', '.join(names) or 'none'}."
            )
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise ConfigError(f"a configuration holds only plain values, not {type(value).__name__}.")
