"""A small typed registry: names to classes, found by walking a package, extended by entry points.

Discovery never swallows an import error: a broken file is a broken file, not a missing method.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from typing import Generic, TypeVar, cast

from vivace.core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Concrete subclasses of `base_path` ("module:Class") found below `package`, by the name `key(cls)` gives."""

    def __init__(self, kind: str, package: str, base_path: str, entry_points: str) -> None:
        self.kind, self._package, self._base_path, self._entry_points = kind, package, base_path, entry_points

    @cached_property
    def _items(self) -> dict[str, type[T]]:
        module, _, name = self._base_path.partition(":")
        base = getattr(importlib.import_module(module), name)
        found: dict[str, type[T]] = {}
        package = importlib.import_module(self._package)
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.name.rpartition(".")[2].startswith("_"):
                continue
            loaded = importlib.import_module(info.name)
            for _, cls in inspect.getmembers(loaded, inspect.isclass):
                own = cls.__module__ == loaded.__name__ and cls is not base
                if own and issubclass(cls, base) and _is_concrete(cls):
                    self._insert(found, cast(type[T], cls))
        for point in importlib.metadata.entry_points(group=self._entry_points):
            self._insert(found, point.load())
        return dict(sorted(found.items()))

    @staticmethod
    def _insert(found: dict[str, type[T]], cls: type[T]) -> None:
        name = cls.registry_name()  # type: ignore[attr-defined]
        if name in found and found[name] is not cls:
            raise TypeError(f"'{name}' is defined twice: {found[name].__module__} and {cls.__module__}")
        found[name] = cls

    def add(self, cls: type[T]) -> type[T]:
        """Register a class made outside the package (a third party's, a test's); usable as a decorator."""
        self._insert(self._items, cls)
        return cls

    def remove(self, name: str) -> None:
        """Forget a class registered with `add`."""
        self._items.pop(name, None)

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._items:
            raise UnknownNameError(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _is_concrete(cls: type) -> bool:
    return not inspect.isabstract(cls) and not cls.__dict__.get("abstract", False)
