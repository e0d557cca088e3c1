"""Fitting a solver to a live pipeline: its exact run is recorded, then the network is asked at other samples.

The exact run goes through the pipeline itself (`vivace.plans.solver_tapes`). For the fit its transformer calls are made
again with other samples and timesteps, without the pipeline. That this is the same network is checked: the recorded
outputs must come out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace.calibration.artifact import Key, key_of, prompts_digest
from vivace.calibration.fitting import Basis, Fitted, fit_along, refine
from vivace.calibration.solver import SolverFile
from vivace.core.context import COND, FUSED, UNCOND
from vivace.core.errors import ConfigError, ModelError
from vivace.models.adapter import ModelDescription, RootCall
from vivace.models.describe import describe_pipeline
from vivace.plans.engine import StepListener
from vivace.plans.plan import Plan
from vivace.plans.session import accelerate
from vivace.plans.solver_tapes import Reel, SolverRecorder, Tape

if TYPE_CHECKING:
    import torch

SHAPE = 1.7
"""Computed steps lie at (n - 1) u^SHAPE for even u: what the search found on the embedded model, in one number."""
LEAD = 0.2
"""Share of the grid whose first steps are all computed, where there are evaluations enough: what a clip shows is
decided there, and one that turns early into another clip is lost (docs/LOG.md)."""
_AGREES = 0.02
"""Relative error up to which an output asked for again is the recorded one (bf16, other batch sizes)."""


class Network:
    """The transformer of a pipeline on recorded prompts: a sample and a step of the grid to both branches' outputs.

    Args:
        pipeline: the live pipeline, outside of a session.
        tapes: of its calls, one behind the other along the batch.
        timesteps: (n,) of the exact run.
    """

    def __init__(self, pipeline: Any, tapes: Sequence[Tape], timesteps: torch.Tensor) -> None:
        self._pipeline, self._tapes, self._timesteps = pipeline, tapes, timesteps
        self.samples = sum(len(t.samples[0]) for t in tapes)
        self.evaluations = 0

    def part(self, tapes: int) -> Network:
        """The same network on the first so many tapes."""
        return Network(self._pipeline, self._tapes[:tapes], self._timesteps)

    def pair(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cond, uncond) outputs float32 at samples (m * B, C, ...), several runs of the prompts one behind the other.

        Without guidance both are the same tensor.
        """
        import torch

        step = int((self._timesteps == t).nonzero()[0])
        cond, uncond, at = [], [], 0
        with torch.no_grad():
            while at < len(x):
                for tape in self._tapes:
                    size = len(tape.samples[0])
                    c, u = self._ask(tape, x[at : at + size], step)
                    cond.append(c)
                    uncond.append(u)
                    at += size
        return torch.cat(cond), torch.cat(uncond)

    def _ask(self, tape: Tape, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        expert = tape.experts[step]
        module = getattr(self._pipeline, expert)
        t = self._timesteps[step]
        self.evaluations += 1
        if (expert, FUSED) in tape.calls:
            u, c = _call(module, tape.calls[expert, FUSED], torch.cat([x, x]), t).chunk(2)
            return c, u
        c = _call(module, tape.calls[expert, COND], x, t)
        if (expert, UNCOND) not in tape.calls:
            return c, c
        return c, _call(module, tape.calls[expert, UNCOND], x, t)

    def check(self) -> None:
        """Ask once again for what was recorded.

        Raises:
            ModelError: something else comes out: the pipeline does more than hand its sample to the network.
        """
        for tape in self._tapes[:1]:
            for (expert, branch), known in tape.first.items():
                step = tape.experts.index(expert)
                x, call = tape.samples[step], tape.calls[expert, branch]
                rows = x if branch != FUSED else _twice(x)
                made = _call(getattr(self._pipeline, expert), call, rows, self._timesteps[step])
                off = float((made - known).norm() / known.norm())
                if not off <= _AGREES:
                    raise ModelError(
                        f"{type(self._pipeline).__name__} hands its transformer more than the sample of a step "
                        f"(outputs differ by {off:.1%}), so no solver can be fitted to it; use optimal_schedule."
                    )


def _twice(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([x, x])


def _call(module: Any, call: RootCall, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    import torch

    before = call.values["hidden_states"]
    if before.shape != x.shape:
        raise ModelError(
            f"the transformer gets {tuple(before.shape)} for a sample of {tuple(x.shape)}: no solver can be fitted."
        )
    values = dict(call.values, hidden_states=x.to(before.dtype), return_dict=False)
    old = values["timestep"]
    values["timestep"] = torch.full_like(old, 1) * t.to(old.device, old.dtype)
    with torch.no_grad():
        return module(**values)[0].float()


@dataclass(frozen=True, slots=True)
class Exact:
    """The exact runs of some prompts: everything a fit needs."""

    network: Network
    states: torch.Tensor
    """(n + 1, B, C, ...) float32, the noise first."""
    timesteps: torch.Tensor
    sigmas: tuple[float, ...]
    guidance: float
    key: Key
    prompts_sha256: str
    seed: int

    def part(self, calls: int) -> Exact:
        """The first so many of the pipeline's calls."""
        network = self.network.part(calls)
        return replace(self, network=network, states=self.states[:, : network.samples])


def record(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch: int = 1,
    model: ModelDescription | None = None,
    on_step: StepListener | None = None,
    on_prompt: Callable[[int], None] | None = None,
    part: Path | None = None,
    **call: Any,
) -> Exact:
    """Run the exact pipeline on prompts and keep what a fit needs.

    Args:
        pipeline: a diffusers video pipeline with a flow-matching scheduler.
        prompts: one clip each.
        seed: of the first clip, the next gets seed + 1; or `seeds`, one for each.
        batch: prompts in one call.
        on_step, on_prompt: progress.
        part: a folder that finished runs are kept in, so that an interrupted recording goes on behind them. The caller
            deletes it.
        call: the pipeline's arguments; what is left out is the model's default.

    Raises:
        ConfigError: no prompts.
        PlanError: the scheduler is of another kind.
        ModelError: the network cannot be asked apart from the pipeline.
    """
    import torch

    if not prompts:
        raise ConfigError("fitting a solver needs at least one prompt.")
    model = model or describe_pipeline(pipeline)
    workload = model.asked(call)
    call = {"num_inference_steps": workload.steps, "output_type": "latent"} | call
    key = key_of(model, pipeline, workload)
    given = list(seeds) if seeds is not None else [seed + i for i in range(len(prompts))]
    digest = prompts_digest(list(prompts))
    header = {"key": asdict(key), "prompts": digest, "seeds": given, "batch": batch}
    device = next(getattr(pipeline, model.experts[0].name).parameters()).device
    reel, tapes = Reel(part, header, device), list[Tape]()
    for number, i in enumerate(range(0, len(prompts), batch)):
        if (tape := reel.load(number)) is None:
            recorder = SolverRecorder()
            if on_prompt is not None:
                on_prompt(i)
            with accelerate(pipeline, Plan([recorder]), model=model, on_step=on_step) as session:
                session(list(prompts[i : i + batch]), seed=given[i : i + batch], **call)
            tape = recorder.tape
            reel.save(number, tape)
        tapes.append(tape)
    timesteps = tapes[0].timesteps
    assert timesteps is not None
    if len(tapes[0].samples) != len(timesteps) + 1:
        raise ModelError(
            f"{type(pipeline.scheduler).__name__} took {len(tapes[0].samples) - 1} steps over {len(timesteps)} "
            "timesteps; a solver is fitted to one evaluation a step."
        )
    network = Network(pipeline, tapes, timesteps)
    network.check()
    return Exact(
        network=network,
        states=torch.cat([torch.stack(t.samples) for t in tapes], 1),
        timesteps=timesteps,
        sigmas=tapes[0].sigmas,
        guidance=workload.guidance,
        key=key,
        prompts_sha256=digest,
        seed=seed,
    )


def place(steps: int, grid: int, power: float = SHAPE, lead: int | None = None) -> tuple[int, ...]:
    """Computed steps of a grid: `lead` without a gap, the others ever sparser.

    Args:
        lead: left out, `LEAD` of the grid, and at most half of the steps.

    Raises:
        ConfigError: more steps than the grid has, or fewer than one; a longer lead than there are steps.
    """
    if not 1 <= steps <= grid:
        raise ConfigError(f"a solver of {steps} steps does not fit a run of {grid}; give from 1 to {grid}.")
    lead = min(round(LEAD * grid), steps // 2) if lead is None else lead
    lead = max(1, lead)
    if lead > steps:
        raise ConfigError(f"a solver of {steps} steps cannot begin with {lead}; give a shorter lead.")
    last = grid - max(1, round(0.06 * grid)) if steps < 0.7 * grid else grid - 1
    out, rest = list(range(lead)), steps - lead
    for k in range(1, rest + 1):
        at = round(lead - 1 + (last - lead + 1) * (k / rest) ** power)
        out.append(max(at, out[-1] + 1))
    for k in range(steps - 1, 0, -1):
        out[k] = min(out[k], grid - steps + k)
    return tuple(out)


def fit(
    exact: Exact,
    steps: int,
    *,
    nodes: Sequence[int] | None = None,
    basis: str = "pair",
    seconds: float = 0.0,
    rounds: int = 0,
    together: int = 1,
    watch: Callable[[str], None] = lambda text: None,
) -> tuple[SolverFile, torch.Tensor]:
    """Fit a solver of `steps` evaluations to recorded runs.

    Args:
        nodes: computed steps; `place` puts them when left out.
        basis: `guided` or `pair` (`vivace.calibration.solver.SolverFile`).
        seconds: how long a local search may move them.
        rounds: Gauss-Newton steps on the error of the final latent; each takes about steps^2 / 4 runs.
        together: weight directions of a Gauss-Newton step that run side by side.
        watch: told in words what is going on.

    Returns:
        The solver, and the final latents (B, C, ...) that it reaches on the recorded prompts.
    """
    import vivace

    n, pair = len(exact.timesteps), exact.network.pair
    chosen = tuple(nodes) if nodes is not None else place(steps, n)
    if seconds > 0:
        chosen = search(exact, chosen, seconds, basis, watch, leading(chosen))
    made = fit_along(pair, exact.states, exact.timesteps, chosen, exact.guidance, Basis(basis))
    fitted, end = made.fitted, made.end
    watch(f"fitted: error {error_of(exact, end):.4f}")
    for i in range(rounds):
        fitted, before, after = refine(
            pair, exact.states, exact.timesteps, fitted, exact.guidance, together=together
        )
        watch(f"round {i + 1}: error {before:.4f} -> {after:.4f}")
        if after >= before * (1 - 1e-3):
            break
    if rounds:
        end = fitted.run(pair, exact.states, exact.timesteps, exact.guidance)
    file = SolverFile(
        key=exact.key,
        nodes=fitted.nodes,
        sigmas=exact.sigmas,
        weights=rows(fitted),
        basis=basis,
        own=fitted.own,
        prompts=exact.states.shape[1],
        prompts_sha256=exact.prompts_sha256,
        seed=exact.seed,
        error=error_of(exact, end),
        vivace=vivace.__version__,
    )
    return file, end


def rows(fitted: Fitted) -> tuple[tuple[float, ...], ...]:
    """The weights of a solver as plain data."""
    return tuple(tuple(w.tolist()) for w in fitted.weights)


def error_of(exact: Exact, end: torch.Tensor) -> float:
    """Relative error of final latents (B, C, ...), geometric mean over the samples."""
    goal = exact.states[-1]
    off = (end - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)
    return float(off.clamp_min(1e-12).log().mean().exp())


def tail_error(exact: Exact, end: torch.Tensor) -> float:
    """Relative error of final latents, root mean square over the samples: the few clips that go astray count most."""
    goal = exact.states[-1]
    off = (end - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)
    return float(off.square().mean().sqrt())


def leading(nodes: Sequence[int]) -> int:
    """How many steps are computed before the first gap."""
    return next((k for k, node in enumerate(nodes) if node != k), len(nodes))


def search(
    exact: Exact,
    nodes: tuple[int, ...],
    seconds: float,
    basis: str = "pair",
    watch: Callable[[str], None] = lambda text: None,
    hold: int = 1,
) -> tuple[int, ...]:
    """Move one computed step at a time, as long as `tail_error` falls and time is left.

    A clip whose early steps were summarised can turn into another one; the mean over log errors does not see it. Every
    candidate is fitted and run in closed loop. The last steps move first: candidates share the run up to the first step
    in which they differ. The first `hold` steps stay.
    """
    n, sums = len(exact.timesteps), Basis(basis)
    cache: dict[Any, Any] = {}
    end = time.perf_counter() + seconds

    def loss(candidate: tuple[int, ...]) -> float:
        run = fit_along(
            exact.network.pair, exact.states, exact.timesteps, candidate, exact.guidance, sums, cache=cache
        )
        return tail_error(exact, run.end)

    best, tried, improved = loss(nodes), 1, True
    while improved and time.perf_counter() < end:
        improved = False
        for i in range(len(nodes) - 1, max(1, hold) - 1, -1):
            for distance in (1, -1, 2, -2, 3, -3):
                at = nodes[i] + distance
                if not nodes[i - 1] < at < (nodes[i + 1] if i + 1 < len(nodes) else n):
                    continue
                if time.perf_counter() > end:
                    break
                move = (*nodes[:i], at, *nodes[i + 1 :])
                found, tried = loss(move), tried + 1
                if found < best * (1 - 1e-4):
                    nodes, best, improved = move, found, True
        watch(f"{tried} placements: error {best:.4f}")
    return nodes
