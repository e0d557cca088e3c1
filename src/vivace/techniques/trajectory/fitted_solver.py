"""Fitted solver: few evaluations at chosen noise levels, summed with weights fitted to the model's own trajectories."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vivace.calibration.artifact import key_of, noise_schedule
from vivace.calibration.solver import COMMAND, SolverFile
from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.errors import ConfigError
from vivace.core.shapes import Workload
from vivace.models.adapter import ModelDescription, Need, RootCall
from vivace.techniques.base import (
    Card,
    Cite,
    Estimate,
    Paradigm,
    Stage,
    Target,
    Technique,
    exclusive,
)

if TYPE_CHECKING:
    import torch

NAME = "fitted_solver"
_FOLDER = "solvers"
_SAME = 0.01
"""Relative difference up to which a guidance scale is the fitted one: it may be read off outputs in bf16."""
STEPS = 14
"""Of a shipped solver, when nothing is said."""


@dataclass(slots=True, eq=False)
class Memory:
    """What a generation leaves behind."""

    features: list[torch.Tensor] = field(default_factory=list)
    """float32 (B, C, ...): what every evaluation added."""
    start: list[torch.Tensor] = field(default_factory=list)
    """The sample that the first fitted step starts from, once it is there."""
    now: dict[str, torch.Tensor] = field(default_factory=dict)
    """Outputs of the step under way, by branch."""


@dataclass(frozen=True, kw_only=True)
class FittedSolver(Technique):
    """Replace the solver by one that was fitted to land on this model's exact trajectory.

    The network is evaluated at a few steps of the exact run's grid. Up to the first that is left out, the run is the
    exact one, bit by bit. After each later evaluation the next sample is a weighted sum of the sample at that gap and
    of all outputs so far. The weights come from a file that `vivace calibrate --solver` makes from a few prompts; for
    the embedded model such files come with Vivace (`steps`).

    It stands in for the exact run's own number of steps: a caller who gives another `num_inference_steps` (neither the
    grid's nor the solver's) or noise levels of his own gets the pipeline's scheduler, and the receipt warns that the
    solver never acted. A solver is fitted to the guided output or to both branches' outputs apart, fused or not.
    Another guidance scale than the fitted one is obeyed, and the receipt counts it as `off_guidance`; there, and at
    another shape, the solver is less exact. Other weights and another noise schedule are refused.
    """

    card: ClassVar[Card] = Card(
        name=NAME,
        paradigm=Paradigm.TRAJECTORY,
        summary="Makes the exact run's video in few evaluations, by a solver fitted to the model.",
        objective="least distance to the exact run's result for a number of network evaluations",
        stage=Stage.TRAJECTORY,
        claims=(exclusive("sampler.schedule"), exclusive("sampler.solver")),
        needs=(Need.FLOW_SCHEDULER,),
        calibration="required",
        unsound_with={
            "progressive_resolution": "the solver sums all outputs of a run, and there they change their "
            "size on the way; keep one of them."
        },
        cite=Cite(
            title="Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models; "
            "S4S: Solving for a Fast Diffusion Model Solver",
            arxiv="2403.01329, 2502.17423",
            differs="weights are not trained: each step takes the least squares fit to the exact latent, in closed "
            "loop, and then one Gauss-Newton step acts on all of them together; steps before the first gap are the "
            "exact run's own; the other steps' places come from a local search on the exact run's grid",
        ),
    )

    steps: int | None = None
    """Evaluations of the solver: one that comes with Vivace for this model, 14 when left out, or the file's."""
    file: str = ""
    """A solver file of your own."""

    @classmethod
    def examples(cls, workdir: Path, pipeline: Any) -> tuple[Self, ...]:
        file = euler(pipeline, grid=8, nodes=(0, 1, 3, 6))
        if file is None:
            return (cls(),)
        # Guided g is g of the conditional output and 1 - g of the other.
        g = file.key.guidance
        weights = tuple((w[0], *(v * share for v in w[1:] for share in (g, 1.0 - g))) for w in file.weights)
        pair = replace(file, basis="pair", weights=weights)
        files = (file.save(workdir / "solver.json"), pair.save(workdir / "pair.json"))
        return tuple(cls(file=str(f)) for f in files)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and (isinstance(self.steps, bool) or self.steps != int(self.steps)):
            raise ConfigError(f"{NAME}: steps must be a whole number, not {self.steps!r}.")

    def solver(self, model: ModelDescription) -> SolverFile:
        """The solver for a model.

        Raises:
            ConfigError: there is none; the sentence says what to do.
        """
        if self.file:
            file = SolverFile.load(self.file)
            if self.steps not in (None, file.steps):
                raise ConfigError(
                    f"has a file of {file.steps} steps ({self.file}) and not of {self.steps}; leave steps out."
                )
            return file
        steps, found = self.steps or STEPS, shipped(model.name)
        if steps not in found:
            there = f"there are {', '.join(map(str, found))}" if found else "none comes with Vivace"
            raise ConfigError(
                f"has no solver of {steps} steps for {model.name} ({there}); make one with "
                f"`{COMMAND.replace('STEPS', str(steps))}`."
            )
        return found[steps]

    def missing(self, model: ModelDescription) -> str:
        """Why it cannot serve a model, as far as that is known without its weights."""
        try:
            found = self.solver(model)
        except ConfigError as error:
            return f"cannot use its file: {error}" if self.file else str(error)
        if found.key.family not in ("", model.family):
            return f"was fitted for the family {found.key.family}, and {model.name} is of {model.family}."
        if model.weights and found.key.model_hash not in ("", model.weights):
            return f"was fitted for other weights of {model.name}; make one for these with `{COMMAND}`."
        has = noise_schedule(model.scheduler_class, model.scheduler)
        if found.key.scheduler != has:
            return (
                f"was fitted for the noise schedule {found.key.scheduler}, and {model.name} has {has}; make one with "
                f"`{COMMAND}`."
            )
        return ""

    def apply(self, target: Target) -> None:
        found = self.solver(target.model)
        if found.key.model_hash and target.model_hash and found.key.model_hash != target.model_hash:
            raise ConfigError(
                f"{NAME}: the solver was fitted for other weights of {target.model.name}; make one for these "
                f"with `{COMMAND}`."
            )
        run = _Run(found, target)
        target.edit.wrap(target.scheduler, run.set_timesteps, "set_timesteps")
        target.edit.wrap(target.scheduler, run.step, "step")
        if found.basis == "pair":
            for expert in target.experts:
                target.around_expert(expert, run.watch)

    def estimate(self, model: ModelDescription, workload: Workload, base: Estimate) -> Estimate:
        """Exact: every evaluation costs the same."""
        return base.scaled(self.solver(model).steps / workload.steps)


