"""Which adapter drives which transformer class."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

from vivace.models.adapter import Adapter


@functools.cache
def adapters() -> dict[str, Adapter]:
    """All adapters by family, found by walking this package."""
    package = importlib.import_module("vivace.models")
    found: dict[str, Adapter] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Adapter) and cls.__module__ == module.__name__ and "family" in vars(cls):
                found[cls.family] = cls()
    return dict(sorted(found.items()))


def by_family(family: str) -> Adapter | None:
    """The adapter of a family, or None."""
    return adapters().get(family)


def by_class(class_name: str) -> Adapter | None:
    """The adapter of a transformer class, by the class's name."""
    return next((a for a in adapters().values() if class_name in a.transformer_classes), None)


def for_module(module: Any) -> Adapter | None:
    """The adapter of a live transformer, also of a subclass of a known class."""
    return next((a for cls in type(module).__mro__ if (a := by_class(cls.__name__))), None)
