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
    """The package's adapters by family, found by walking it."""
    package = importlib.import_module("vivace.models")
    found: dict[str, Adapter] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Adapter) and cls.__module__ == module.__name__ and "family" in vars(cls):
                found[cls.family] = cls()
    return dict(sorted(found.items()))


_added: list[Adapter] = []


def register(adapter: Adapter) -> Adapter:
    """Add an adapter made outside the package; it comes before every other one for its transformer classes."""
    _added.insert(0, adapter)
    return adapter


def unregister(adapter: Adapter) -> None:
    """Forget an adapter added with `register`."""
    _added.remove(adapter)


def _all() -> list[Adapter]:
    return [*_added, *adapters().values()]


def by_family(family: str) -> Adapter | None:
    """The adapter of a family, or None."""
    return next((a for a in _all() if a.family == family), None)


def by_class(class_name: str) -> Adapter | None:
    """The adapter of a transformer class, by the class's name."""
    return next((a for a in _all() if class_name in a.transformer_classes), None)


def for_module(module: Any) -> Adapter | None:
    """The adapter of a live transformer, also of a subclass of a known class."""
    return next((a for cls in type(module).__mro__ if (a := by_class(cls.__name__))), None)
