"""Model offload: one component of the pipeline on the device at a time, the others in main memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from vivace.core.errors import ConfigError
from vivace.core.footprint import Footprint
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription
from vivace.techniques.base import Card, Cite, Paradigm, Problem, Stage, Target, Technique, exclusive, knob
from vivace.techniques.compression import placing

NAME = "model_offload"


@dataclass(frozen=True, kw_only=True)
class ModelOffload(Technique):
    """Text encoder, transformers and VAE come to the device when they are called, and leave for the next one.

    The hooks are accelerate's `CpuOffload`, chained in the pipeline's own order, as diffusers'
    `enable_model_cpu_offload` does it; they are called from wrappers in the ledger, so that they stack with every other
    edit and leave without a trace. Costs one copy of every component a clip.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.COMPRESSION,
        summary="Keeps one component on the device at a time: as much memory as the largest one takes.",
        objective="memory of the device",
        stage=Stage.PLACEMENT,
        claims=(exclusive("placement"),),
        packages=("accelerate",),
        lossless=True,
        cite=Cite(
            title="Model offloading (diffusers' enable_model_cpu_offload, accelerate's cpu_offload_with_hook)",
            code="https://github.com/huggingface/accelerate",
            differs="the same hooks, kept in the ledger instead of on the module; after a clip all components wait",
        ),
    )

    device: str = placing.AUTO
    """Where components run: `auto` for this machine's GPU. `cpu` goes all the way and saves nothing: for tests."""
    keep_on: str = knob("", choices=("", "transformer", "text_encoder", "vae"))
    """One component that stays on the device all the time; none by default."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        import torch

        return (cls(device=placing.AUTO if torch.cuda.is_available() else "cpu"),)

    def check(self, model: ModelDescription) -> list[Problem]:
        if why := placing.device_complaint(self.device):
            return [self.problem("device", why)]
        return []

    def memory(self, model: ModelDescription, workload: Workload, base: Footprint) -> Footprint:
        return replace(base, placement="model_offload")

    def apply(self, target: Target) -> None:
        from accelerate.hooks import CpuOffload, UserCpuOffloadHook

        device = placing.accelerator(self.device)
        if device is None:
            raise ConfigError(f"{NAME}: {placing.NO_DEVICE}")
        found = placing.components(target.pipeline)
        moved: list[Any] = []
        before = None
        for name, module in found.items():
            stays = name == self.keep_on or name in getattr(target.pipeline, "_exclude_from_cpu_offload", ())
            hook = CpuOffload(device, prev_module_hook=None if stays else before)
            # diffusers asks this attribute where a pipeline computes; its VAEs call it before they decode.
            target.edit.set(module, "_hf_hook", hook, on_undo=placing.putting_back(module))
            if not stays:
                before = UserCpuOffloadHook(module, hook)
                moved.append(before)
            for method in placing.entries(name, module):
                target.edit.wrap(module, self._called(target, module, hook), method)
        if hasattr(target.pipeline, "maybe_free_model_hooks"):
            target.edit.wrap(target.pipeline, lambda old: _freeing(old, moved), "maybe_free_model_hooks")
        for user_hook in moved:
            user_hook.offload()
        for module in found.values():
            if not any(h.model is module for h in moved):
                module.to(device)
        waiting = sum(t.nbytes for h in moved for t in (*h.model.parameters(), *h.model.buffers()))
        target.report(NAME, "bytes_waiting", waiting)

    @staticmethod
    def _called(target: Target, module: Any, hook: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(old: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                target.report(NAME, "calls", 1)
                args, kwargs = hook.pre_forward(module, *args, **kwargs)
                return hook.post_forward(module, old(*args, **kwargs))

            return call

        return make


def _freeing(old: Callable[..., Any], moved: list[Any]) -> Callable[..., Any]:
    """At the end of a clip the last component leaves the device too."""

    def free() -> Any:
        out = old()
        for hook in moved:
            hook.offload()
        return out

    return free
