"""Putting back what a peer's own undo leaves behind: attributes, hooks, the order of submodules, class attributes."""

from __future__ import annotations

from typing import Any

from vivace.evaluation.peers.base import experts

_ABSENT: Any = object()


class Snapshot:
    """The transformers of a pipeline, the pipeline's own attributes and its class, as they now are.

    Identities are kept, not copies: a tensor that a peer replaced is put back as the same object.
    """

    def __init__(self, pipeline: Any) -> None:
        self._class = type(pipeline)
        self._attributes = dict(vars(self._class))
        self._objects: list[tuple[Any, dict[str, Any], dict[str, dict[Any, Any]]]] = []
        self._keep(pipeline)
        for transformer in experts(pipeline):
            for module in transformer.modules():
                self._keep(module)
                if (processor := vars(module).get("processor")) is not None:
                    self._keep(processor)
        self._backend = _attention_backend()

    def _keep(self, obj: Any) -> None:
        own = dict(getattr(obj, "__dict__", {}))
        inner = {k: dict(v) for k, v in own.items() if k.startswith("_") and isinstance(v, dict)}
        self._objects.append((obj, own, inner))

    def restore(self) -> None:
        """Make everything as it was, whatever has been done since."""
        for obj, own, inner in self._objects:
            home = obj.__dict__ if hasattr(obj, "__dict__") else {}
            _refill(home, own)
            for key, entries in inner.items():
                _refill(own[key], entries)
        for key in set(vars(self._class)) | set(self._attributes):
            before = self._attributes.get(key, _ABSENT)
            if before is _ABSENT:
                type.__delattr__(self._class, key)
            elif vars(self._class).get(key, _ABSENT) is not before:
                type.__setattr__(self._class, key, before)
        _put_attention_backend(self._backend)


def _refill(home: dict[Any, Any], entries: dict[Any, Any]) -> None:
    same = len(home) == len(entries) and all(
        a is b and home[a] is entries[b] for a, b in zip(home, entries, strict=True)
    )
    if not same:
        # Emptied first, so that the order of submodules, and with it of a state dict, comes back too.
        home.clear()
        home.update(entries)


def _attention_backend() -> Any:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._active_backend


def _put_attention_backend(value: Any) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    # Setting a backend on one model makes it the default of the whole process (diffusers 0.42).
    if _AttentionBackendRegistry._active_backend is not value:
        setattr(_AttentionBackendRegistry, "_active_backend", value)  # noqa: B010