class _Run:
    """The scheduler's two methods while the solver is in force."""

    def __init__(self, found: SolverFile, target: Target) -> None:
        self.found, self.target, self.scheduler = found, target, target.scheduler
        self.increments = found.increments()
        self.acts = False
        self.index = 0
        self.extra: float | None = 0.0
        """The caller's guidance scale less the fitted one; None until the first step shows it."""

    @property
    def memory(self) -> Memory:
        return self.target.store.whole(NAME, "features", Memory)

    def watch(self, call: RootCall, run: Callable[[RootCall], torch.Tensor]) -> torch.Tensor:
        """Around a transformer: keep what the pipeline mixes its guided output from."""
        sample, branch = run(call), self.target.clock.branch
        if not self.acts:
            return sample
        now = self.memory.now
        if branch == FUSED:
            now[UNCOND], now[COND] = sample.float().chunk(2)
        else:
            now[branch] = sample.float()
        return sample

    def set_timesteps(self, old: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(old)
        grid, found = self.found.key.steps, self.found

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            from vivace.techniques.trajectory.placement_math import ask_for, asked_steps

            call = signature.bind(*args, **kwargs).arguments
            asked = asked_steps(call)
            users = self.target.clock.steps_are_the_users and asked not in (grid, found.steps)
            self.acts, self.index = asked is not None and not users, 0
            if not self.acts:
                return old(*args, **kwargs)
            ask_for(call, grid)
            out = old(**call)
            self._place()
            adapter = self.target.model.adapter
            name = adapter.guidance_argument if adapter is not None else "guidance_scale"
            scale = getattr(self.target.pipeline, name, None)
            self._guided_by(float(scale) if isinstance(scale, (int, float)) else None)
            self.target.report(NAME, "evaluations_saved", grid - found.steps)
            return out

        return set_timesteps

    def _guided_by(self, scale: float | None) -> None:
        """Keep how far the caller's guidance scale is from the fitted one, and tell it."""
        self.extra = None if scale is None else scale - self.found.key.guidance
        if self.extra is not None and abs(self.extra) <= _SAME * max(1.0, self.found.key.guidance):
            self.extra = 0.0
        if self.extra:
            self.target.report(NAME, "off_guidance", 1)

    def _place(self) -> None:
        """Keep the computed steps of the grid the scheduler has just made."""
        import torch

        scheduler, found = self.scheduler, self.found
        sigmas = scheduler.sigmas.tolist()
        if not found.fits(sigmas):
            raise ConfigError(
                f"{NAME}: the scheduler's noise levels are not those the solver was fitted for (another shift or "
                f"noise schedule); make a solver for them with `{COMMAND}`."
            )
        nodes = torch.tensor(found.nodes)
        scheduler.timesteps = scheduler.timesteps[nodes.to(scheduler.timesteps.device)]
        scheduler.sigmas = scheduler.sigmas[torch.cat([nodes, torch.tensor([len(sigmas) - 1])])]
        if hasattr(scheduler, "num_inference_steps"):
            scheduler.num_inference_steps = found.steps

    def step(self, old: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(old)

        def step(*args: Any, **kwargs: Any) -> Any:
            if not self.acts:
                return old(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            values = call.arguments
            change = self._keep(values["model_output"])
            if self.index < self.found.own:
                self.index += 1
                return old(*args, **kwargs)
            out = self._next(values["sample"], change)
            if values.get("return_dict", True):
                from diffusers.schedulers.scheduling_utils import SchedulerOutput

                return SchedulerOutput(prev_sample=out)
            return (out,)

        return step

    def _keep(self, output: torch.Tensor) -> torch.Tensor | None:
        """Remember what the evaluation added; what the caller's own guidance scale adds to the step."""
        features, now = self.memory.features, self.memory.now
        if self.found.basis != "pair":
            features.append(output.float())
            return None
        cond, uncond = now[COND], now.get(UNCOND)
        now.clear()
        # Without a second branch, here or in the fit, the conditional output is all there is to weigh.
        alone = uncond is None or self.found.key.guidance <= 1.0
        features += [cond, cond if alone else uncond]
        return None if uncond is None else self._off_guidance(output.float(), cond, uncond)

    def _next(self, sample: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
        start, index = self.memory.start, self.index - self.found.own
        if not start:
            start.append(sample.float())
        # What the step adds to its sample: latents that somebody edited between two steps stay edited.
        out = sample.float()
        for weight, value in zip(self.increments[index], (*start, *self.memory.features), strict=True):
            out = out + weight * value
        if change is not None:
            out = out + change
        self.index += 1
        return out.to(sample.dtype)

    def _off_guidance(
        self, output: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor
    ) -> torch.Tensor | None:
        """What another guidance scale than the fitted one, which the weights of both branches hold, adds to a step.

        The guided output changes by (scale - fitted) (cond - uncond), and that is integrated by Euler's rule. The
        fitted weights would not do: single ones are large and cancel each other on the fitted trajectory only.
        """
        gap = cond - uncond
        if self.extra is None:
            # This pipeline does not tell its scale: its first guided output does.
            size = float(gap.square().sum())
            self._guided_by(float(((output - uncond) * gap).sum()) / size if size else None)
        if not self.extra:
            return None
        nodes, sigmas = (*self.found.nodes, self.found.key.steps), self.found.sigmas
        return self.extra * (sigmas[nodes[self.index + 1]] - sigmas[nodes[self.index]]) * gap


@cache
def shipped(model: str) -> dict[int, SolverFile]:
    """The solvers that come with Vivace for a model, by number of evaluations."""
    with resources.as_file(resources.files("vivace.techniques.trajectory").joinpath(_FOLDER)) as folder:
        found = [SolverFile.load(file) for file in folder.glob(f"{model}-*.json")]
    return {s.steps: s for s in sorted(found, key=lambda s: s.steps)}


def euler(pipeline: Any, grid: int, nodes: tuple[int, ...]) -> SolverFile | None:
    """Euler's steps between the nodes as a solver file: nothing is fitted, so it holds for any weights.

    None where the noise levels are unknown before the call: shifted by resolution, or none at all.
    """
    import copy

    from vivace.models.describe import describe_pipeline
    from vivace.techniques.trajectory.placement_math import uniform

    scheduler = copy.deepcopy(pipeline.scheduler)
    if not hasattr(scheduler, "sigmas") or scheduler.config.get("use_dynamic_shifting"):
        return None
    if scheduler.config.get("use_flow_sigmas"):
        scheduler.set_timesteps(grid)
    else:
        scheduler.set_timesteps(sigmas=uniform(grid))  # such pipelines hand their levels in
    sigmas = [float(s) for s in scheduler.sigmas]
    model = describe_pipeline(pipeline)
    row, weights = [1.0], []
    for here, there in zip(nodes, (*nodes[1:], grid), strict=True):
        row = [*row, sigmas[there] - sigmas[here]]
        weights.append(tuple(row))
    return SolverFile(
        key=replace(key_of(model, pipeline, model.workload().with_(steps=grid)), model_hash="", family=""),
        nodes=nodes,
        sigmas=tuple(sigmas),
        weights=tuple(weights),
        prompts=0,
        prompts_sha256="",
        seed=0,
        error=0.0,
        vivace="",
    )
