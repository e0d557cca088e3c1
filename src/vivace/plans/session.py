"""A session: one plan in force on one pipeline, until it is closed and the pipeline is its owner's again."""

from __future__ import annotations

import inspect
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vivace.core.context import Clock, StateStore
from vivace.core.counters import Meter
from vivace.core.env import environment
from vivace.core.errors import ConfigError, ModelError, NoEffectError, SessionError
from vivace.core.receipt import KernelRecord, Receipt, TechniqueRecord
from vivace.core.seeding import generators
from vivace.core.surgery import Surgery
from vivace.models.adapter import EXPERTS, ModelDescription
from vivace.models.describe import describe_pipeline
from vivace.models.families import for_module
from vivace.plans.counting import install
from vivace.plans.engine import Engine, StepListener
from vivace.plans.plan import Plan
from vivace.techniques.base import Stage, Target, Technique

if TYPE_CHECKING:
    import numpy as np

    from vivace.kernels.api import Choice
    from vivace.models.adapter import Expert

_live: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
_SETTINGS_FOR_US = ("vae", "fps")


@dataclass(slots=True)
class Output:
    """What a generation gave.

    `frames` is uint8 (T, H, W, 3) of the first sample, `videos` holds all of them; both are empty when the caller
    asked the pipeline for latents. `raw` is the pipeline's own return value.
    """

    frames: np.ndarray | None
    videos: list[np.ndarray]
    receipt: Receipt
    raw: Any


