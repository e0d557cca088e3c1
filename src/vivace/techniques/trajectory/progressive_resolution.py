"""Progressive resolution: a part of the trajectory at a smaller latent size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.core.shapes import TokenGrid, Workload
from vivace.models.adapter import Expert, ModelDescription, Need, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Problem,
    RootHandler,
    Stage,
    Target,
    Technique,
    exclusive,
    knob,
    reads,
    shared,
)
from vivace.techniques.trajectory.resampling import (
    Size,
    jump,
    seeds_of,
    shifted,
    shrink_noise,
    small_size,
)

if TYPE_CHECKING:
    import torch

NAME = "progressive_resolution"


@dataclass(frozen=True, slots=True)
class Start:
    """What the first step knew: the full size, and a seed for every sample from its first noise."""

    size: Size
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ProgressiveResolution(Technique):
    """Some steps run on latents of `scale` times the height and width; the first and the last size are the caller's.

    The pipeline's own latents become small: the first noise is shrunk before the first evaluation, and the scheduler
    hands back latents of another size where the stage changes. There the step is x' = (1 - s') R(x - s v) + s' n,
    with R the resampling, s and s' the noise levels before and after, and n new noise from a generator seeded by the
    sample's first noise. Multistep memory of the solver, and what caches remember, begins anew.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Runs a part of the steps at a smaller resolution, and the last ones at full size.",
        objective="fewer tokens per network evaluation",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("tokens.set"), reads("sampler.solver"), shared("sampler.schedule")),
        needs=(Need.TOKEN_GRID, Need.FLOW_SCHEDULER),
        cite=Cite(
            title="Training-free Diffusion Acceleration with Bottleneck Sampling; the growing resolution of "
            "Training-Free Efficient Video Generation via Dynamic Token Carving",
            arxiv="2503.18940, 2505.16864",
            code="https://github.com/tyfeld/Bottleneck-Sampling",
            differs="every stage keeps its place in the pipeline's schedule, with one optional shift of the small "
            "stage; the first noise is shrunk without loss of variance; text attention is not biased",
        ),
    )

    scale: float = knob(0.5, low=0.5, high=1.0, identity=1.0)
    """Height and width of the small stage as a share of the full ones, rounded down to whole tokens."""
    shape: str = knob("low_high", choices=("low_high", "bottleneck"))
    """`low_high`: small, then full. `bottleneck`: full, small, full."""
    share: float = knob(0.5, low=0.0, high=1.0, identity=0.0, monotone="flops")
    """Share of the steps that is small; at least one full step follows (and one precedes in a bottleneck)."""
    reshift: float = knob(1.0, low=0.25, high=4.0)
    """Factor on the flow shift of the small stage; 1 keeps the schedule, `scale` is the rule for fewer tokens."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        return (cls(), cls(shape="bottleneck", reshift=0.5))

    def small_steps(self, steps: int) -> range:
        """Which of the steps are small."""
        if self.scale == 1.0:
            return range(0)
        wanted, fixed = int(self.share * steps + 0.5), 1 if self.shape == "low_high" else 2
        count = max(0, min(wanted, steps - fixed))
        first = 0 if self.shape == "low_high" or not count else max(1, (steps - count) // 2)
        return range(first, first + count)

    # -- before anything runs ---------------------------------------------------------------------------------

    def check(self, model: ModelDescription) -> list[Problem]:
        if model.adapter is None:
            return []  # the plan says that there is no token grid
        if any(kind in model.pipeline_class for kind in ("ImageToVideo", "VideoToVideo")) or any(
            e.config.get("out_channels") not in (None, e.config.get("in_channels")) for e in model.experts
        ):
            message = "the picture or video it starts from comes at full size; use it for text-to-video."
            return [self.problem("condition", f"{model.name} cannot be run smaller: {message}")]
        workload = model.workload()
        if not model.takes_latents(workload):
            message = "its transformer takes packed latents, whose size the pipeline fixes; leave it out."
            return [self.problem("packed", f"{model.name} cannot be run smaller: {message}")]
        out = []
        if not self.small_steps(workload.steps):
            message = f"share={self.share:g} of {workload.steps} steps is no step, so it never acts."
            out.append(self.problem("pointless", message, "warning"))
        full, small = _grid(model, workload), self._small_grid(model, workload)
        if small.height * full.width != small.width * full.height:
            message = (
                f"scale={self.scale:g} makes {full.width}x{full.height} tokens {small.width}x{small.height}, "
                "which changes the aspect ratio a little; choose a scale that divides both sides."
            )
            out.append(self.problem("aspect", message, "warning"))
        return out

    def _small_grid(self, model: ModelDescription, workload: Workload) -> TokenGrid:
        grid = _grid(model, workload)
        height, width = small_size((grid.height, grid.width), (1, 1), self.scale)
        return TokenGrid(grid.frames, height, width, grid.text, grid.text_first)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact NFE and blocks; exact attention pairs where text is attended to apart; bounds for FLOPs."""
        if model.adapter is None or not workload.steps:
            return base
        part = len(self.small_steps(workload.steps)) / workload.steps
        full, small = _grid(model, workload), self._small_grid(model, workload)
        kinds = list(model.adapter.attention.values())
        ratio = small.video / full.video
        if "joint" in kinds:
            # Attention among text tokens alone, whose share is not known, costs the same at every size.
            return base.scaled(1 - part * (1 - ratio**2), 1.0, fields=("attention_pairs", "flops"))
        crossed = kinds.count("cross") * workload.text
        pairs = ratio * (kinds.count("self") * small.video + crossed)
        pairs /= kinds.count("self") * full.video + crossed
        out = base.scaled(1 - part * (1 - pairs), fields=("attention_pairs",))
        head_dim = model.experts[0].head_dim
        flops = []
        # Outside attention a text token, and the timestep, cost at most what a video token does.
        fixed = (workload.text + 1) / (full.video + workload.text + 1)
        for end, rest_ratio in ((0, ratio), (1, ratio + (1 - ratio) * fixed)):
            attention = 4.0 * head_dim * base.attention_pairs[end]
            rest = base.flops[end] - attention
            flops.append(attention * (1 - part * (1 - pairs)) + rest * (1 - part * (1 - rest_ratio)))
        return Estimate(out.nfe, out.blocks_run, out.attention_pairs, (flops[0], flops[1]))

    # -- running ----------------------------------------------------------------------------------------------

    def apply(self, target: Target) -> None:
        scheduler = target.scheduler
        signature = inspect.signature(scheduler.step)
        target.edit.wrap(scheduler, lambda old: self._set_timesteps(target, old), "set_timesteps")
        target.edit.wrap(scheduler, lambda old: self._step(target, signature, old), "step")
        for expert in target.experts:
            target.around_expert(expert, self._handler(target, expert))

    def _set_timesteps(self, target: Target, old: Callable[..., Any]) -> Callable[..., Any]:
        """The schedule with the small stage's shift changed."""

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            out = old(*args, **kwargs)
            scheduler = target.scheduler
            small = self.small_steps(len(scheduler.timesteps))
            if self.reshift == 1.0 or not small:
                return out
            sigmas, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
            part = slice(small.start, small.stop)
            sigmas[part] = shifted(sigmas[part], self.reshift)
            times = sigmas[part] * scheduler.config.num_train_timesteps
            timesteps[part] = times.to(timesteps.device, timesteps.dtype)
            scheduler.sigmas, scheduler.timesteps = sigmas, timesteps
            target.report(NAME, "steps_shifted", len(small))
            return out

        return set_timesteps

    def _handler(self, target: Target, expert: Expert) -> RootHandler:
        """Gives the network small latents where the pipeline still holds full ones, and says what it works on."""
        clock, adapter = target.clock, target.adapter
        assert adapter is not None

        def handler(call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
            evaluation = clock.evaluation
            if evaluation is None or clock.step not in self.small_steps(clock.num_steps):
                return run(call)
            values, hidden = dict(call.values), call.values["hidden_states"]
            if clock.step == 0:
                size = self._small(target, expert, hidden)
                values["hidden_states"] = hidden = shrink_noise(hidden, size)
            grid = adapter.grid_of_call(expert.config, values)
            if (time := values.get("timestep")) is not None and time.ndim == 2:
                # A timestep for every token: without a picture they are all the same.
                values["timestep"] = time[:, :1].expand(-1, grid.video)
            smaller = RootCall(values, call.rows)
            evaluation.key, evaluation.grid = smaller.key, grid
            evaluation.mark(NAME)
            return run(smaller)

        return handler

    def _small(self, target: Target, expert: Expert, latents: torch.Tensor) -> Size:
        assert target.adapter is not None
        _, *patch = target.adapter.patch(expert.config)
        return small_size((latents.shape[-2], latents.shape[-1]), (patch[0], patch[1]), self.scale)

    def _step(
        self, target: Target, signature: inspect.Signature, old: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The solver's step; where the stage changes, its result is replaced by the state at the other size."""
        clock = target.clock

        def step(*args: Any, **kwargs: Any) -> Any:
            small = self.small_steps(clock.num_steps) if clock.running else range(0)
            if not small:
                return old(*args, **kwargs)
            call, now = signature.bind(*args, **kwargs), clock.step
            sample = call.arguments["sample"]
            if now == 0:
                _remember(target, Start(tuple(sample.shape[-2:]), tuple(seeds_of(sample))))
                if 0 in small:
                    sample = shrink_noise(sample, self._small(target, target.experts[0], sample))
                    call.arguments["sample"] = sample
            out = old(*call.args, **call.kwargs)
            if now in small:
                target.report(NAME, "small_steps", 1)
            if clock.last or (now in small) == (now + 1 in small):
                return out
            start = _remembered(target)
            size = start.size if now in small else self._small(target, target.experts[0], sample)
            seeds = [seed + now for seed in start.seeds]
            velocity = call.arguments["model_output"]
            state = jump(sample, velocity, clock.sigmas[now], clock.sigmas[now + 1], size, seeds)
            _forget_the_past(target)
            _remember(target, start)
            target.report(NAME, "jumps", 1)
            return _with_sample(out, state)

        return step


def _grid(model: ModelDescription, workload: Workload) -> TokenGrid:
    grid = model.grid(workload)
    assert grid is not None
    return grid


def _remember(target: Target, start: Start) -> None:
    """Keep `start` for all experts: the one that is current at a jump need not be the one of the first step."""
    before = target.clock.expert
    try:
        for expert in target.experts:
            target.clock.expert = expert.name
            target.store.shared(NAME, "start", lambda: start)
    finally:
        target.clock.expert = before


def _remembered(target: Target) -> Start:
    def missing() -> Start:
        raise RuntimeError(f"{NAME}: the generation did not begin with its first step.")

    return target.store.shared(NAME, "start", missing)


def _forget_the_past(target: Target) -> None:
    """What solver and caches remember has another size from now on."""
    scheduler = target.scheduler
    blank = {"model_outputs": [None] * len(getattr(scheduler, "model_outputs", ()))}
    for name, value in {**blank, "lower_order_nums": 0, "last_sample": None}.items():
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)
    target.store.clear()


def _with_sample(out: Any, sample: torch.Tensor) -> Any:
    """A scheduler's return value with another sample."""
    if isinstance(out, tuple):
        return (sample.to(out[0].dtype), *out[1:])
    return type(out)(prev_sample=sample.to(out.prev_sample.dtype))
