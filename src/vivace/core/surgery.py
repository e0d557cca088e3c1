"""The ledger of edits: the only way Vivace changes somebody else's object.

Every edit goes into a *slot* (one attribute of one object). A slot remembers what was there before the first
edit and keeps the edits as an ordered list of layers, so that any layer can be taken out at any time and what
remains is rebuilt from the original. When the last layer leaves, the attribute is put back exactly as it was
found: same object, or absent from the instance again.

If somebody else replaced the attribute after us (a hook that wraps our wrapper), their value is left where it is
and our wrapper below it turns into a plain call of the original, so their hook keeps working and ours is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

_ABSENT: Any = object()
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(slots=True, eq=False)
class Layer:
    """One edit of one slot: a replacement value, or a wrapper around what lies below."""

    owner: str
    value: Any = _ABSENT
    wrap: Wrapper | None = None
    on_undo: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """One attribute of one object, with the layers laid over it."""

    obj: Any
    name: str
    home: dict[str, Any]
    before: Any
    below: Any
    """What a wrapper calls in the end: the instance's own value, or what its class provides."""
    layers: list[Layer] = field(default_factory=list)
    installed: Any = _ABSENT
    chain: Any = None

    def ours(self) -> bool:
        """Whether the attribute still holds what we put there."""
        return self.home.get(self.name, _ABSENT) is self.installed

    def rebuild(self) -> None:
        """Lay the remaining layers over the original and install the result."""
        if self.installed is not _ABSENT and not self.ours():
            # Somebody wrapped or replaced us: their value stays, our part of the chain becomes what is left.
            self.chain = self._compose(self.below)
            return
        if not self.layers:
            self._restore()
            return
        if all(layer.wrap is None for layer in self.layers):
            self._install(self.layers[-1].value)
            return
        self.chain = self._compose(self.below)
        if self.installed is _ABSENT or not getattr(self.installed, "_vivace_dispatch", False):
            self._install(self._dispatcher())

    def _compose(self, value: Any) -> Any:
        for layer in self.layers:
            value = layer.wrap(value) if layer.wrap is not None else layer.value
        return value

    def _dispatcher(self) -> Callable[..., Any]:
        # A function, not an object: diffusers reads the signatures of `set_timesteps` and `step`.
        @functools.wraps(self.below)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            return self.chain(*args, **kwargs)

        dispatch._vivace_dispatch = True  # type: ignore[attr-defined]
        return dispatch

    def _install(self, value: Any) -> None:
        self.home[self.name] = value
        self.installed = value

    def _restore(self) -> None:
        if self.installed is _ABSENT:
            return
        if self.before is _ABSENT:
            self.home.pop(self.name, None)
        else:
            self.home[self.name] = self.before
        self.installed = _ABSENT


class Surgery:
    """A ledger. Edits are made under an owner (`with ledger.by("name")`) and undone by owner or all together."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, str], Slot] = {}
        self._order: list[tuple[Slot, Layer]] = []
        self._owner = "vivace"

    @contextmanager
    def by(self, owner: str) -> Iterator[Surgery]:
        """Edits inside belong to `owner`."""
        previous, self._owner = self._owner, owner
        try:
            yield self
        finally:
            self._owner = previous

    def edits(self, owner: str | None = None) -> int:
        """How many edits are live, in all or of one owner."""
        return sum(owner is None or layer.owner == owner for _, layer in self._order)

    def set(self, obj: Any, name: str, value: Any, *, on_undo: Callable[[], None] | None = None) -> None:
        """Give an instance's attribute, submodule, parameter or buffer another value."""
        self._add(obj, name, Layer(self._owner, value=value, on_undo=on_undo))

    def wrap(self, obj: Any, make: Wrapper, name: str = "forward") -> None:
        """Lay `make(old)` over a method of one instance (never of its class)."""
        self._add(obj, name, Layer(self._owner, wrap=make))

    def swap(self, parent: Any, name: str, module: Any) -> None:
        """Put another module in a parent's place `name`; a list index is given as a string."""
        if name not in parent._modules:
            raise AttributeError(f"{type(parent).__name__} has no submodule '{name}'")
        self.set(parent, name, module)

    def weight(
        self,
        module: Any,
        name: str,
        value: Any,
        *,
        keep: str = "device",
        reload: Callable[[], Any] | None = None,
    ) -> None:
        """Put another tensor in the place of a parameter.

        Args:
            value: parameter or tensor (shape free: the module's forward must know it).
            keep: where the original waits for the undo: "device" (untouched), "host" (moved to main memory,
                bytes unchanged), or "reload" (dropped; `reload()` must return it bit for bit).
        """
        import torch

        original = getattr(module, name)
        if keep not in ("device", "host", "reload") or (keep == "reload") != (reload is not None):
            raise ValueError("keep must be 'device', 'host', or 'reload' together with a reload function")
        put_back: Callable[[], None] | None = None
        if keep != "device":
            device, shape = original.device, original.shape
            host = original.data.to("cpu", copy=True) if reload is None else None

            def restore() -> None:
                data = reload() if reload is not None else host
                original.data = cast(torch.Tensor, data).to(device).view(shape)

            put_back = restore

        if not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        self.set(module, name, value, on_undo=put_back)
        if keep != "device":
            original.data = original.data.new_empty(0)

    def undo(self, owner: str) -> None:
        """Take out one owner's edits; the others stay in force."""
        self._remove([pair for pair in self._order if pair[1].owner == owner])

    def close(self) -> None:
        """Undo everything. Every edit is tried even when one fails; the first failure is raised at the end."""
        self._remove(list(self._order))

    def _add(self, obj: Any, name: str, layer: Layer) -> None:
        key = (id(obj), name)
        slot = self._slots.get(key)
        if slot is None:
            home = _home(obj, name)
            slot = Slot(obj, name, home, home.get(name, _ABSENT), getattr(obj, name, None))
        slot.layers.append(layer)
        try:
            slot.rebuild()
        except BaseException:
            slot.layers.remove(layer)
            slot.rebuild()
            raise
        self._slots[key] = slot
        self._order.append((slot, layer))

    def _remove(self, pairs: list[tuple[Slot, Layer]]) -> None:
        failure: BaseException | None = None
        for slot, layer in reversed(pairs):
            try:
                slot.layers.remove(layer)
                if layer.on_undo is not None:
                    layer.on_undo()
                slot.rebuild()
            except BaseException as error:
                failure = failure or error
            self._order.remove((slot, layer))
            if not slot.layers:
                self._slots.pop((id(slot.obj), slot.name), None)
        if failure is not None:
            raise failure


def _home(obj: Any, name: str) -> dict[str, Any]:
    """The dictionary in which an instance keeps `name`: for a torch module that may be one of four."""
    own = vars(obj)
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in own.get(kind, ()):
            return own[kind]
    return own