class Session:
    """The handle that `accelerate` returns: call it like the pipeline; `close()` or leave the `with` to undo all.

    Args:
        pipeline: any diffusers video pipeline.
        plan: the plan, or the name or path of one.
        model: its description; found from the pipeline when left out.
        counters: count work (needed for receipts). Off only to measure the counters' own cost.
        compile_backend: compile block bodies with this `torch.compile` backend, inside all caches.
        on_step: called after every step with the clock and the step's record (progress bars).

    Raises:
        PlanError: the plan cannot run on this model; nothing has been changed.
        NoEffectError: a technique found nothing to change; everything has been undone.
        SessionError: the pipeline is in another session.
    """

    def __init__(
        self,
        pipeline: Any,
        plan: Plan | str | Path = "fast",
        *,
        model: ModelDescription | None = None,
        counters: bool = True,
        compile_backend: str | None = None,
        on_step: StepListener | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.model = model or describe_pipeline(pipeline)
        if pipeline in _live:
            raise SessionError("this pipeline is in another session; close that one first.")
        self._model_hash = ""
        if any(t.card.name in self.plan.optional and self._is_fitted(t) for t in self.plan.techniques):
            # Whether an optional technique was made for these weights decides what stands in for it.
            self.model = replace(self.model, weights=self._hash())
        self.warnings = [str(p) for p in self.plan.check(self.model)]
        self.plan = self.plan.fitted(self.model)
        self.edit = Surgery()
        self.clock = Clock()
        self.store = StateStore(self.clock)
        self.meter = Meter(self.clock)
        self._effects: dict[str, dict[str, float]] = {}
        self._standing: dict[str, dict[str, float]] = {}
        self._fresh = False
        self._kernels: dict[tuple[str, str], KernelRecord] = {}
        self._total: float | None = None
        self._closed = False
        self._counters = counters
        try:
            self._open(compile_backend, on_step)
        except BaseException:
            self.edit.close()
            raise
        _live[pipeline] = self

    # -- opening and closing ----------------------------------------------------------------------------------

    def _open(self, compile_backend: str | None, on_step: StepListener | None) -> None:
        modules = self._modules()
        if not modules:
            raise ModelError(
                f"{type(self.pipeline).__name__} has no transformer; Vivace drives video transformers."
            )
        adapter = for_module(next(iter(modules.values())))
        plan = self.plan.ordered()
        if any(t.card.calibration != "none" for t in plan):
            self._hash()
        early = [t for t in plan if t.card.stage.number < Stage.COMPILE.number]
        for technique in early:
            self._apply(technique, self._target(adapter, modules))
        # Sites are looked up again: a weight technique may have put new modules in their places.
        target = self._target(adapter, modules)
        if self._counters or compile_backend is not None:
            install(self.edit, self.meter, target.experts, compile_backend)
        self.engine = Engine(
            self.pipeline,
            adapter,
            target.experts,
            self.clock,
            self.store,
            self.meter,
            self._device(),
            on_step,
            self._begin,
        )
        with self.edit.by("engine"):
            self.engine.install_inner(self.edit)
        for technique in plan:
            if technique not in early:
                self._apply(technique, target)
        with self.edit.by("engine"):
            self.engine.install_outer(self.edit)
        self._blocks = {e.name: [b.site for b in e.blocks] for e in target.experts}
        # What was reported while opening (layers converted, bytes) holds for every generation.
        self._standing = {name: dict(effects) for name, effects in self._effects.items()}

    def _target(self, adapter: Any, modules: dict[str, Any]) -> Target:
        from vivace.models.adapter import Expert

        experts: tuple[Expert, ...] = tuple(
            adapter.expert(name, module) if adapter is not None else Expert(name, module)
            for name, module in modules.items()
        )
        return Target(
            self.pipeline,
            self.model,
            adapter,
            experts,
            self.edit,
            self.clock,
            self.store,
            self._report,
            self._chose,
            self._model_hash,
            self.meter.beside,
        )

    def _is_fitted(self, technique: Technique) -> bool:
        """Whether a technique has what it needs for this model, and that may depend on the weights."""
        return technique.card.calibration != "none" and not technique.missing(self.model)

    def _modules(self) -> dict[str, Any]:
        """The transformers by the pipeline's names."""
        return {e: m for e in EXPERTS if (m := getattr(self.pipeline, e, None)) is not None}

    def _hash(self) -> str:
        """Of the weights before anything is changed; empty where not all of them are in memory."""
        modules = self._modules()
        if not self._model_hash and not any(p.is_meta for m in modules.values() for p in m.parameters()):
            from vivace.calibration.artifact import model_hash

            self._model_hash = model_hash(self.pipeline)
        return self._model_hash

    def _apply(self, technique: Technique, target: Target) -> None:
        name = technique.card.name
        before = self.edit.edits(name)
        with self.edit.by(name):
            technique.apply(target)
        if self.edit.edits(name) == before:
            if technique.may_decline:
                self.warnings.append(f"{name} changed nothing: it would gain nothing on this device.")
                return
            raise NoEffectError(
                f"{name} found nothing to change in {self.model.name}; leave it out of the plan."
            )

    def close(self) -> None:
        """Give the pipeline back as it was. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        _live.pop(self.pipeline, None)
        self.engine.stop()
        self.edit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- running ----------------------------------------------------------------------------------------------

    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, seed: int | Sequence[int] = 0, **call: Any
    ) -> Output:
        """Generate. Everything but `seed` goes to the pipeline; what is left out comes from the model's defaults.

        Args:
            prompt: one prompt or a batch.
            seed: one seed (sample i of a batch gets seed + i) or one for each sample.
            call: the pipeline's own arguments; they win over the plan's.

        Raises:
            ShapeError: frames, height or width the model cannot make.
        """
        if self._closed:
            raise SessionError("this session is closed; call vivace.accelerate again.")
        if prompt is not None:
            call["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        self.clock.steps_are_the_users = any(
            call.get(k) is not None for k in ("num_inference_steps", "timesteps")
        )
        call = self._arguments(call, seed)
        self._forget_effects()
        self._fresh = True
        self._reset_peak()
        start = time.perf_counter()
        try:
            raw = self.pipeline(**call)
        finally:
            self.clock.steps_are_the_users = False
            self.engine.stop()
        self._synchronise()
        self._total = time.perf_counter() - start
        # Latents of nine frames look like a three-channel clip, so they are told by what was asked for.
        videos = [] if call.get("output_type") == "latent" else _videos(getattr(raw, "frames", raw))
        receipt = self.receipt()
        self._total = None
        return Output(videos[0] if videos else None, videos, receipt, raw)

    def _arguments(self, call: dict[str, Any], seed: int | Sequence[int]) -> dict[str, Any]:
        accepted = inspect.signature(type(self.pipeline).__call__).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        if not open_ended and (unknown := sorted(set(call) - set(accepted))):
            raise ConfigError(
                f"{type(self.pipeline).__name__} takes no argument called {', '.join(unknown)}."
            )
        defaults = {
            k: v for k, v in self.model.defaults.items() if k in accepted and k not in _SETTINGS_FOR_US
        }
        call = defaults | call
        if self.model.pixels and all(call.get(k) for k in ("num_frames", "height", "width")):
            self.model.pixels.check(call["num_frames"], call["height"], call["width"])
        if "generator" in accepted and call.get("generator") is None:
            prompts = call.get("prompt", call.get("prompt_embeds"))
            samples = 1 if isinstance(prompts, str) or prompts is None else len(prompts)
            per_prompt = call.get("num_videos_per_prompt") or 1
            call["generator"] = generators(seed, samples * per_prompt)
            if len(call["generator"]) == 1:
                call["generator"] = call["generator"][0]
        return call

    # -- receipt ----------------------------------------------------------------------------------------------

    def receipt(self) -> Receipt:
        """The receipt of the last generation, also of one the pipeline was asked for directly."""
        trace, meter = self.engine.trace, self.meter
        stages = self.engine.seconds()
        total = self._total if self._total is not None else sum(stages.values())
        stages |= {"other": max(0.0, total - sum(stages.values())), "total": total}
        dense = meter.dense(self._blocks)
        techniques = [self._technique_record(t) for t in self.plan.ordered()]
        idle = [
            f"{t.card.name} was in force and never acted in this run"
            for t, r in zip(self.plan.ordered(), techniques, strict=True)
            if t.card.stage.number >= Stage.TOKENS.number and trace.completed and not any(r.effects.values())
        ]
        return Receipt(
            nfe=trace.nfe,
            nfe_requested=trace.nfe_requested,
            blocks_run=round(trace.blocks_run, 6),
            blocks_total=trace.blocks_total,
            attention_pairs=meter.total.pairs,
            attention_pairs_dense=dense.pairs_dense,
            attention_pairs_in_run_blocks=meter.total.pairs_dense,
            flops=meter.total.flops,
            flops_dense=dense.flops_dense,
            cache_hits=int(sum(r.effects.get("hits", 0) for r in techniques)),
            cache_bytes=trace.cache_bytes,
            weight_bytes=self._weight_bytes(),
            peak_bytes=self._peak(),
            samples=trace.samples,
            completed=trace.completed,
            stages=stages,
            steps=list(trace.steps),
            techniques=techniques,
            kernels=list(self._kernels.values()),
            environment=environment(self._device()),
            plan=self.plan.to_dict(),
            model={
                "name": self.model.name,
                "pipeline": self.model.pipeline_class,
                "family": self.model.family,
            },
            warnings=[*self.warnings, *idle],
        )

    def _technique_record(self, t: Technique) -> TechniqueRecord:
        settings = {k: v for k, v in t.to_dict().items() if not k.startswith("_")}
        name = t.card.name
        effects = dict(self._effects.get(name, {}))
        return TechniqueRecord(
            name, t.card.paradigm.value, settings, str(t.card.cite), self.edit.edits(name), effects
        )

    def _begin(self) -> None:
        """A generation starts: one the pipeline was asked for directly must not add to the effects of the last."""
        if not self._fresh:
            self._forget_effects()
        self._fresh = False

    def _forget_effects(self) -> None:
        self._effects = {name: dict(effects) for name, effects in self._standing.items()}

    def _report(self, technique: str, effect: str, amount: float) -> None:
        effects = self._effects.setdefault(technique, {})
        effects[effect] = effects.get(effect, 0) + amount

    def _chose(self, choice: Choice) -> None:
        self._kernels.setdefault(
            (choice.op, choice.name), KernelRecord(choice.op, choice.name, choice.why)
        ).calls += 1

    def _device(self) -> Any:
        transformer = next(m for e in EXPERTS if (m := getattr(self.pipeline, e, None)) is not None)
        # Offloaded weights wait elsewhere than where they are used.
        used = getattr(getattr(transformer, "_hf_hook", None), "execution_device", None)
        if used is None:
            return next(transformer.parameters()).device
        import torch

        return torch.device(used)

    def _weight_bytes(self) -> int:
        modules = (m for e in EXPERTS if (m := getattr(self.pipeline, e, None)) is not None)
        return sum(_bytes(p) for m in modules for p in [*m.parameters(), *m.buffers()])

    def _reset_peak(self) -> None:
        if (device := self._device()).type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def _synchronise(self) -> None:
        if (device := self._device()).type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    def _peak(self) -> int | None:
        """Peak bytes: of the GPU's allocator since the call began, or of the whole process on a CPU."""
        device = self._device()
        if device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(device)
        try:
            import resource
        except ImportError:  # not on Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def accelerate(pipeline: Any, plan: Plan | str | Path = "fast", **options: Any) -> Session:
    """Put a plan in force on a pipeline. See `Session` for options and errors.

    Use it as a context manager, or keep the handle and call `close()`; either way the pipeline comes back bit for
    bit as it was.
    """
    return Session(pipeline, plan, **options)


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; of its parts for a quantised tensor subclass."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, n)) for n in names)
    return tensor.numel() * tensor.element_size()


def _videos(frames: Any) -> list[np.ndarray]:
    """A pipeline's frames as a list of uint8 (T, H, W, 3); empty for latents."""
    import numpy as np
    import torch

    if isinstance(frames, tuple):
        frames = frames[0]
    if isinstance(frames, list) and frames and isinstance(frames[0], list):
        return [np.stack([np.asarray(image.convert("RGB")) for image in video]) for video in frames]
    if isinstance(frames, torch.Tensor):
        if frames.ndim != 5 or 3 not in (frames.shape[1], frames.shape[2]):
            return []
        frames = frames.detach().float().cpu().numpy()
        frames = np.moveaxis(frames, 2 if frames.shape[2] == 3 else 1, -1)
    frames = np.asarray(frames)
    if frames.ndim != 5 or frames.shape[-1] != 3:
        return []
    if frames.dtype != np.uint8:
        frames = (np.clip(frames, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return list(frames)
