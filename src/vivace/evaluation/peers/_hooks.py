"""What the caches of diffusers have in common: switched on per transformer, switched off, and forgetting.

Also the mending of its two attention caches, which keep one memory for both guidance branches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vivace.core.errors import NoEffectError
from vivace.core.quiet import quiet
from vivace.core.surgery import Surgery
from vivace.evaluation.peers.base import Installed, Peer, experts
from vivace.models.adapter import ModelDescription

REGISTERED = ("wan", "ltx", "cogvideox", "hunyuan")
"""Families whose blocks diffusers 0.42 knows how to hook."""
CACHE_CONTEXTS = ("WanPipeline", "WanImageToVideoPipeline")


class DiffusersCache(Peer):
    """A cache that diffusers switches on with `enable_cache`. A subclass gives the configuration."""

    abstract = True

    def config(self, pipeline: Any, steps: int, **settings: Any) -> Any:
        """The library's configuration object for one transformer."""
        raise TypeError(f"{type(self).__name__} gives no configuration")

    def install(self, pipeline: Any, steps: int, **settings: Any) -> Installed:
        before = {id(t): hooks(t) for t in experts(pipeline)}
        with quiet():
            for transformer in experts(pipeline):
                transformer.enable_cache(self.config(pipeline, steps, **settings))
        found = sum(len(hooks(t)) - len(before[id(t)]) for t in experts(pipeline))
        if not found:
            with quiet():
                _disable(pipeline)
            raise NoEffectError(f"{self.name} found no module to hook in {type(pipeline).__name__}.")
        return Installed(
            lambda: _disable(pipeline), lambda: forget(pipeline), effects={"hooks": float(found)}
        )


def _disable(pipeline: Any) -> None:
    with quiet():
        for transformer in reversed(experts(pipeline)):
            if transformer.is_cache_enabled:
                transformer.disable_cache()


def forget(pipeline: Any) -> None:
    """Clear what the hooks remember. diffusers does it at the end of a run only, so not after a broken one."""
    for transformer in experts(pipeline):
        transformer._reset_stateful_cache()


def hooks(transformer: Any) -> list[Any]:
    """The stateful hooks of a transformer and its submodules."""
    found: list[Any] = []
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        found += list(registry.hooks.values()) if registry is not None else []
    return found


class BranchMemory:
    """Gives every hook that keeps one `state` a state for each guidance branch.

    The pipeline announces the branch through `cache_context`; the hook's state is exchanged there.
    """

    def __init__(self, transformers: Iterable[Any]) -> None:
        self._edit = Surgery()
        self._states: dict[tuple[int, str], Any] = {}
        with self._edit.by("branch memory"):
            for transformer in transformers:
                stateful = [h for h in hooks(transformer) if hasattr(h, "state")]
                self._edit.wrap(transformer, self._exchange(stateful), "cache_context")

    def _exchange(self, stateful: list[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            @contextlib.contextmanager
            def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
                for hook in stateful:
                    key = (id(hook), name)
                    if key not in self._states:
                        self._states[key] = type(hook.state)()
                    hook.state = self._states[key]
                with old(name, **kwargs):
                    yield

            return cache_context

        return make

    def forget(self) -> None:
        """Drop all states."""
        self._states.clear()

    def close(self) -> None:
        """Take the exchange out."""
        self._states.clear()
        self._edit.close()


def by_branch(peer: DiffusersCache, pipeline: Any, installed: Installed) -> Installed:
    """The same peer with one memory for each guidance branch."""
    memory = BranchMemory(experts(pipeline))

    def undo() -> None:
        memory.close()
        installed.undo()

    def reset() -> None:
        memory.forget()
        installed.reset()

    return Installed(undo, reset, installed.effects, installed.counts)


def only(model: ModelDescription, name: str, families: tuple[str, ...]) -> str:
    """The sentence that refuses a family, or nothing."""
    if model.family in families:
        return ""
    return f"{name} knows {', '.join(families)} only, not {model.family or model.pipeline_class}."


def announces(model: ModelDescription, name: str) -> str:
    """The sentence that refuses a Wan pipeline which does not tell its guidance branch, or nothing."""
    if model.family != "wan" or model.pipeline_class in CACHE_CONTEXTS:
        return ""
    return f"{name} needs a pipeline that announces its guidance branch; {model.pipeline_class} does not."
