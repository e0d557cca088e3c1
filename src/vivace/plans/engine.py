"""The bridge to diffusers: the pipeline's own `__call__` runs, and the engine announces what it is doing.

Everything is wrapped on the instances, through the ledger: `scheduler.set_timesteps` (a generation starts),
`scheduler.step` (a step ends), `transformer.cache_context` (the guidance branch), `transformer.forward` (one
evaluation), the text encoders and the VAE (stages). The pipeline never knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vivace.core.context import COND, FUSED, UNCOND, Clock, Evaluation, StateStore
from vivace.core.counters import Meter
from vivace.core.env import Stopwatch
from vivace.core.receipt import BranchRecord, StepRecord
from vivace.core.surgery import Surgery
from vivace.models.adapter import Adapter, Expert, RootCall

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
StepListener = Callable[[Clock, StepRecord], None]


@dataclass(slots=True)
class Trace:
    """What was seen of one generation."""

    steps: list[StepRecord] = field(default_factory=list)
    marks: list[tuple[Any, Any]] = field(default_factory=list)
    stages: list[tuple[str, Any, Any]] = field(default_factory=list)
    start: Any = None
    stop: Any = None
    nfe: int = 0
    nfe_requested: int = 0
    blocks_run: float = 0.0
    blocks_total: int = 0
    samples: int = 0
    cache_bytes: int = 0
    completed: bool = False


class Engine:
    """Announces and records. One engine serves one session."""

    def __init__(
        self,
        pipeline: Any,
        adapter: Adapter | None,
        experts: tuple[Expert, ...],
        clock: Clock,
        store: StateStore,
        meter: Meter,
        device: Any,
        listener: StepListener | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self.pipeline, self.adapter, self.experts = pipeline, adapter, experts
        self.clock, self.store, self.meter = clock, store, meter
        self.watch = Stopwatch(device)
        self.listener, self.on_begin = listener, on_begin
        self.trace = Trace()
        self._waiting: list[tuple[str, Any, Any]] = []
        self._announced: str | None = None
        self._calls_in_step = 0
        self._step_start: Any = None

    # -- installation -----------------------------------------------------------------------------------------

    def install_inner(self, edit: Surgery) -> None:
        """The innermost wrapper of each transformer: counts evaluations that really reach the network."""
        for expert in self.experts:
            edit.wrap(expert.module, self._entered)

    def install_outer(self, edit: Surgery) -> None:
        """The outermost wrappers: clock, branches, stages."""
        for expert in self.experts:
            edit.wrap(expert.module, lambda old, e=expert: self._announce(old, e))
            if hasattr(expert.module, "cache_context"):
                edit.wrap(expert.module, self._branch, "cache_context")
        scheduler = self.pipeline.scheduler
        edit.wrap(scheduler, lambda old: self._begin(old, scheduler), "set_timesteps")
        edit.wrap(scheduler, self._step, "step")
        for name in _TEXT_ENCODERS:
            if (encoder := getattr(self.pipeline, name, None)) is not None:
                edit.wrap(encoder, lambda old: self._timed(old, "text"))
        vae = getattr(self.pipeline, "vae", None)
        for method in ("encode", "decode"):
            if vae is not None and hasattr(vae, method):
                edit.wrap(vae, lambda old, m=method: self._timed(old, f"vae.{m}"), method)

    # -- wrappers ---------------------------------------------------------------------------------------------

    def _begin(self, old: Callable[..., Any], scheduler: Any) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            if self.on_begin is not None:
                self.on_begin()
            out = old(*args, **kwargs)
            self.store.clear()
            self.meter.reset()
            sigmas = getattr(scheduler, "sigmas", None)
            self.clock.begin(
                tuple(scheduler.timesteps.tolist()), tuple(sigmas.tolist()) if sigmas is not None else ()
            )
            self.trace = Trace(start=self.watch.mark(), stages=self._waiting)
            self._waiting, self._calls_in_step, self._announced = [], 0, None
            self._open_step()
            return out

        return set_timesteps

    def _open_step(self) -> None:
        clock = self.clock
        sigma = clock.sigma
        self.trace.steps.append(StepRecord(clock.step, clock.timestep, sigma if sigma == sigma else None))
        self._step_start = self.watch.mark()

    def _step(self, old: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            out = old(*args, **kwargs)
            if self.clock.running:
                self._close_step()
            return out

        return step

    def _close_step(self) -> None:
        trace, clock = self.trace, self.clock
        trace.marks.append((self._step_start, self.watch.mark()))
        self._calls_in_step = 0
        if self.listener is not None:
            self.listener(clock, trace.steps[-1])
        if clock.advance():
            trace.stop, trace.completed = self.watch.mark(), True
            self.stop()
        else:
            self._open_step()

    def stop(self) -> None:
        """The denoising is over, in whatever way: nothing of it stays in memory."""
        if self.clock.running:
            self.trace.cache_bytes = self.store.nbytes()
        self.clock.end()
        self.store.clear()

    def _branch(self, old: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self._announced = self._announced, name
            try:
                with old(name, **kwargs):
                    yield
            finally:
                self._announced = before

        return cache_context

    def branch(self) -> str:
        """The guidance branch of the call under way: told by the pipeline, or by its place in the step."""
        if self.adapter is not None and self.adapter.fused_now(self.pipeline):
            return FUSED
        if self._announced in (COND, UNCOND):
            return self._announced
        # Pipelines that announce nothing evaluate the conditional branch first.
        return COND if self._calls_in_step == 0 else UNCOND

    def _announce(self, old: Callable[..., Any], expert: Expert) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            clock, trace = self.clock, self.trace
            if not clock.running or clock.evaluation is not None:
                return old(*args, **kwargs)
            call = RootCall.bind(expert.module, args, kwargs)
            branch = self.branch()
            weight = 2 if branch == FUSED else 1
            evaluation = Evaluation(
                clock.step,
                branch,
                expert.name,
                weight,
                blocks_total=len(expert.blocks),
                rows=call.rows,
                key=call.key,
                grid=self.adapter.grid_of_call(expert.config, call.values) if self.adapter else None,
            )
            clock.branch, clock.expert, clock.evaluation = branch, expert.name, evaluation
            trace.samples = max(trace.samples, call.rows // weight)
            self._calls_in_step += 1
            try:
                with self.meter.evaluation(evaluation):
                    return old(*args, **kwargs)
            finally:
                clock.evaluation = None
                self._record(evaluation)

        return forward

    def _record(self, e: Evaluation) -> None:
        trace, total = self.trace, e.blocks_total * e.requested
        trace.nfe_requested += e.requested
        trace.blocks_total += total
        trace.blocks_run += e.blocks_run
        trace.nfe += e.nfe
        trace.steps[-1].branches.append(
            BranchRecord(e.branch, e.expert, e.action, round(e.blocks_run, 6), total, ", ".join(e.by))
        )

    def _entered(self, old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            e = self.clock.evaluation
            if e is not None:
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                e.enter(hidden.shape[0])
            return old(*args, **kwargs)

        return forward

    def _timed(self, old: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.watch.mark()
            out = old(*args, **kwargs)
            if stage == "vae.decode":
                self.trace.stages.append((stage, start, self.watch.mark()))
            else:
                # Encoders run before the generation they belong to starts.
                (self.trace.stages if self.clock.running else self._waiting).append(
                    (stage, start, self.watch.mark())
                )
            return out

        return call

    # -- results ----------------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        """Seconds per stage of the last generation; fills in the seconds of its steps."""
        trace, watch = self.trace, self.watch
        for record, (start, stop) in zip(trace.steps, trace.marks, strict=False):
            record.seconds = watch.seconds(start, stop)
        out = {"text": 0.0, "denoise": 0.0, "vae": 0.0}
        if trace.start is not None and trace.marks:
            out["denoise"] = watch.seconds(trace.start, trace.stop or trace.marks[-1][1])
        for stage, start, stop in trace.stages:
            out[stage.partition(".")[0]] += watch.seconds(start, stop)
        return out
